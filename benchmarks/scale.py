"""Compile checkpoints with the layer shapes of large models: speed, memory, scratch disk.

    python benchmarks/scale.py qwen3-30b-a3b                    # 8 experts of one layer, kbvq
    python benchmarks/scale.py qwen3-30b-a3b --passes kbvq vsraq,kbvq --experts 16
    python benchmarks/scale.py qwen3-30b-a3b --before CHECKOUT  # beside another checkout of moecc
    python benchmarks/scale.py qwen3-30b-a3b --how 1 2 ray      # workers
    python benchmarks/scale.py qwen3-30b-a3b --experts 128 --how cuda
    python benchmarks/scale.py --predict                        # whole models, on this machine

Every process has one thread, but for one that a GPU computes for. Speed is in millions of
routed-expert weights per second of a core, with what it takes to start; `wall` is the time that
passes, of which `planned` is what `moecc compile` said before it began. Memory is the peak of all
processes together, files that they share counted once; scratch disk is that of OUT.partial.
Times of passes are those that `moecc compile` prints.
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

from moecc.pipeline.order import resolve
from moecc.pipeline.parse import parse_passes
from moecc.pipeline.plan import fitting, needed
from moecc.pipeline.work import Machine

ROOT = Path(__file__).resolve().parent.parent
_PASS = re.compile(r"^(\w+)(?:\{.*?\})?: \d+ nodes.*?([\d.]+) s$", re.M)
_ON_GPU = re.compile(r"([\d.]+ \w+) of the GPU's$", re.M)
_PLAN = re.compile(r"^plan: about (\S+ \S+) on this machine", re.M)
_EVERY = 0.5  # seconds between two looks at memory and scratch disk


@dataclass(frozen=True)
class Measured:
    """One compilation. seconds: of all cores. passes: seconds of each. gpu: peak of its memory."""

    what: str
    weights: int
    seconds: float
    wall: float
    planned: str
    passes: dict[str, float]
    memory: int
    scratch: int
    gpu: str = ""

    @property
    def speed(self) -> float:
        """Millions of weights per second of a core."""
        return self.weights / self.seconds / 1e6


def compiled(
    model: Path, passes: str, code: Path, tokens: tuple[int, int], weights: int, how: Sequence[str]
) -> Measured:
    """Compile `model` with the moecc in `code`; raise SystemExit with what it says if it fails."""
    rows, length = tokens
    with tempfile.TemporaryDirectory(dir=model.parent) as place:
        out, said = Path(place) / "out", Path(place) / "said"
        command = [sys.executable, "-P", "-m", "moecc.cli", "compile", str(model), "-o", str(out)]
        command += ["--passes", passes, "--calib", str(EXAMPLE / "calib.txt"), "--no-progress"]
        command += ["--rows", str(rows), "--length", str(length), *how]
        alone = {"PYTHONPATH": str(code)}
        if "--device" not in how:
            alone |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        with said.open("w") as errors:
            process = subprocess.Popen(
                command, env=os.environ | alone, stdout=subprocess.DEVNULL, stderr=errors
            )
            scratch = memory = 0
            start = time.perf_counter()
            while (done := os.wait4(process.pid, os.WNOHANG))[0] == 0:
                scratch = max(scratch, _size(out.with_name("out.partial")))
                memory = max(memory, _memory(process.pid))
                time.sleep(_EVERY)
        wall = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(done[1])
        text = said.read_text()
        if process.returncode:
            raise SystemExit(text)
    usage = done[2]
    times = {name: float(seconds) for name, seconds in _PASS.findall(text)}
    seconds = usage.ru_utime + usage.ru_stime
    planned, gpu = _PLAN.search(text), _ON_GPU.findall(text)
    return Measured(
        passes,
        weights,
        seconds,
        wall,
        planned[1] if planned else "",
        times,
        memory,
        scratch,
        gpu[-1] if gpu else "",
    )


def _memory(pid: int, *, files: bool = True) -> int:
    """Return the bytes that a process and those that it has started hold; 0 for one that has ended.

    files: count pages of files too. Of those it has started they are its own.
    """
    kinds = ("RssAnon:", "RssShmem:", "RssFile:") if files else ("RssAnon:", "RssShmem:")
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        own = sum(int(line.split()[1]) for line in lines if line.startswith(kinds)) * 1024
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return 0
    return own + sum(_memory(int(child), files=False) for child in children)


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
    """Return a table of runs; `ratio` is the time against the first run of the same passes."""
    lines = [
        "| passes | how | million weights/s | CPU s | wall s | ratio | planned | of passes "
        "| peak GiB | scratch GiB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    first: dict[str, Measured] = {}
    for how, m in rows:
        ratio = first.setdefault(m.what, m).wall / m.wall
        parts = ", ".join(f"{name} {seconds:.0f}" for name, seconds in m.passes.items())
        gpu = f", {m.gpu} of the GPU's" if m.gpu else ""
        sizes = f"{m.memory / 2**30:.2f}{gpu} | {m.scratch / 2**30:.2f}"
        # processes of a cluster are nobody's children
        own = "– | –" if how == "ray" else f"{m.speed:.3f} | {m.seconds:.0f}"
        times = f"{m.wall:.0f} | {ratio:.2f} | {m.planned}"
        lines.append(f"| `{m.what}` | {how} | {own} | {times} | {parts} | {sizes} |")
    return "\n".join(lines)


def predictions(pipelines: Sequence[str]) -> str:
    """Return a table of the hours and the memory that whole models are planned to take."""
    machine = Machine.measured()
    lines = [
        "| model | passes | 1 core | 16 cores | 64 cores | GiB, 1 and 16 cores | scratch GiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, shape in SHAPES.items():
        for text in pipelines:
            passes = resolve(parse_passes(text, bits=2)[0])[0]
            scope = shape.scope(64 * 512, weighted=any(p.weighs_errors for p in passes))
            plans = [fitting(scope, n, n, 1 << 60, *needed(scope, passes)) for n in (1, 16, 64)]
            found = [p.times(machine, passes, p.workers) for p in plans]
            hours = [sum(t for t in times.values() if t) / 3600 for times in found]
            memory = " and ".join(f"{p.memory / 2**30:.0f}" for p in plans[:2])
            cells = " | ".join(f"{h:.1f} h" for h in hours)
            scratch = f"{plans[0].scratch / 2**30:.0f}"
            lines.append(f"| {name} | `{text}` | {cells} | {memory} | {scratch} |")
    return "\n".join(lines)


def _asked(how: str) -> list[str]:
    """Return the options of `moecc compile` for workers, ray or a device."""
    if how == "ray":
        return ["--ray", "local"]
    return ["--workers" if how.isdecimal() else "--device", how]


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
    parser.add_argument("names", nargs="*", metavar="SHAPE", help=", ".join(sorted(SHAPES)))
    parser.add_argument("--passes", nargs="+", default=["kbvq"])
    parser.add_argument("--experts", type=int, default=8, help="of a layer")
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--tokens", type=int, nargs=2, default=(8, 256), metavar=("ROWS", "LENGTH"))
    parser.add_argument("--before", type=Path, help="another checkout, for the ratio")
    parser.add_argument("--how", nargs="+", default=["1"], help="workers, ray, or a device")
    parser.add_argument("--predict", action="store_true", help="whole models by the cost model")
    parser.add_argument("--out", type=Path, help="also write the page there")
    found = parser.parse_args(argv)
    if unknown := [name for name in found.names if name not in SHAPES]:
        parser.error(f"no shape {unknown[0]}; there are {', '.join(sorted(SHAPES))}")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    args = options(argv)
    page = ["# Real layer shapes", f"Made by `python benchmarks/{Path(__file__).name}`."]
    for name in args.names:
        shape = SHAPES[name]
        weights = shape.weights_per_expert * args.experts * args.layers
        with tempfile.TemporaryDirectory() as place:
            model = Path(place) / "model"
            write(shape, model, args.experts, args.layers)
            whose = [("before", args.before, [])] if args.before else []
            for how in args.how:
                label = f"{how} workers" if how.isdecimal() else how
                whose.append((label, ROOT, _asked(how)))
            rows = [
                (label, compiled(model, passes, code, tuple(args.tokens), weights, asked))
                for passes in args.passes
                for label, code, asked in whose
            ]
        page += [title(name, shape, args), table(rows)]
        print("\n\n".join(page[-2:]), flush=True)
    if args.predict:
        page += ["## Whole models, as planned on this machine", predictions(args.passes)]
        print("\n\n".join(page[-2:]), flush=True)
    if args.out:
        args.out.write_text("\n\n".join(page) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
