"""Plans of layers without data: tensors on the meta device, for compiling ahead of time.

Shapes: E experts, N rows and K columns of a matrix, D hidden, F intermediate, r rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from moecc.backends.triton.launch import plan
from moecc.backends.triton.pack import COLUMNS, tiles
from moecc.backends.triton.parts import Plan
from moecc.backends.triton.tiles import Card, Tile
from moecc.ir.gates import rows_per_unit


class Shape(NamedTuple):
    """The sizes of one MoE layer: E experts, k of them per token, D hidden, F intermediate."""

    experts: int
    top_k: int
    hidden: int
    intermediate: int

    @property
    def weights(self) -> int:
        """The weights of one expert."""
        return 3 * self.hidden * self.intermediate


SHAPES = {
    "Qwen1.5-MoE-A2.7B": Shape(60, 4, 2048, 1408),
    "Qwen3-30B-A3B": Shape(128, 8, 2048, 768),
    "Mixtral-8x7B": Shape(8, 2, 4096, 14336),
}


@dataclass(frozen=True)
class _Stored:
    """How the projections of a layer are stored; the fields are options of `abstract_plan`."""

    shape: Shape
    bits: int
    dtype: torch.dtype
    rank: int
    mean: int
    bias: bool
    gate: str

    def empty(self, *size: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(size, dtype=dtype or self.dtype, device="meta")

    def coded(
        self, prefix: str, matrices: int, rows: int, columns: int, bits: int, gated: bool
    ) -> dict[str, Tensor]:
        """Return packed codes, codebook, scale and signs of [E, N, K] matrices."""
        down, across = tiles(rows, gated=gated), -(-columns // COLUMNS)
        planes, group = (2, 2) if bits == 4 else (1, 4)
        found = {
            "codes": self.empty(matrices, down, planes, across, 512, dtype=torch.int32),
            "codebook": self.empty(matrices, 256, group, dtype=torch.int8),
            "scale": self.empty(matrices, rows),
        }
        if bits == 3:
            found["signs"] = self.empty(matrices, down, across, 256, dtype=torch.int32)
        return {prefix + name: t for name, t in found.items()}

    def projection(self, rows: int, columns: int, *, input_side: bool) -> dict[str, Tensor]:
        gated, experts = input_side and self.gate != "none", self.shape.experts
        p = self.coded("", experts, rows, columns, self.bits, gated)
        if self.mean:
            p |= self.coded("mean_", 1, rows, columns, self.mean, gated)
        if self.bias:
            p["bias"] = self.empty(experts, rows)
        if self.rank:
            coef = (experts, rows, self.rank) if input_side else (experts, self.rank, columns)
            p["basis"] = self.empty(self.rank, self.shape.hidden)
            p["coef"] = self.empty(*coef, dtype=torch.int8)
            p["coef_scale"] = self.empty(*coef[:2])
        return p


def abstract_plan(
    shape: Shape,
    tokens: int,
    bits: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    rank: int = 0,
    mean: int = 0,
    bias: bool = False,
    norm: bool = False,
    act: str = "silu",
    gate: str = "glu",
    card: str = "sm_90",
    tile: Tile | None = None,
) -> Plan:
    """Return the plan of a layer of this shape, on the meta device.

    mean: bits of a shared mean, 0 for none. tile: as in `moecc.backends.triton.launch.plan`.
    """
    stored = _Stored(shape, bits, dtype, rank, mean, bias, gate)
    d, f = shape.hidden, shape.intermediate
    return plan(
        stored.empty(tokens, d),
        stored.empty(tokens, shape.top_k, dtype=torch.int64),
        stored.empty(tokens, shape.top_k),
        stored.projection(rows_per_unit(gate) * f, d, input_side=True),
        stored.projection(d, f, input_side=False),
        stored.empty(d) if norm else None,
        act=act,
        gate=gate,
        alpha=1.0,
        limit=1.0,
        eps=1e-6,
        tile=tile,
        card=Card(card),
    )
