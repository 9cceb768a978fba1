"""Compile checkpoints with the layer shapes of large models: speed, memory, scratch disk.

    python benchmarks/scale.py qwen3-30b-a3b                    # 8 experts of one layer, kbvq
    python benchmarks/scale.py qwen3-30b-a3b --passes kbvq vsraq,kbvq --experts 16
    python benchmarks/scale.py qwen3-30b-a3b --before CHECKOUT  # beside another checkout of moecc

A run is a process of one thread. Its speed is in millions of routed-expert weights per second of a
core, with what it takes to start. Memory is the peak of the process; scratch disk is that of
OUT.partial. Times of passes are those that `moecc compile` prints.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from _shapes import EXAMPLE, SHAPES, Shape, write

ROOT = Path(__file__).resolve().parent.parent
_PASS = re.compile(r"^(\w+): \d+ nodes.*?([\d.]+) s$", re.M)
_EVERY = 0.25  # seconds between two looks at the scratch disk


@dataclass(frozen=True)
class Measured:
    """One compilation. seconds: of a core. passes: seconds of each."""

    what: str
    weights: int
    seconds: float
    passes: dict[str, float]
    memory: int
    scratch: int

    @property
    def speed(self) -> float:
        """Millions of weights per second of a core."""
        return self.weights / self.seconds / 1e6


def compiled(
    model: Path, passes: str, code: Path, tokens: tuple[int, int], weights: int
) -> Measured:
    """Compile `model` with the moecc in `code`; raise SystemExit with what it says if it fails."""
    rows, length = tokens
    with tempfile.TemporaryDirectory(dir=model.parent) as place:
        out, said = Path(place) / "out", Path(place) / "said"
        command = [sys.executable, "-P", "-m", "moecc.cli", "compile", str(model), "-o", str(out)]
        command += ["--passes", passes, "--calib", str(EXAMPLE / "calib.txt"), "--no-progress"]
        command += ["--rows", str(rows), "--length", str(length)]
        alone = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": str(code)}
        with said.open("w") as errors:
            process = subprocess.Popen(
                command, env=os.environ | alone, stdout=subprocess.DEVNULL, stderr=errors
            )
            scratch = 0
            while (done := os.wait4(process.pid, os.WNOHANG))[0] == 0:
                scratch = max(scratch, _size(out.with_name("out.partial")))
                time.sleep(_EVERY)
        process.returncode = os.waitstatus_to_exitcode(done[1])
        text = said.read_text()
        if process.returncode:
            raise SystemExit(text)
    usage = done[2]
    times = {name: float(seconds) for name, seconds in _PASS.findall(text)}
    seconds = usage.ru_utime + usage.ru_stime
    return Measured(passes, weights, seconds, times, usage.ru_maxrss * 1024, scratch)


def _size(folder: Path) -> int:
    """Return the bytes of the files in a folder that another process changes."""
    total = 0
    for path, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(path, name)).st_size
            except FileNotFoundError:
                continue
    return total


def table(rows: Sequence[tuple[str, Measured]]) -> str:
    """Return a table of runs; `ratio` is the speed against the same passes of another moecc."""
    lines = [
        "| passes | moecc | million weights/s | ratio | s | of passes | peak GiB | scratch GiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    before = {m.what: m.speed for whose, m in rows if whose == "before"}
    for whose, m in rows:
        ratio = f"{m.speed / before[m.what]:.2f}" if whose == "now" and m.what in before else ""
        parts = ", ".join(f"{name} {seconds:.0f}" for name, seconds in m.passes.items())
        sizes = f"{m.memory / 2**30:.2f} | {m.scratch / 2**30:.2f}"
        speed = f"{m.speed:.3f} | {ratio} | {m.seconds:.0f}"
        lines.append(f"| `{m.what}` | {whose} | {speed} | {parts} | {sizes} |")
    return "\n".join(lines)


def title(name: str, shape: Shape, args: argparse.Namespace) -> str:
    rows, length = args.tokens
    return (
        f"## {name}: {args.experts} of {shape.experts} experts, {args.layers} of {shape.layers} "
        f"layers, {rows} x {length} tokens"
    )


def options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="+", choices=sorted(SHAPES), metavar="SHAPE")
    parser.add_argument("--passes", nargs="+", default=["kbvq"])
    parser.add_argument("--experts", type=int, default=8, help="of a layer")
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--tokens", type=int, nargs=2, default=(8, 256), metavar=("ROWS", "LENGTH"))
    parser.add_argument("--before", type=Path, help="another checkout, for the ratio")
    parser.add_argument("--out", type=Path, help="also write the page there")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = options(argv)
    page = ["# Real layer shapes", f"Made by `python benchmarks/{Path(__file__).name}`."]
    for name in args.names:
        shape = SHAPES[name]
        weights = shape.weights_per_expert * args.experts * args.layers
        with tempfile.TemporaryDirectory() as place:
            model = Path(place) / "model"
            write(shape, model, args.experts, args.layers)
            whose = [("now", ROOT)] + ([("before", args.before)] if args.before else [])
            rows = [
                (label, compiled(model, passes, code, tuple(args.tokens), weights))
                for passes in args.passes
                for label, code in whose
            ]
        page += [title(name, shape, args), table(rows)]
        print("\n\n".join(page[-2:]), flush=True)
    if args.out:
        args.out.write_text("\n\n".join(page) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
