"""Time a layer with every candidate tile on this card, for `moecc.backends.triton.tiles`.

  python benchmarks/gpu_tiles.py
      all of them, to benchmarks/results/gpu_tiles.md; takes minutes
  python benchmarks/gpu_tiles.py --shapes Mixtral-8x7B --tokens 4096 --bits 2
  TRITON_INTERPRET=1 python benchmarks/gpu_tiles.py --tiny --out DIR
      on the CPU, to see that it works; its times mean nothing

A tile is named and not timed if its result differs from moecc's reference, or if its bits change
over four runs. Kernels are compiled first, in one process per core. Times are taken as in gpu.py: a
layer is one CUDA graph, the L2 cache is cold, times are medians.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from functools import partial
from itertools import product
from pathlib import Path

import _gpu
import gpu
import torch
from _clock import Clock
from _gpu import routed

from moecc.backends.triton import launch
from moecc.backends.triton.abstract import abstract_plan
from moecc.backends.triton.parts import Plan
from moecc.backends.triton.tiles import Card, Tile, card_of

SHOWN = 5  # tiles per case


def candidates(tokens_per_expert: float, bits: int, card: Card) -> list[Tile]:
    """Return every tile worth a try."""
    if tokens_per_expert <= 8:
        ways = product((1, 2, 4), (2, 3, 4), (2, 3, 4, 8), (1, 16, 32))
        return [
            Tile(8, 1, unroll, 4, stages, waves, copies) for unroll, stages, waves, copies in ways
        ]
    fixed = product((16, 32, 64), (1, 2, 4), (2, 3), (1, 16, 32))
    sizes = ((32, 2, 4), (64, 1, 4), (64, 2, 4), (128, 1, 4), (128, 2, 4), (128, 4, 8), (256, 2, 8))
    half = product(sizes, (2, 3), (4, 16, 32))
    persistent = (
        Tile(tokens, 2, 1, 8, stages, 0, copies, half=True, persistent=True)
        for (tokens, most), copies in product(((32, 12), (64, 12), (128, 10), (256, 5)), (8, 16))
        for stages in (most - most // 4, most)
        if bits < 4 and card.name == "sm_90"
    )
    return [
        *(
            Tile(tokens, 1, unroll, 4, stages, 0, copies)
            for tokens, unroll, stages, copies in fixed
        ),
        *(
            Tile(*(tokens, height, 1, warps), stages, 0, copies, half=True)
            for (tokens, height, warps), stages, copies in half
        ),
        *persistent,
    ]


class Case:
    """A layer of one shape, and the tokens routed to it."""

    def __init__(self, name: str, tokens: int, bits: int, device: str):
        shape = (_gpu.TINY if device == "cpu" else _gpu.SHAPES)[name]
        layer = _gpu.layer(shape, bits, device)
        self.title = f"{name}, {tokens} tokens, {bits} bit"
        card = card_of(torch.device(device))
        self.tiles = candidates(tokens * shape.top_k / shape.experts, bits, card)
        self.routed = routed(shape, tokens, device)
        self.packed = layer.packed()
        self.layer = layer
        self.runs = 2 if device == "cpu" else 4

    def plan(self, tile: Tile) -> Plan:
        return launch.plan(*self.routed, *self.packed, None, **_gpu.SILU, tile=tile)

    def run(self, tile: Tile) -> None:
        for each in self.plan(tile).launches:
            each()

    def wrong(self, tile: Tile, wanted: torch.Tensor) -> str:
        """Return what is wrong with a tile's results, empty if nothing is."""
        results = []
        for _ in range(self.runs):
            made = self.plan(tile)
            made.out.fill_(torch.nan)
            for each in made.launches:
                each()
            results.append(made.out)
        error, same = gpu.compare(results, wanted)
        if not error < gpu.WITHIN:
            return f"error {error:.1e} of the largest output"
        return "" if same else "not the same bits each time"


def time_case(case: Case, clock: Clock, tiles: list[Tile]) -> Iterator[tuple[Tile, float | str]]:
    """Yield each tile with its microseconds, or with its fault."""
    wanted = case.layer.reference(case.routed)
    for tile in tiles:
        try:
            fault = case.wrong(tile, wanted)
            yield tile, fault or clock(partial(case.run, tile))[0]
        except Exception as error:  # the tile needs more shared memory than the card has, say
            yield tile, f"{type(error).__name__}: {str(error).partition(chr(10))[0][:80]}"


def plans(cases: list[tuple[str, int, int]]) -> Iterator[Plan]:
    """Yield the abstract plans of all cases and tiles."""
    card = card_of(torch.device("cuda"))
    for name, tokens, bits in cases:
        shape = _gpu.SHAPES[name]
        for tile in candidates(tokens * shape.top_k / shape.experts, bits, card):
            yield abstract_plan(shape, tokens, bits, tile=tile, card=card.name)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shapes", nargs="+", choices=_gpu.SHAPES, default=["Qwen3-30B-A3B", "Mixtral-8x7B"]
    )
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 16, 64, 256, 4096])
    parser.add_argument("--bits", nargs="+", type=int, choices=(2, 3, 4), default=[2, 3])
    parser.add_argument(
        "--tiny", action="store_true", help="sizes for triton's interpreter, on the CPU"
    )
    parser.add_argument("--out", type=Path, default=gpu.RESULTS)
    parser.add_argument(
        "--kernels", nargs=2, type=int, metavar=("PART", "OF"), help=argparse.SUPPRESS
    )
    return parser.parse_args()


def main() -> int:
    told = options()
    if told.tiny:
        cases = list(product(_gpu.TINY, [1, 20], told.bits[:1]))
    else:
        cases = list(product(told.shapes, told.tokens, told.bits))
    if told.kernels:
        _gpu.compile_kernels(plans(cases), *told.kernels)
        return 0
    if not told.tiny:
        _gpu.compile_in_parallel()
    device = "cpu" if told.tiny else "cuda"
    clock = Clock(device, 1 if told.tiny else 15)
    lines = [
        f"# Tiles, {'CPU' if told.tiny else torch.cuda.get_device_name()}",
        "",
        f"`{' '.join(Path(a).name for a in sys.argv)}`",
        "",
    ]
    for name, tokens, bits in cases:
        case = Case(name, tokens, bits, device)
        tiles = case.tiles[::40] if told.tiny else case.tiles
        lines += section(case.title, list(time_case(case, clock, tiles)))
        print(*lines[-SHOWN - 5 :], sep="\n", flush=True)
    told.out.mkdir(parents=True, exist_ok=True)
    (told.out / "gpu_tiles.md").write_text("\n".join(lines).rstrip() + "\n")
    return 0


def section(title: str, found: list[tuple[Tile, float | str]]) -> list[str]:
    """Return the lines of one case: the fastest tiles, then the faulty ones."""
    timed = [(tile, us) for tile, us in found if not isinstance(us, str)]
    faulty = [(tile, fault) for tile, fault in found if isinstance(fault, str)]
    fastest = sorted(timed, key=lambda each: each[1])[:SHOWN]
    lines = [f"## {title}", "", "| microseconds | tile |", "|---|---|"]
    lines += [f"| {us:.1f} | {_written(tile)} |" for tile, us in fastest]
    lines += [f"| {fault} | {_written(tile)} |" for tile, fault in faulty]
    return [*lines, ""]


def _written(tile: Tile) -> str:
    return ", ".join(f"{key} {value}" for key, value in tile._asdict().items() if value)


if __name__ == "__main__":
    raise SystemExit(main())
