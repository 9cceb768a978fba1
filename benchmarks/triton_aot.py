"""Compile the Triton kernels for nine cards, without having any of them.

python benchmarks/triton_aot.py
    registers, shared memory and instructions per weight, to benchmarks/results/triton_aot.md; takes
    a few minutes
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import triton

from moecc.backends.triton.abstract import SHAPES, abstract_plan
from moecc.backends.triton.aot import TARGETS, Row, compile_launch, row, table
from moecc.backends.triton.parts import Launch
from moecc.passes._code.triton_coder import AMD, NVIDIA, abstract

RESULTS = Path(__file__).resolve().parent / "results"
TEXT = """# The Triton kernels, compiled ahead of time

`python benchmarks/triton_aot.py`, triton {version}. {shape}, bfloat16, with the tile that the
table of tiles gives for the card. Nothing here ran on a card. *Instructions per weight* counts
the machine code of the inner loop per weight and lane (NVIDIA alone). Reading at an H100's
bandwidth leaves room for 1.7 of them per 2-bit weight and for 2.6 per 3-bit weight. *Spilled* is
stack in bytes, on AMD registers. The tiles of sm_90 are chosen by time, not by this count; at
4096 tokens it has a kernel of its own (`backends/triton/hopper.py`), which takes every register
and reloads a few once per tile.

{tables}
"""


def rows(
    tokens: int, bits: tuple[int, ...], kernels: tuple[str, ...], shape: str, **optional: int
) -> list[Row]:
    """Compile the named kernels of one layer for every card. optional: as in `abstract_plan`."""
    found = []
    for target in TARGETS.values():
        for b in bits:
            made = abstract_plan(SHAPES[shape], tokens, b, card=target.name, **optional)
            found += [row(made.named(name), target) for name in kernels]
    return found


def coding_rows() -> list[Row]:
    """Compile the steps of coding for every card."""
    found = []
    for target in TARGETS.values():
        for step in ("choose", "sweep"):
            for bits in (2, 3, 4):
                launch = Launch(*abstract(step, bits, AMD if target.backend == "hip" else NVIDIA))
                report = compile_launch(launch, target)
                found.append(Row(target.name, step, bits, report, may_spill=0))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "triton_aot.md")
    parser.add_argument("--shape", choices=SHAPES, default="Mixtral-8x7B")
    options = parser.parse_args()
    parts = {
        "One token": rows(1, (2, 3, 4), ("gate_up", "down"), options.shape),
        "64 tokens": rows(64, (2, 3), ("gate_up",), options.shape),
        "4096 tokens": rows(4096, (2, 3), ("gate_up", "down"), options.shape),
        "One token, what stands around the products": rows(
            1, (2,), ("prepare", "hidden", "combine"), options.shape
        ),
        "One token, with a basis of 32": rows(
            1, (2,), ("gate_up", "down coef"), options.shape, rank=32
        ),
        "Coding 128 columns, in float32": coding_rows(),
    }
    tables = "\n\n".join(f"## {title}\n\n{table(found)}" for title, found in parts.items())
    text = TEXT.format(version=triton.__version__, shape=options.shape, tables=tables)
    options.out.write_text(text)
    print(text)
    every = [r for found in parts.values() for r in found]
    if spilled := [
        f"{r.kernel} at {r.bits} bit on {r.card}" for r in every if r.report.stack > r.may_spill
    ]:
        sys.exit(f"triton_aot.py: registers are spilled in {', '.join(spilled)}")


if __name__ == "__main__":
    main()
