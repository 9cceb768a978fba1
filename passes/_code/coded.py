"""A coded projection before it is packed for storage.

Shapes: E experts, N rows, K columns (a multiple of 8), v weights per code, G = K/v groups of them,
C codebooks: E, or 1 that all experts share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from moecc.ir import vq4
from moecc.passes._code.half import compact


@dataclass
class Coded:
    """Codes, signs, codebooks and row scales, in types that arithmetic works on."""

    codes: Tensor  # int64 [E, N, G]
    negative: Tensor | None  # bool [E, N, K] at 3 bit, else None
    codebook: Tensor  # whole numbers as float32 [C, 256, v]
    scale: Tensor  # [E, N]

    def unscaled(self) -> Tensor:
        """The weights in units of their row's scale, [E, N, K]."""
        return lookup(self.codes, self.negative, self.codebook)

    def dense(self) -> Tensor:
        """The weights that the codes stand for, [E, N, K]."""
        return self.unscaled() * self.scale.unsqueeze(-1)

    def stored(self) -> dict[str, Tensor | None]:
        """The tensors of `vq4.CODED`, packed."""
        signs = None if self.negative is None else vq4.pack_signs(self.negative)
        codes, codebook = self.codes.to(torch.uint8), self.codebook.to(torch.int8).contiguous()
        return dict(zip(vq4.CODED, (codes, signs, codebook, compact(self.scale)), strict=True))

    def rows(self, order: Tensor) -> Coded:
        """The same rows in another order: each expert's row numbers as [E, N, 1]."""
        negative = None if self.negative is None else self.negative.take_along_dim(order, 1)
        return replace(
            self,
            codes=self.codes.take_along_dim(order, 1),
            negative=negative,
            scale=self.scale.take_along_dim(order[..., 0], 1),
        )


def joined(parts: Sequence[Coded], dim: int, codebook: Tensor) -> Coded:
    """Join parts that hold different experts (dim 0) or rows (dim 1) under one `codebook`."""
    negative = [p.negative for p in parts if p.negative is not None]
    return Coded(
        torch.cat([p.codes for p in parts], dim),
        torch.cat(negative, dim) if negative else None,
        codebook,
        torch.cat([p.scale for p in parts], dim),
    )


def lookup(codes: Tensor, negative: Tensor | None, codebook: Tensor) -> Tensor:
    """Decode: codes [E, N, G], signs [E, N, K] and codebook [C, 256, v] give [E, N, K]."""
    experts = codes.shape[0]
    table = codebook.expand(experts, -1, -1)
    offset = torch.arange(experts, device=codes.device).view(-1, 1, 1) * table.shape[1]
    # index_select is a third faster than indexing
    values = table.reshape(-1, table.shape[2]).index_select(0, (codes + offset).flatten())
    values = values.view(*codes.shape[:-1], -1)
    return values if negative is None else torch.where(negative, -1 - values, values)


def pad_columns(weight: Tensor, moment: Tensor) -> tuple[Tensor, Tensor]:
    """Add zero columns to weight [E, N, K] and moment [E, K, K] up to a multiple of 8."""
    extra = vq4.padded(weight.shape[-1]) - weight.shape[-1]
    if extra == 0:
        return weight, moment
    return F.pad(weight, (0, extra)), F.pad(moment, (0, extra, 0, extra))
