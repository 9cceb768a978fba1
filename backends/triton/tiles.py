"""The shape of a program of the grouped product, from a table by card and tokens per expert.

There is no autotuning: the table gives the same kernels, and so the same bits, in every process.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch


class Tile(NamedTuple):
    """The shape of one program of the grouped product."""

    tokens: int  # slots per block
    height: int  # row tiles
    unroll: int  # column tiles per step, at most
    warps: int
    stages: int
    waves: int  # with fewer programs per multiprocessor, columns are split among programs; 0: never
    # Copies of the codebook in shared memory, against bank conflicts. 1: `tl.gather`, on every card
    copies: int = 1
    # Multiply x as the bfloat16 that it is, not as fixed point; in float16, hidden units could
    # overflow.
    half: bool = False
    # With `half` on sm_90: `moecc.backends.triton.hopper`, eight warps. Stages are of 64 columns
    # then.
    persistent: bool = False
    # Registers per thread, at most. 0: as the compiler chooses; it spills a few for a round number.
    registers: int = 0


# By tokens per expert, S / E: decode reads every code for a few tokens, prefill fills the matrix
# units. sm_90's tiles were chosen by time on an H100 (benchmarks/gpu_tiles.py). The others were
# chosen by the number of instructions, among those that spill no register on the card
# (tests/test_triton_aot.py). Fixed point takes two columns per token, and so twice the sums in
# registers. If every weight meets many tokens, those sums limit the tile, and so how seldom x is
# read and weights are decoded: `half`.
_SMALL = Tile(tokens=8, height=1, unroll=4, warps=4, stages=2, waves=4)
_MIDDLE = Tile(tokens=16, height=1, unroll=4, warps=4, stages=2, waves=2)
_LARGE = Tile(tokens=32, height=1, unroll=2, warps=4, stages=2, waves=0)
_COPIED = Tile(tokens=8, height=1, unroll=2, warps=4, stages=3, waves=3, copies=32)
_HALF = Tile(tokens=64, height=2, unroll=1, warps=4, stages=3, waves=0, copies=32, half=True)
# card name prefix -> (most tokens per expert, tile); the longest prefix counts
TILES: dict[str, tuple[tuple[int | None, Tile], ...]] = {
    "sm_": ((8, _SMALL), (24, _MIDDLE._replace(unroll=2)), (None, _LARGE._replace(warps=8))),
    "sm_90": (
        (8, _COPIED),
        (24, _COPIED._replace(tokens=16)),
        (96, _HALF),
        # with more copies, a multiprocessor holds one program at 3 bit, not two
        (512, _HALF._replace(tokens=128, copies=4)),
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
    """What a plan depends on: the card's name, "sm_90" or "gfx942", and its multiprocessors."""

    name: str = "sm_90"
    processors: int = 132


def choose_tile(
    slots: int, experts: int, card: Card, dtype: torch.dtype = torch.float32, *, wide: bool = False
) -> Tile:
    """Return the tile for `slots` rows that go to `experts` experts. dtype: of x.

    wide: a weight takes two lookups, or the layer has the second product of a basis. A `persistent`
    tile supports neither; a `half` tile has registers for it only with a single row tile.
    """
    table = TILES[max((name for name in TILES if card.name.startswith(name)), key=len)]
    fitting = (tile for most, tile in table if most is None or slots <= most * experts)
    if dtype != torch.bfloat16:
        return next(tile for tile in fitting if not tile.half)
    chosen = next(tile for tile in fitting if not (wide and tile.persistent))
    return chosen._replace(height=1) if wide and chosen.half else chosen


@lru_cache
def card_of(device: torch.device) -> Card:
    """Return the card of a CUDA or ROCm device, for other devices the default card."""
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
    """Return the column tiles per step: the most that pad the columns by a tenth or less."""
    steps = (u for u in (4, 2, 1) if u <= most and -(-column_tiles // u) * u <= 1.1 * column_tiles)
    return next(steps, 1)
