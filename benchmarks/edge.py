"""Time one MoE layer in ONNX Runtime: moecc's two forms beside the alternatives, in one run.

    python benchmarks/edge.py
        Qwen3-30B-A3B's layer; the table to benchmarks/results/edge.md and .json
    python benchmarks/edge.py --shape 1024 768 32 4 --tokens 1 8 --threads 1

  moecc native     moecc::VQExperts with the op library, 2 or 3 bit, a codebook per expert
  moecc portable   the same files without the library: standard operators
  MoE float32      com.microsoft::MoE
  QMoE int4        com.microsoft::QMoE, 4 bit, blocks of 128, int8 activations: its fastest setting
                   here
  all experts      standard operators that compute every expert and weight them, float32

cold: every call draws new routing, so that the weights of the chosen experts come from memory.
warm: the routing stays the same. Figures are milliseconds, medians with the minimum in brackets.
Each is measured in a process of its own, each thread on a core of its own. The bound is the time in
which this machine reads the bytes of the experts that one token chooses. Its read bandwidth is
measured first, by summing a large array.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path

import numpy as np
import onnxruntime
from _edge import METHODS, QWEN3_30B, Shape

from moecc.types import Json

ROOT = Path(__file__).resolve().parent.parent

# ---------------------------------------------------------------- measuring


def feeds(
    session: onnxruntime.InferenceSession, s: Shape, tokens: int, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """Draw inputs with random routing.

    A layer that reads choices and a layer that reads scores get the same routing.
    """
    index = np.stack([rng.permutation(s.experts)[: s.top_k] for _ in range(tokens)]).astype(
        np.int64
    )
    scores = np.full((tokens, s.experts), -30, np.float32)
    np.put_along_axis(scores, index, rng.standard_normal((tokens, s.top_k)).astype(np.float32), 1)
    chosen = np.take_along_axis(scores, index, 1)
    weight = np.exp(chosen) / np.exp(chosen).sum(1, keepdims=True)
    every = {
        "x": rng.standard_normal((tokens, s.hidden), np.float32),
        "topk_index": index,
        "topk_weight": weight,
        "scores": scores,
    }
    return {i.name: every[i.name] for i in session.get_inputs()}


def time_layer(
    path: str, library: str, shape: Sequence[int], threads: int, tokens: int, seconds: float
) -> Json:
    """Measure one method at one size in this process: cold and warm milliseconds, load, memory."""
    from moecc.backends.onnx.run import pin
    from moecc.backends.onnx.speed import private_bytes

    s, options = Shape(*shape), onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    if library:
        options.register_custom_ops_library(library)
    pin(options, threads)
    before, start = private_bytes(), time.perf_counter()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    load, rng = time.perf_counter() - start, np.random.default_rng(1)
    sets = [feeds(session, s, tokens, rng) for _ in range(32)]
    found: Json = {"load_seconds": load}
    session.run(None, sets[0])
    for kind in ("cold", "warm"):
        took: list[float] = []
        end = time.perf_counter() + seconds
        while len(took) < 5 or time.perf_counter() < end:
            given = sets[len(took) % len(sets) if kind == "cold" else 0]
            start = time.perf_counter()
            session.run(None, given)
            took.append(1e3 * (time.perf_counter() - start))
        found[kind] = statistics.median(took)
        found[f"{kind}_least"] = min(took)
        found[f"{kind}_runs"] = len(took)
    found["private_bytes"] = private_bytes() - before
    return found


def bandwidth(threads: int) -> float:
    """Return the bytes per second that this machine reads from memory.

    It is the best of several ways to reduce a gigabyte, each tried three times.
    """
    import torch

    torch.set_num_threads(threads)
    big, best = torch.ones(1 << 28, dtype=torch.float32), 0.0
    for view in (big, big.view(torch.int32), big.view(torch.float64)):
        for reduce in (torch.sum, torch.max) * 3:
            start = time.perf_counter()
            reduce(view)
            best = max(best, big.numel() * 4 / (time.perf_counter() - start))
    return best


def apart(name: str, *arguments: object) -> object:
    """Call one of MEASUREMENTS in a process of its own; a failed process gives {"failed": why}."""
    command = [sys.executable, __file__, "--apart", json.dumps([name, *arguments], default=str)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or ["?"])[-1][:160]}
    return json.loads(done.stdout.splitlines()[-1])


def token_bytes(s: Shape) -> int:
    """Return the bytes of codes, codebooks and scales of the experts that one token chooses."""
    weights, rows = 3 * s.hidden * s.intermediate, 2 * s.intermediate + s.hidden
    return s.top_k * (weights // 4 + 2 * 1024 + 4 * rows)


def document(rows: list[Json], s: Shape, speeds: dict[int, float]) -> str:
    """Return the page as Markdown. speeds: bytes per second by number of threads."""
    rates = [f"{v / 1e9:.1f} GB/s on {t} thread{'s' * (t > 1)}" for t, v in speeds.items()]
    bounds = [f"{1e3 * token_bytes(s) / v:.3f} ms" for v in speeds.values()]
    head = [
        "# One MoE layer in ONNX Runtime",
        "",
        f"D {s.hidden}, F {s.intermediate}, {s.experts} experts, {s.top_k} per token. "
        f"onnxruntime {onnxruntime.__version__}, {platform.processor() or platform.machine()}, "
        f"{os.cpu_count()} cores. "
        "Made by `python benchmarks/edge.py`; what the columns are is said there.",
        "",
        f"Read bandwidth {', '.join(rates)}: {token_bytes(s) / 1e6:.2f} MB of one token's experts "
        f"at 2 bit take {', '.join(bounds)}.",
        "",
        "| method | threads | tokens | cold ms | warm ms | cold, moecc native = 1 | private MB "
        "| load s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    native = {
        (r["threads"], r["tokens"]): r.get("cold") for r in rows if r["method"] == "moecc native"
    }
    for r in rows:
        size = f"| {r['method']} | {r['threads']} | {r['tokens']} |"
        if "failed" in r:
            head.append(f"{size} could not ({r['failed']}) |" + " |" * 4)
            continue
        base = native.get((r["threads"], r["tokens"]))
        ratio = f"{r['cold'] / base:.1f}" if base else ""
        head.append(
            f"{size} {r['cold']:.3f} ({r['cold_least']:.3f}) | "
            f"{r['warm']:.3f} ({r['warm_least']:.3f}) | {ratio} | "
            f"{r['private_bytes'] / 1e6:.0f} | {r['load_seconds']:.2f} |"
        )
    return "\n".join(head) + "\n"


MEASUREMENTS: dict[str, Callable[..., object]] = {"bandwidth": bandwidth, "layer": time_layer}


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--shape", type=int, nargs=4, default=QWEN3_30B, metavar=("D", "F", "E", "K")
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 2, 8, 64, 512])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--seconds", type=float, default=1.5, help="of each figure (default: 1.5)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "edge")
    parser.add_argument("--apart", help=argparse.SUPPRESS)
    return parser.parse_args()


def measure(args: argparse.Namespace, shape: Shape) -> list[Json]:
    """Return a row per method, number of threads and number of tokens."""
    from moecc.backends.onnx import build

    rows: list[Json] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in args.methods:
            method = METHODS[name]
            path = Path(folder) / method.file
            if not path.exists():
                method.build(path, shape)
            library = build.library() if method.native else ""
            for threads, tokens in product(args.threads, args.tokens):
                if tokens > method.most_tokens:
                    continue
                found = apart("layer", path, library, shape, threads, tokens, args.seconds)
                assert isinstance(found, dict)
                rows.append({"method": name, "threads": threads, "tokens": tokens, **found})
                print(rows[-1], file=sys.stderr, flush=True)
    return rows


def main() -> int:
    args = options()
    if args.apart:
        what, *told = json.loads(args.apart)
        print(json.dumps(MEASUREMENTS[what](*told)))
        return 0
    shape = Shape(*args.shape)
    speeds = {t: apart("bandwidth", t) for t in args.threads}
    if failed := next((s["failed"] for s in speeds.values() if isinstance(s, dict)), None):
        raise SystemExit(f"the read bandwidth can't be measured: {failed}")
    rows = measure(args, shape)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    kept = {"shape": shape._asdict(), "bandwidth": speeds, "rows": rows}
    args.out.with_suffix(".json").write_text(json.dumps(kept, indent=1) + "\n")
    args.out.with_suffix(".md").write_text(document(rows, shape, speeds))
    print(args.out.with_suffix(".md").read_text())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
