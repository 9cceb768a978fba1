"""One MoE layer in ONNX Runtime: moecc's two forms beside what else there is, in one run.

    python benchmarks/edge.py                       Qwen3-30B-A3B's layer; table to benchmarks/results/edge.md and .json
    python benchmarks/edge.py --shape 1024 768 32 4 --tokens 1 8 --threads 1

  moecc native      moecc::VQExperts with the op library, 2 or 3 bit, a codebook per expert
  moecc portable    the same files without the library: standard operators
  MoE float32       com.microsoft::MoE
  QMoE int4         com.microsoft::QMoE, 4 bit, blocks of 128, int8 activations: its fastest setting here
  all experts       standard operators that compute every expert and weight them, float32

cold: routing is drawn anew for every call, so that the chosen experts' weights come from memory; warm: the same routing again and
again. Milliseconds, medians (least in brackets), each in a process of its own, each thread on a core of its own. The bound is the
time in which this machine reads the bytes of the experts that one token chooses, at the bandwidth that is measured first by
summing a large array.
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
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

ROOT = Path(__file__).resolve().parent.parent
FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
SILU = {"act": "silu", "gate": "glu", "alpha": 1.0, "limit": 0.0, "eps": 0.0}


class Shape(NamedTuple):
    hidden: int
    intermediate: int
    experts: int
    top_k: int


QWEN3_30B = Shape(2048, 768, 128, 8)


# ---------------------------------------------------------------- models


def save(
    path: Path,
    nodes: list[Any],
    inputs: dict[str, tuple[int, list[Any]]],
    weights: dict[str, np.ndarray],
    functions: Any = (),
) -> Path:
    """A model of one layer, its weights beside it."""
    graph = helper.make_graph(
        nodes, "layer", [helper.make_tensor_value_info(n, *t) for n, t in inputs.items()],
        [helper.make_tensor_value_info("y", FLOAT, ["T", inputs["x"][1][1]])],
        [numpy_helper.from_array(w, n) for n, w in weights.items()],
    )  # fmt: skip
    domains = [helper.make_opsetid(d, v) for d, v in (("", 21), ("moecc", 1), ("com.microsoft", 1))]
    model = helper.make_model(graph, opset_imports=domains, ir_version=10)
    model.functions.extend(functions)
    onnx.save(
        model, path, save_as_external_data=True, location=path.name + ".data", size_threshold=1024
    )
    return path


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Weights whose size is right for their last dimension; a million numbers repeated, for drawing gigabytes takes minutes."""
    row = rng.standard_normal((1 << 20,), np.float32) / shape[-1] ** 0.5
    return np.resize(row, shape)


def moecc_layer(path: Path, s: Shape, bits: int = 2) -> Path:
    import onnx_ir as ir

    from moecc.backends.onnx import bodies, layout

    rng, weights = np.random.default_rng(0), {}
    for part, rows, columns in (
        ("gate_up", 2 * s.intermediate, s.hidden),
        ("down", s.hidden, s.intermediate),
    ):
        shape = (s.experts, layout.blocks(columns), layout.blocks(rows), 16, 64)
        weights[f"{part}_codes"] = rng.integers(0, 256, shape, np.uint8)
        weights[f"{part}_codebook"] = rng.integers(
            -127 if bits == 2 else 0, 128, (s.experts, 256, 4), np.int8
        )
        if bits == 3:
            weights[f"{part}_signs"] = rng.integers(0, 256, (*shape[:3], 16, 32), np.uint8)
        weights[f"{part}_scale"] = np.full((s.experts, rows), 1 / (73 * columns**0.5), np.float32)
    presence = {n: bodies.Presence(True, True) for n in weights}
    function = bodies.vq_experts_function(bodies.Structure(SILU, presence, ragged=False), 21)
    names = [n if n in weights or n in bodies.ROUTED else "" for n in bodies.coded_inputs()]
    return save(
        path, [helper.make_node("VQExperts", names, ["y"], domain="moecc", **SILU)], routed(s), weights,
        [ir.serde.serialize_function(function)],
    )  # fmt: skip


def routed(s: Shape) -> dict[str, tuple[int, list[Any]]]:
    return {
        "x": (FLOAT, ["T", s.hidden]),
        "topk_index": (INT64, ["T", s.top_k]),
        "topk_weight": (FLOAT, ["T", s.top_k]),
    }


def scored(s: Shape) -> dict[str, tuple[int, list[Any]]]:
    return {"x": (FLOAT, ["T", s.hidden]), "scores": (FLOAT, ["T", s.experts])}


