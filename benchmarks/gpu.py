"""moecc's Triton kernels on a GPU: check them, then time one MoE layer and a whole model.

  python benchmarks/gpu.py
      the table, to benchmarks/results/gpu.md, .json and .svg; four minutes on an H100
  python benchmarks/gpu.py --only layers
      the model's rows stay as --out has them, if they are of this card
  python benchmarks/gpu.py --only layers --tokens 4096
      so do the layers of other sizes
  python benchmarks/gpu.py --tokens 1 16 --shapes Mixtral-8x7B --only layers --out DIR
  TRITON_INTERPRET=1 python benchmarks/gpu.py --tiny --out DIR
      on the CPU, to see that it works; its times mean nothing

1. Every layer is compared with moecc's reference, at 2, 3 and 4 bit and with all that a layer can
   have, and must give the same bits when it runs again. Otherwise nothing is timed and the exit
   code is 1.
2. A kernel that reads and writes 4 GB measures memory bandwidth. The roofline of a call is reading
   the bytes of the experts that its tokens chose, once.
3. A layer is its routed experts alone, from tokens and choices to the sum. Each call is a CUDA
   graph; before each the L2 cache is overwritten; times are medians. The others have bfloat16
   weights: transformers' implementations, those of vLLM and gpt-oss (triton_kernels) if they are
   installed, and torch's two grouped products alone, on sorted tokens, without gate and sum: less
   than a layer needs.
4. A model of Qwen3-30B-A3B's sizes with random weights decodes greedily at batch 1 and 16: by
   generate; with the step of a token as a CUDA graph; with --compile the same after torch.compile
   (fullgraph), which takes minutes. For comparison, in bfloat16 by transformers.
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TypeAlias

import _gpu
import torch
from _clock import Clock
from _gpu import Call, Routed, Shape, routed
from _gpu_model import time_model
from _gpu_report import kept, plot, write

from moecc.backends.triton.abstract import abstract_plan
from moecc.backends.triton.parts import Plan
from moecc.backends.triton.tiles import card_of
from moecc.types import Json

RESULTS = Path(__file__).resolve().parent / "results"
WITHIN = 1.2e-2  # of the largest output: a layer rounds x to bfloat16 at its end
Row: TypeAlias = Json


# ---------------------------------------------------------------- checks


CHECKED: tuple[tuple[int, dict[str, int]], ...] = (
    (2, {}),
    (3, {}),
    (4, {}),
    (2, dict(rank=32, mean=3)),
)
BATCHES = (1, 33, 300, 3000)  # each leads to another tile


def small(shape: Shape) -> Shape:
    """Return the shape with few experts."""
    return shape._replace(experts=min(shape.experts, 8), top_k=min(shape.top_k, 4))


def check(shapes: dict[str, Shape], device: str) -> list[Row]:
    """Compare each shape, with few experts, with the reference."""
    rows = []
    for name, shape in shapes.items():
        for bits, optional in CHECKED:
            layer = _gpu.layer(small(shape), bits, device, **optional)
            for tokens in (1, 9) if device == "cpu" else BATCHES:
                r = routed(small(shape), tokens, device)
                call, wanted = layer.call(r), layer.reference(r)
                error, same = compare([call() for _ in range(2 if device == "cpu" else 11)], wanted)
                rows.append(
                    dict(shape=name, bits=bits, **optional, tokens=tokens, error=error, same=same)
                )
    return rows


def plans(shapes: dict[str, Shape], tokens: list[int], bits: list[int]) -> Iterator[Plan]:
    """Yield abstract plans of all layers that are checked and timed, the largest first."""
    card = card_of(torch.device("cuda")).name
    for shape in shapes.values():
        for t, b in ((t, b) for t in sorted(tokens, reverse=True) for b in bits):
            yield abstract_plan(shape, t, b, card=card)
        for t, (b, optional) in ((t, each) for t in reversed(BATCHES) for each in CHECKED):
            yield abstract_plan(small(shape), t, b, card=card, **optional)


def compare(results: list[torch.Tensor], wanted: torch.Tensor) -> tuple[float, bool]:
    """Return the error relative to the largest output, and whether all results are equal."""
    error = float((results[0].float() - wanted).abs().max() / wanted.abs().max())
    return error, all(torch.equal(other, results[0]) for other in results[1:])


# ---------------------------------------------------------------- layers


def time_layers(
    shapes: dict[str, Shape], tokens: list[int], bits: list[int], clock: Clock, bandwidth: float
) -> Iterator[Row]:
    """Yield a row per shape, number of tokens and implementation."""
    for name, shape in shapes.items():
        batches = {t: routed(shape, t, clock.device) for t in tokens}
        weights = _gpu.dense_weights(shape, clock.device)
        for r in batches.values():
            for other, call in _gpu.others(shape, weights, r).items():
                yield _row(name, r, other, call, clock, shape.weights * 2, bandwidth)
        del weights
        for b in bits:
            layer = _gpu.layer(shape, b, clock.device)
            for r in batches.values():
                each, what = layer.expert_bytes, f"moecc {b} bit"
                yield _row(name, r, what, layer.call(r), clock, each, bandwidth)
            del layer
        if clock.device == "cuda":
            torch.cuda.empty_cache()


def _row(
    shape: str, r: Routed, what: str, call: Call, clock: Clock, each: int, bandwidth: float
) -> Row:
    """Time one call. each: bytes of one expert; bandwidth: bytes per second."""
    row: Row = dict(shape=shape, tokens=len(r.x), what=what, active=r.active)
    try:
        row["us"], row["graph"] = clock(call)
        row["roofline"] = r.active * each / bandwidth * 1e6 / row["us"]
    except Exception as error:  # another package's kernel may not support a card or a size
        if what.startswith("moecc"):
            raise
        line = str(error).splitlines()[0] if str(error) else ""
        row["error"] = f"{type(error).__name__}: {line}"[:120]
    print(f"{shape} {row['tokens']} tokens, {what}: {row.get('us', row.get('error'))}", flush=True)
    return row


# ---------------------------------------------------------------- the command


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", choices=_gpu.SHAPES, default=list(_gpu.SHAPES))
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 4, 16, 64, 256, 4096])
    parser.add_argument("--bits", nargs="+", type=int, choices=(2, 3, 4), default=[2, 3])
    parser.add_argument(
        "--only",
        choices=("layers", "model"),
        help="the other part stays as --out has it, if it is of this card",
    )
    parser.add_argument("--compile", action="store_true", help="the model with torch.compile, too")
    parser.add_argument(
        "--tiny", action="store_true", help="sizes for triton's interpreter, on the CPU"
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument(
        "--kernels", nargs=2, type=int, metavar=("PART", "OF"), help=argparse.SUPPRESS
    )
    return parser.parse_args()


def measure_model(told: argparse.Namespace, clock: Clock, found: Json) -> None:
    """Time the model and write each row at once: the next may take minutes."""
    tiny = told.tiny
    found["model_shape"] = "tiny" if tiny else "Qwen3-30B-A3B"
    shape = _gpu.TINY["tiny"] if tiny else _gpu.SHAPES["Qwen3-30B-A3B"]
    for bits in (16, told.bits[0]):
        rows = time_model(
            shape,
            bits,
            clock,
            layers=1 if tiny else 48,
            vocabulary=64 if tiny else 151936,
            new_tokens=1 if tiny else 64,
            batches=(1, 2) if tiny else (1, 16),
            compiled=told.compile,
        )
        for row in rows:
            found["model"].append(row)
            write(found, told.out)
        if clock.device == "cuda":
            torch.cuda.empty_cache()


def measure(
    told: argparse.Namespace, device: str, shapes: dict[str, Shape], checks: list[Row]
) -> None:
    """Time what was asked for and write it to told.out."""
    import triton

    clock = Clock(device, 1 if told.tiny else 30)
    card = platform.processor() or "CPU" if told.tiny else torch.cuda.get_device_name()
    found: Json = dict(
        device=card,
        torch=torch.__version__,
        triton=triton.__version__,
        bandwidth=clock.bandwidth(),
        checks=checks,
        layers=[],
        model=[],
    )
    tokens = [1, 5] if told.tiny else told.tokens
    if told.only:
        sizes = {(name, t) for name in shapes for t in tokens}
        found = kept(found, told.out, told.only, sizes, {f"moecc {b} bit" for b in told.bits})
    told.out.mkdir(parents=True, exist_ok=True)
    if told.only != "layers":  # before the layers: importing vLLM changes settings of torch
        measure_model(told, clock, found)
    if told.only != "model":
        for row in time_layers(shapes, tokens, told.bits, clock, found["bandwidth"]):
            found["layers"].append(row)
            write(found, told.out)
        try:
            plot(found, told.out / "gpu.svg")
        except ImportError:
            print("no plot: pip install matplotlib", file=sys.stderr)


def main() -> int:
    told = options()
    from moecc.backends.triton import require_device
    from moecc.errors import MoeccError

    try:
        require_device()
    except MoeccError as error:
        sys.exit(f"gpu.py: {error}")
    device = "cpu" if told.tiny else "cuda"
    shapes = _gpu.TINY if told.tiny else {name: _gpu.SHAPES[name] for name in told.shapes}
    if told.kernels:
        _gpu.compile_kernels(plans(shapes, told.tokens, told.bits), *told.kernels)
        return 0
    if not told.tiny:
        _gpu.compile_in_parallel()
    checks = check(shapes, device)
    if wrong := [row for row in checks if not row["error"] < WITHIN or not row["same"]]:
        why = "the kernels are wrong on this card; nothing was timed"
        print(*wrong, why, sep="\n", file=sys.stderr)
        return 1
    measure(told, device, shapes, checks)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
