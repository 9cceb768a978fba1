"""A weight's low-rank update, and adding it to the weight.

Shapes: r rank, N rows, K columns, E experts. A [r, K] and B [N, r] of a linear. For fused experts,
A [E r, K] expert by expert, and B [N, r E] with the expert running fastest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from moecc.ir.program import Program


@dataclass(frozen=True)
class Update:
    """The update scaling * B A of one weight."""

    a: Tensor
    b: Tensor
    scaling: float
    experts: int = 0  # of a three-dimensional weight
    transposed: bool = False  # whether experts are stored as [E, K, N]

    def __str__(self) -> str:
        return f"rank {self.rank}, scaling {self.scaling:g}"

    @property
    def rank(self) -> int:
        """r, of each expert."""
        return len(self.a) // max(self.experts, 1)

    def shape(self) -> tuple[int, ...]:
        """The shape of the weight: [N, K], or [E, N, K], or [E, K, N] if transposed."""
        rows, columns = self.b.shape[0], self.a.shape[1]
        if not self.experts:
            return rows, columns
        return (self.experts, columns, rows) if self.transposed else (self.experts, rows, columns)

    def delta(self) -> Tensor:
        """The update in the shape of the weight, float32."""
        a, b = self.a.float(), self.b.float()
        if not self.experts:
            return b @ a * self.scaling
        left = b.unflatten(1, (-1, self.experts)).permute(2, 0, 1)
        each: Tensor = left @ a.unflatten(0, (self.experts, -1))
        each = each * self.scaling
        return each.mT if self.transposed else each


def merge_into(program: Program, weight: str, update: Update) -> None:
    """Add the update to the program's `weight`, in float32, whenever it is read.

    The sum is rounded to the type that the checkpoint stores the weight in.
    """
    dtype = program.stored_dtype(weight)
    before: Callable[[], Tensor] = partial(_stored, program, weight)
    if weight in program.tensors:
        before = program.tensors.reader(weight).whole
    program.tensors.spill(weight, partial(_merged, before, update, dtype))
    program.rounded.add(weight)


def _stored(program: Program, weight: str) -> Tensor:
    assert program.store is not None
    return program.store.read(weight, dtype=program.dtype)


def _merged(read: Callable[[], Tensor], update: Update, dtype: torch.dtype) -> Tensor:
    """The weight plus its update, as the checkpoint's type holds it."""
    value = read()
    whole: Tensor = (value.float() + update.delta()).to(dtype).to(value.dtype)
    return whole