SWIGLU = {
    "activation_type": "swiglu",
    "swiglu_fusion": 1,
    "activation_alpha": 1.0,
    "activation_beta": 0.0,
}


def moe_layer(path: Path, s: Shape) -> Path:
    rng = np.random.default_rng(0)
    weights = {
        "up": normal(rng, s.experts, 2 * s.intermediate, s.hidden),
        "down": normal(rng, s.experts, s.hidden, s.intermediate),
    }
    node = helper.make_node(
        "MoE", ["x", "scores", "up", "", "down"], ["y"], domain="com.microsoft", k=s.top_k, normalize_routing_weights=1,
        **SWIGLU,
    )  # fmt: skip
    return save(path, [node], scored(s), weights)


def qmoe_layer(path: Path, s: Shape, block: int = 128) -> Path:
    rng = np.random.default_rng(0)

    def packed(rows: int, columns: int) -> np.ndarray:
        return rng.integers(0, 256, (s.experts, rows, columns // 2), np.uint8)

    def scales(rows: int, columns: int) -> np.ndarray:
        return np.full((s.experts, rows, columns // block), 1 / (5 * columns**0.5), np.float32)

    weights = {
        "up": packed(2 * s.intermediate, s.hidden), "up_scale": scales(2 * s.intermediate, s.hidden),
        "down": packed(s.hidden, s.intermediate), "down_scale": scales(s.hidden, s.intermediate),
    }  # fmt: skip
    node = helper.make_node(
        "QMoE", ["x", "scores", "up", "up_scale", "", "down", "down_scale"], ["y"], domain="com.microsoft", k=s.top_k,
        expert_weight_bits=4, block_size=block, accuracy_level=4, normalize_routing_weights=1, **SWIGLU,
    )  # fmt: skip
    return save(path, [node], scored(s), weights)


def all_experts_layer(path: Path, s: Shape) -> Path:
    """Every expert on every token, weighted with zero where it was not chosen."""
    rng = np.random.default_rng(0)
    weights = {
        "up": normal(rng, s.experts, s.hidden, 2 * s.intermediate),
        "down": normal(rng, s.experts, s.intermediate, s.hidden),
        "zero": np.zeros(1, np.float32), "experts": np.array([s.experts], np.int64), "first": np.array([0], np.int64),
        "last": np.array([2], np.int64),
    }  # fmt: skip
    n = helper.make_node
    nodes = [
        n("Shape", ["x"], ["tokens"], start=0, end=1), n("Concat", ["tokens", "experts"], ["full"], axis=0),
        n("Expand", ["zero", "full"], ["none"]), n("ScatterElements", ["none", "topk_index", "topk_weight"], ["w"], axis=1),
        n("Transpose", ["w"], ["w_by_expert"], perm=[1, 0]), n("Unsqueeze", ["w_by_expert", "last"], ["w3"]),
        n("Unsqueeze", ["x", "first"], ["x3"]), n("MatMul", ["x3", "up"], ["rows"]),
        n("Split", ["rows"], ["g", "u"], axis=-1, num_outputs=2), n("Sigmoid", ["g"], ["s"]), n("Mul", ["g", "s"], ["a"]),
        n("Mul", ["a", "u"], ["h"]), n("MatMul", ["h", "down"], ["o"]), n("Mul", ["o", "w3"], ["ow"]),
        n("ReduceSum", ["ow", "first"], ["y"], keepdims=0),
    ]  # fmt: skip
    return save(path, nodes, routed(s), weights)


class Method(NamedTuple):
    build: Callable[[Path, Shape], Path]
    file: str
    native: bool = False
    most_tokens: int = 1 << 20


METHODS = {
    "moecc native": Method(moecc_layer, "vq.onnx", native=True),
    "moecc portable": Method(moecc_layer, "vq.onnx"),
    "moecc native, 3 bit": Method(partial(moecc_layer, bits=3), "vq3.onnx", native=True),
    "moecc portable, 3 bit": Method(partial(moecc_layer, bits=3), "vq3.onnx"),
    "MoE float32": Method(moe_layer, "moe.onnx"),
    "QMoE int4": Method(qmoe_layer, "qmoe.onnx"),
    "all experts float32": Method(all_experts_layer, "all.onnx", most_tokens=64),
}


# ---------------------------------------------------------------- measuring


def feeds(session: Any, s: Shape, tokens: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Random inputs with random routing, alike for both ways in which a layer is told of it."""
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
) -> dict[str, Any]:
    """Cold and warm milliseconds of one method at one size, in this process."""
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
    found: dict[str, Any] = {"load_seconds": load}
    session.run(None, sets[0])
    for kind in ("cold", "warm"):
        took: list[float] = []
        end = time.perf_counter() + seconds
        while len(took) < 5 or time.perf_counter() < end:
            given = sets[len(took) % len(sets) if kind == "cold" else 0]
            start = time.perf_counter()
            session.run(None, given)
            took.append(1e3 * (time.perf_counter() - start))
        found[kind], found[f"{kind}_least"], found[f"{kind}_runs"] = (
            statistics.median(took),
            min(took),
            len(took),
        )
    found["private_bytes"] = private_bytes() - before
    return found


def bandwidth(threads: int) -> float:
    """Bytes per second that this machine reads from memory, the best of several ways to sum a gigabyte, each three times."""
    import torch

    torch.set_num_threads(threads)
    big, best = torch.ones(1 << 28, dtype=torch.float32), 0.0
    for view in (big, big.view(torch.int32), big.view(torch.float64)):
        for reduce in (torch.sum, torch.max) * 3:
            start = time.perf_counter()
            reduce(view)
            best = max(best, big.numel() * 4 / (time.perf_counter() - start))
    return best


def apart(*arguments: Any) -> Any:
    """One measurement in a process of its own."""
    command = [sys.executable, __file__, "--apart", json.dumps(arguments, default=str)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or ["?"])[-1][:160]}
    return json.loads(done.stdout.splitlines()[-1])


def token_bytes(s: Shape) -> int:
    """Codes, codebooks and scales of the experts that one token chooses."""
    weights, rows = 3 * s.hidden * s.intermediate, 2 * s.intermediate + s.hidden
    return s.top_k * (weights // 4 + 2 * 1024 + 4 * rows)


def document(rows: list[dict[str, Any]], s: Shape, speeds: dict[int, float]) -> str:
    head = [
        "# One MoE layer in ONNX Runtime", "",
        f"D {s.hidden}, F {s.intermediate}, {s.experts} experts, {s.top_k} per token. onnxruntime {onnxruntime.__version__}, "
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores. "
        "Made by `python benchmarks/edge.py`; what the columns are is said there.", "",
        "Read bandwidth " + ", ".join(f"{v / 1e9:.1f} GB/s on {t} thread{'s' * (t > 1)}" for t, v in speeds.items())
        + f": {token_bytes(s) / 1e6:.2f} MB of one token's experts at 2 bit take "
        + ", ".join(f"{1e3 * token_bytes(s) / v:.3f} ms" for v in speeds.values()) + ".", "",
        "| method | threads | tokens | cold ms | warm ms | cold, moecc native = 1 | private MB | load s |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    native = {
        (r["threads"], r["tokens"]): r.get("cold") for r in rows if r["method"] == "moecc native"
    }
    for r in rows:
        if "failed" in r:
            head.append(
                f"| {r['method']} | {r['threads']} | {r['tokens']} | could not ({r['failed']}) |"
                + " |" * 4
            )
            continue
        base = native.get((r["threads"], r["tokens"]))
        ratio = f"{r['cold'] / base:.1f}" if base else ""
        head.append(
            f"| {r['method']} | {r['threads']} | {r['tokens']} | {r['cold']:.3f} ({r['cold_least']:.3f}) | "
            f"{r['warm']:.3f} ({r['warm_least']:.3f}) | {ratio} | {r['private_bytes'] / 1e6:.0f} | {r['load_seconds']:.2f} |"
        )
    return "\n".join(head) + "\n"


def main() -> int:
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
    args = parser.parse_args()
    if args.apart:
        what, *told = json.loads(args.apart)
        print(json.dumps({"bandwidth": bandwidth, "layer": time_layer}[what](*told)))
        return 0
    from moecc.backends.onnx import build

    shape, rows = Shape(*args.shape), []
    speeds = {t: apart("bandwidth", t) for t in args.threads}
    with tempfile.TemporaryDirectory() as folder:
        for name in args.methods:
            method = METHODS[name]
            path = Path(folder) / method.file
            if not path.exists():
                method.build(path, shape)
            for threads in args.threads:
                for tokens in args.tokens:
                    if tokens > method.most_tokens:
                        continue
                    library = build.library() if method.native else ""
                    found = apart("layer", path, library, shape, threads, tokens, args.seconds)
                    rows.append({"method": name, "threads": threads, "tokens": tokens, **found})
                    print(rows[-1], file=sys.stderr, flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    kept = {"shape": shape._asdict(), "bandwidth": speeds, "rows": rows}
    args.out.with_suffix(".json").write_text(json.dumps(kept, indent=1) + "\n")
    args.out.with_suffix(".md").write_text(document(rows, shape, speeds))
    print(args.out.with_suffix(".md").read_text())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
