"""Code projections of large models on a GPU: the error beside the CPU's, speed, memory, tiles.

  python benchmarks/gpu_coding.py
      to benchmarks/results/gpu_coding.md; minutes on an H100
  python benchmarks/gpu_coding.py --only speed --shapes mixtral-8x7b --experts 1 --bits 2 3
  python benchmarks/gpu_coding.py --tiny --out DIR
      on the CPU, to see that it works; its times mean nothing

Weights are standard normal, and moments are those of correlated columns of unequal sizes. A
projection is coded as `vq` does, in four rounds, by the kernels and by PyTorch alone.

checks  two experts, 512 rows: the error of a code by the device over that by the CPU, the share of
        codes of the first choice that PyTorch chooses otherwise on the same device, and whether a
        second run gives the same bits. Exit code 1 if the error is 0.5 % larger or bits change.
speed   millions of weights a second, seconds of each part, peak memory
tiles   seconds of a sweep with each shape of a program
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from _shapes import SHAPES
from torch import Tensor

from moecc.ir import vq4
from moecc.passes._code import coding, native, triton_coder
from moecc.passes._code.coded import Coded
from moecc.passes._code.coder import Coder
from moecc.passes._code.coding import encode
from moecc.passes._code.feedback import choose
from moecc.passes._code.metric import damped, weighted_error
from moecc.passes._code.sweep import sweep
from moecc.passes._code.triton_coder import Tile

RESULTS = Path(__file__).resolve().parent / "results"
PARTS = ("kmeans", "choose", "sweep", "refit_codebook", "refit_scale")
TILES = [Tile(rows, step) for rows in (2, 4, 8, 16) for step in (32, 64, 128, 256)]
ROUNDS = 4
Case = tuple[Tensor, Tensor, Tensor | None]


def drawn(experts: int, rows: int, columns: int, device: str, *, coupled: bool) -> Case:
    """Return weights, moments and, if `coupled`, costs of output errors; drawn on the CPU."""
    g = torch.Generator().manual_seed(1)

    def moments(size: int) -> Tensor:
        x = torch.randn(experts, 256, size, generator=g).to(device) * torch.linspace(
            0.3, 2.0, size, device=device
        )
        x += 0.7 * x.roll(1, -1)
        return x.mT @ x / 256 + 0.05 * torch.eye(size, device=device)

    weight = torch.randn(experts, rows, columns, generator=g).to(device)
    return weight, moments(columns), moments(rows).unsqueeze(1) if coupled else None


def coded(case: Case, bits: int) -> Coded:
    return encode(*case, bits=bits, shared=False, seed=0, rounds=ROUNDS)


@contextmanager
def kernels(on: bool) -> Iterator[None]:
    """Let the compiled loops and the kernels code, or PyTorch alone."""
    before = os.environ.pop("MOECC_NATIVE", None)
    os.environ |= {} if on else {"MOECC_NATIVE": "0"}
    native.compiled.cache_clear()
    try:
        yield
    finally:
        os.environ.pop("MOECC_NATIVE", None)
        os.environ |= {} if before is None else {"MOECC_NATIVE": before}
        native.compiled.cache_clear()


def seconds(call: Callable[[], object], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


# ---------------------------------------------------------------- checks


def check(bits: int, coupled: bool, sizes: tuple[int, int], device: str) -> list[object]:
    """Return a row of the table, its last cell "wrong" if something is."""
    here = drawn(2, *sizes, "cpu", coupled=coupled)
    weight, moment, output = here
    there = weight.to(device), moment.to(device), None if output is None else output.to(device)
    found, again = coded(there, bits), coded(there, bits)
    same = torch.equal(found.codes, again.codes) and torch.equal(found.scale, again.scale)
    lost = [
        float(weighted_error(dense - weight, moment, output).sum())
        for dense in (found.dense().cpu(), coded(here, bits).dense())
    ]
    coder, table, scale = start(there, bits)
    first = choose(coder, table, scale).codes
    with kernels(False):
        otherwise = float((first != choose(coder, table, scale).codes).float().mean())
    good = same and lost[0] < 1.005 * lost[1]
    ratio, share = f"{lost[0] / lost[1]:.5f}", f"{100 * otherwise:.3f} %"
    return [bits, "yes" if coupled else "no", ratio, share, same, "" if good else "wrong"]


def start(case: Case, bits: int) -> tuple[Coder, Tensor, Tensor]:
    """Return a coder, a random codebook and scales that bring it to the weights' size."""
    weight, moment, output = case
    moment = damped(moment)
    importance = moment.diagonal(dim1=-2, dim2=-1)
    importance = importance / importance.mean(-1, keepdim=True)
    v, g = vq4.group_size(bits), torch.Generator().manual_seed(2)
    table = (torch.randn(1, 256, v, generator=g) * 40).round().clamp(-127, 127)
    scale = weight.new_full(weight.shape[:2], 0.025)
    output = None if output is None else damped(output, 0.2)
    coder = Coder(weight, moment, importance, bits, feedback=True, output=output)
    return coder, (table.abs() if bits == 3 else table).to(weight.device), scale


