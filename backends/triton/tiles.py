"""Which shape a program of the grouped product has: by card and by tokens per expert, from a table that can be read.

There is no autotuning: a table gives the same kernels, and so the same bits, in every process.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch


class Tile(NamedTuple):
    """How one program of the grouped product is shaped: slots per block, row tiles, column tiles per step at most."""

    tokens: int
    height: int
    unroll: int
    warps: int
    stages: int
    waves: int  # programs per multiprocessor below which columns are split among programs; 0: never
    copies: int = (
        1  # of the codebook in shared memory, against bank conflicts; 1: `tl.gather`, on every card
    )
    half: bool = False  # x as the bfloat16 that it is, not as fixed point; in float16 hidden units could overflow
    persistent: bool = False  # of `half` on sm_90: `moecc.backends.triton.hopper`, eight warps; stages: of 64 columns
    registers: int = 0  # of a thread at most; 0: as the compiler likes, which is to spill a few for a round number


# By tokens per expert, S / E: decode reads every code for a few tokens, prefill fills the matrix units. sm_90's were chosen by time
# on an H100 (benchmarks/gpu_tiles.py), the others by count of instructions among those that spill no register on the card
# (tests/test_triton_aot.py). Fixed point is two columns for each token, and so twice the sums in registers; where every weight
# meets many tokens those bound the tile, and with it how often x is read and weights are decoded: `half`.
_SMALL = Tile(tokens=8, height=1, unroll=4, warps=4, stages=2, waves=4)
_MIDDLE = Tile(tokens=16, height=1, unroll=4, warps=4, stages=2, waves=2)
_LARGE = Tile(tokens=32, height=1, unroll=2, warps=4, stages=2, waves=0)
_COPIED = Tile(tokens=8, height=1, unroll=2, warps=4, stages=3, waves=3, copies=32)
_HALF = Tile(tokens=64, height=2, unroll=1, warps=4, stages=3, waves=0, copies=32, half=True)
TILES: dict[
    str, tuple[tuple[int | None, Tile], ...]
] = {  # by the longest beginning of the card's name
    "sm_": ((8, _SMALL), (24, _MIDDLE._replace(unroll=2)), (None, _LARGE._replace(warps=8))),
    "sm_90": (
        (8, _COPIED),
        (24, _COPIED._replace(tokens=16)),
        (96, _HALF),
        (
            512,
            _HALF._replace(tokens=128, copies=4),
        ),  # more copies: a multiprocessor has one program at 3 bit, not two
        (None, _HALF._replace(tokens=256, warps=8, stages=5, copies=16, persistent=True)),
        (None, _HALF._replace(tokens=128, copies=4)),
        (None, _LARGE._replace(tokens=64)),
    ),
    "sm_10": (
        (8, _SMALL._replace(registers=255)),
        (24, _MIDDLE._replace(registers=255)),
        (None, _LARGE._replace(stages=3)),
    ),
    "gfx": ((8, _SMALL), (24, _MIDDLE._replace(unroll=2)), (None, _LARGE._replace(unroll=1))),
    "gfx11": (
        (8, _SMALL._replace(unroll=1)),
        (24, _MIDDLE._replace(unroll=1)),
        (None, _MIDDLE._replace(unroll=1, warps=8, waves=0)),
    ),
}


class Card(NamedTuple):
    """What a plan depends on: "sm_90" or "gfx942", and its number of multiprocessors."""

    name: str = "sm_90"
    processors: int = 132


def choose_tile(
    slots: int, experts: int, card: Card, dtype: torch.dtype = torch.float32, *, wide: bool = False
) -> Tile:
    """The tile for `slots` rows that go to `experts` experts. dtype: of x. wide: two lookups for each weight, or a second product,
    which a `persistent` tile hasn't, and whose registers a `half` tile hasn't but in place of a second row tile."""
    table = TILES[max((name for name in TILES if card.name.startswith(name)), key=len)]
    fitting = (tile for most, tile in table if most is None or slots <= most * experts)
    if dtype != torch.bfloat16:
        return next(tile for tile in fitting if not tile.half)
    chosen = next(tile for tile in fitting if not (wide and tile.persistent))
    return chosen._replace(height=1) if wide and chosen.half else chosen


@lru_cache
def card_of(device: torch.device) -> Card:
    """The card of a CUDA or ROCm device; for others what is assumed where there is none."""
    if device.type != "cuda":
        return Card()
    found = torch.cuda.get_device_properties(device)
    name = (
        found.gcnArchName.partition(":")[0]
        if torch.version.hip
        else f"sm_{found.major}{found.minor}"
    )
    return Card(name, found.multi_processor_count)


def choose_unroll(column_tiles: int, most: int) -> int:
    """Column tiles per step: as many as cost at most a tenth more padding than one at a time would."""
    steps = (u for u in (4, 2, 1) if u <= most and -(-column_tiles // u) * u <= 1.1 * column_tiles)
    return next(steps, 1)
