"""One call of a layer: what its launches share, and the list to which they are appended."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import Tensor

from moecc.backends.triton.pack import COLUMNS
from moecc.backends.triton.parts import Arguments, Kernel, Launch, Rows
from moecc.backends.triton.tiles import Card, Tile, choose_unroll

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # the interpreter runs no inline assembly


def power_of_two(n: int, least: int = 1) -> int:
    """Return the smallest power of two that is at least n and `least`."""
    return max(least, 1 << (n - 1).bit_length())


@dataclass
class Call:
    """What the launches of one call share; index [T, k] and weight [T, k] are its routing.

    forced: the caller chose the tile. limits: alpha and limit of the gate.
    """

    launches: list[Launch]
    index: Tensor
    weight: Tensor
    experts: int
    tile: Tile
    forced: bool
    card: Card
    dtype: torch.dtype
    limits: Arguments
    act: str
    gate: str

    @property
    def slots(self) -> int:
        return self.index.numel()

    @property
    def choices(self) -> int:
        return self.index.shape[1]

    @property
    def gated(self) -> bool:
        return self.gate != "none"

    @property
    def hopper(self) -> bool:
        return self.card.name == "sm_90" and not INTERPRETED

    def gating(self) -> Arguments:
        """Return the arguments of a kernel that applies the gate."""
        return {**self.limits, "ACT": self.act, "GATE": self.gate}

    def add(
        self,
        name: str,
        kernel: Kernel,
        grid: tuple[int, ...],
        arguments: Arguments,
        warps: int,
        stages: int = 2,
        registers: int = 0,
    ) -> None:
        """Append a launch. registers: per thread at most; 0: as the compiler chooses."""
        options = {"num_warps": warps, "num_stages": stages}
        if registers:
            options["maxnreg"] = registers
        if self.hopper and self.launches:
            options["launch_pdl"] = True  # `moecc.backends.triton.chain`
        arguments = {**arguments, "HOPPER": self.hopper}
        self.launches.append(Launch(name, kernel, grid, arguments, options))

    def rows(self, like: Tensor, count: int, column_tiles: int, filled: int | None = None) -> Rows:
        """Allocate `count` rows of a product's right operand.

        filled: the number of columns that the filling kernel writes, if it leaves padding alone.
        """
        unroll = choose_unroll(column_tiles, self.tile.unroll)
        steps = -(-column_tiles // unroll)
        width = steps * unroll * COLUMNS
        if self.tile.half:
            new = like.new_empty if filled in (None, width) else like.new_zeros
            return Rows(new((count, width), dtype=self.dtype), None, unroll)
        values = like.new_empty((count, 2, width), dtype=torch.int8)
        return Rows(values, like.new_empty((count, steps), dtype=torch.float32), unroll)