# ---------------------------------------------------------------- speed


@contextmanager
def clocked(device: str) -> Iterator[dict[str, float]]:
    """Measure the seconds of each part of `encode`."""
    spent, real = dict.fromkeys(PARTS, 0.0), {name: getattr(coding, name) for name in PARTS}

    def timed(name: str) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            found: list[Any] = []
            spent[name] += seconds(lambda: found.append(real[name](*args, **options)), device)
            return found[0]

        return call

    for name in PARTS:
        setattr(coding, name, timed(name))
    try:
        yield spent
    finally:
        for name in PARTS:
            setattr(coding, name, real[name])


def speed(name: str, case: Case, bits: int, device: str) -> list[object]:
    """Return a row of the table; the second of two runs counts."""
    coded(case, bits)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with clocked(device) as spent:
        whole = seconds(lambda: coded(case, bits), device)
    memory = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0.0
    rest = whole - sum(spent.values())
    parts = [f"{s:.3f}" for s in (*spent.values(), rest)]
    coupled = "no" if case[2] is None else "yes"
    return [name, bits, coupled, f"{case[0].numel() / whole / 1e6:.2f}", *parts, f"{memory:.1f}"]


def tiles(name: str, case: Case, bits: int, device: str) -> list[object]:
    """Return a row of the table: seconds of a sweep with each of TILES, which give the same."""
    coder, table, scale = start(case, bits)
    state, before, times = choose(coder, table, scale), triton_coder.NVIDIA, []
    sweep(coder, state)
    for tile in TILES:
        triton_coder.NVIDIA = triton_coder.AMD = tile
        sweep(coder, state)  # compiles
        times.append(min(seconds(lambda: sweep(coder, state), device) for _ in range(3)))
    triton_coder.NVIDIA = triton_coder.AMD = before
    return [name, bits, "no" if case[2] is None else "yes", *(f"{t:.4f}" for t in times)]


# ---------------------------------------------------------------- tables


def table(title: str, head: list[str], rows: list[list[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return f"## {title}\n\n" + "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def projections(names: list[str], tiny: bool) -> dict[str, tuple[int, int]]:
    """Return rows and columns by name."""
    if tiny:
        return {"tiny": (24, 136)}
    found = {}
    for name in names:
        shape = SHAPES[name]
        found[f"{name} gate_up"] = 2 * shape.intermediate, shape.hidden
        found[f"{name} down"] = shape.hidden, shape.intermediate
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--only", nargs="+", choices=("checks", "speed", "tiles"))
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["qwen3-30b-a3b"])
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--bits", nargs="+", type=int, choices=(2, 3, 4), default=[2, 3, 4])
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    device = "cpu" if options.tiny else "cuda"
    card = "a CPU" if options.tiny else torch.cuda.get_device_name()
    parts = [f"# Coding on a GPU\n\n{card}, torch {torch.__version__}."]
    wanted, wrong = options.only or ["checks", "speed", "tiles"], False
    cases = [(b, coupled) for b in options.bits for coupled in (False, True)]
    if "checks" in wanted:
        sizes = (24, 136) if options.tiny else (512, 1024)
        rows = [check(b, coupled, sizes, device) for b, coupled in cases]
        wrong = any(row[-1] for row in rows)
        head = ["bits", "S", "error / CPU's", "codes chosen otherwise", "same bits", ""]
        parts.append(table("Checks", head, rows))
    experts = 2 if options.tiny else options.experts
    found: dict[str, list[list[object]]] = {"speed": [], "tiles": []}
    for name, sizes in projections(options.shapes, options.tiny).items():
        for coupled in (False, True):
            case = drawn(experts, *sizes, device, coupled=coupled)
            for b in options.bits:
                for what, row in (("speed", speed), ("tiles", tiles)):
                    if what in wanted:
                        found[what].append(row(name, case, b, device))
                        print(*found[what][-1], flush=True)
    head = ["projection", "bits", "S"]
    more = {
        "speed": ["Mw/s", *(f"{p}, s" for p in (*PARTS, "rest")), "memory, GiB"],
        "tiles": [f"{t.rows} x {t.step}" for t in TILES],
    }
    titles = {"speed": f"Speed, {experts} experts", "tiles": "Seconds of a sweep, rows x step"}
    parts += [table(titles[what], head + more[what], rows) for what, rows in found.items() if rows]
    text = "\n\n".join(parts) + "\n"
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "gpu_coding.md").write_text(text, encoding="utf-8")
    print(text)
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
