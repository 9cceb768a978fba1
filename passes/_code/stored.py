"""A coded projection as it is stored, evaluated expert by expert."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from moecc.ir import vq4


@dataclass
class CodedProjection:
    """One projection's stored tensors by the names of `vq4.TENSORS`.

    Shapes: n tokens, N rows, K columns.
    """

    tensors: dict[str, Tensor | None]
    input_side: bool  # whether it reads the residual stream: gate_up

    @property
    def bias(self) -> Tensor | None:
        """[E, N], None without one."""
        return self.tensors["bias"]

    @cached_property
    def mean(self) -> Tensor | None:
        """The matrix that all experts share as it is, [1, N, K padded]; None without one."""
        return vq4.mean_part(self.tensors, self.columns, torch.float32)

    @property
    def columns(self) -> int:
        """K padded to a multiple of 8."""
        codes, book = self.tensors["codes"], self.tensors["codebook"]
        assert codes is not None and book is not None
        return codes.shape[-1] * book.shape[-1]

    def of_expert(self, e: int) -> CodedProjection:
        """The projection of expert `e` alone."""
        own = {
            name: t if t is None or vq4.is_alike(name) or len(t) == 1 else t[e : e + 1]
            for name, t in self.tensors.items()
        }
        return CodedProjection(own, self.input_side)

    def parts(self, e: int, x: Tensor) -> tuple[Tensor, Tensor | float]:
        """Expert `e`'s coded part scale * (VQ x), and its shared part of x: [n, K] -> [n, N] each.

        The shared part is 0.0 if the projection has neither mean nor basis.
        """
        t = self.tensors
        codes, signs, book, scale = t["codes"], t["signs"], t["codebook"], t["scale"]
        assert codes is not None and book is not None and scale is not None
        one, columns = slice(e, e + 1), x.shape[-1]
        table = book[one] if len(book) > 1 else book
        sign = None if signs is None else signs[one]
        weight = vq4.decode(codes[one], sign, table, columns, torch.float32)[0]
        v = (x @ weight.T) * scale[e].float()
        low = None if self.mean is None else self.mean[0, :, :columns]
        if t["basis"] is not None and t["coef"] is not None and t["coef_scale"] is not None:
            coef = (t["coef"][one], t["coef_scale"][one], t["basis"])
            basis = vq4.basis_part(*coef, torch.float32, input_side=self.input_side)[0]
            low = basis if low is None else low + basis
        return v, 0.0 if low is None else x @ low.T

    def apply(self, e: int, x: Tensor, slope: Tensor | None, offset: Tensor | None) -> Tensor:
        """Expert `e`'s output under a correction [E, N] of its coded part: [n, K] -> [n, N]."""
        v, low = self.parts(e, x)
        y = (v if slope is None else v * slope[e]) + low
        for shift in (self.bias, offset):
            if shift is not None:
                y = y + shift[e].float()
        return y
