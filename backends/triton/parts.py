"""What a plan is made from, and what it consists of: attributes, operands, launches.

Shapes: R rows of x, E experts, N rows and K columns of a matrix, r rank.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias, TypedDict

import torch
from torch import Tensor

from moecc.backends.triton.pack import COLUMNS, Projection
from moecc.backends.triton.tiles import Tile
from moecc.ir import vq4

Kernel: TypeAlias = Any  # what triton.jit or gluon.jit returns; triton has no types for it
Argument: TypeAlias = Tensor | float | str | None
Arguments: TypeAlias = dict[str, Argument]


class Attributes(TypedDict):
    """The attributes of moecc::vq_experts: the gate (`moecc.ir.gates`), and the norm's epsilon."""

    act: str
    gate: str
    alpha: float
    limit: float
    eps: float


class Launch(NamedTuple):
    """One kernel with its grid, its arguments by name and triton's options."""

    name: str
    kernel: Kernel
    grid: tuple[int, ...]
    arguments: Arguments
    options: dict[str, int]

    def __call__(self) -> None:
        self.kernel[self.grid](**self.arguments, **self.options)

    def number(self, name: str, default: int = 0) -> int:
        """Return an integer argument, or `default` if the kernel has no such parameter."""
        value = self.arguments.get(name, default)
        assert isinstance(value, int), name
        return value


@dataclass
class Plan:
    """The launches of one call in order, and the result [T, D] that the last of them writes."""

    out: Tensor
    launches: list[Launch] = field(default_factory=list)

    def named(self, name: str) -> Launch:
        """Return the first launch of a kernel that the plan is known to have."""
        return next(launch for launch in self.launches if launch.name == name)


class Rows(NamedTuple):
    """The right operand of a product: `steps` steps of `unroll` column tiles each.

    Fixed point: high and low bytes i8 [R, 2, steps * STEP] and scale f32 [R, steps], STEP = 128
    unroll. Otherwise 16-bit floats [R, steps * STEP] in the order of `decode.paired`, and no scale.
    """

    values: Tensor
    scale: Tensor | None
    unroll: int

    @property
    def steps(self) -> int:
        return self.values.shape[-1] // (COLUMNS * self.unroll)


class Matrices(NamedTuple):
    """Coded matrices [E, N, K] of one kind.

    They are an experts' projection, a mean (E = 1), or int8 coefficients (bits 8).
    """

    bits: int
    words: Tensor
    signs: Tensor | None
    table: Tensor | None
    scale: Tensor

    @classmethod
    def of(cls, p: Projection, prefix: str = "") -> Matrices | None:
        """Return the matrices of a packed projection, None if it has none under this prefix."""
        words, signs, codebook, scale = (p.get(prefix + name) for name in vq4.CODED)
        if words is None or codebook is None or scale is None:
            return None
        bits = 3 if signs is not None else 4 if codebook.shape[2] == 2 else 2
        table = codebook.contiguous().view(torch.int16 if bits == 4 else torch.int32).squeeze(-1)
        signs = None if signs is None else signs.contiguous()
        return cls(bits, words.contiguous(), signs, table, scale.contiguous())

    @property
    def rows(self) -> int:
        return self.scale.shape[1]

    @property
    def column_tiles(self) -> int:
        return self.words.shape[3] if self.bits != 8 else 0

    def arguments(self) -> Arguments:
        shared = self.table is None or self.table.shape[0] == 1
        return dict(
            words_ptr=self.words,
            signs_ptr=self.signs,
            table_ptr=self.table,
            table_stride=0 if shared else vq4.CODEBOOK_SIZE,
            scale_ptr=self.scale,
            column_tiles=self.column_tiles,
            BITS=self.bits,
        )


class LowRank(NamedTuple):
    """The term coef_scale * (coef z): z f32 [parts, R, RANK], coef i8 [E, N, r], scale [E, N]."""

    z: Tensor
    coef: Tensor
    scale: Tensor

    def arguments(self) -> Arguments:
        return dict(
            z_ptr=self.z,
            coef_ptr=self.coef,
            coef_scale_ptr=self.scale,
            z_parts=self.z.shape[0],
            z_tokens=self.z.shape[1],
            rank=self.coef.shape[2],
            RANK=self.z.shape[2],
        )


NO_LOW_RANK: Arguments = dict(
    z_ptr=None, coef_ptr=None, coef_scale_ptr=None, z_parts=0, z_tokens=0, rank=0, RANK=32
)


class Blocks(NamedTuple):
    """Slots sorted by expert into blocks of tile.tokens slots.

    slots is i32 [number * tokens], experts i32 [number]. None: row i is slot i, all of one expert.
    """

    tile: Tile
    number: int
    slots: Tensor | None = None
    experts: Tensor | None = None

    def arguments(self) -> Arguments:
        return dict(
            slots_ptr=self.slots,
            block_expert_ptr=self.experts,
            TOKENS=self.tile.tokens,
            HEIGHT=self.tile.height,
        )
