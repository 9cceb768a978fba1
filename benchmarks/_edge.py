"""One MoE layer as an ONNX model, in every form that edge.py measures.

Shapes: T tokens, D hidden, F intermediate, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
SILU = {"act": "silu", "gate": "glu", "alpha": 1.0, "limit": 0.0, "eps": 0.0}
# name -> (element type, dimensions)
Inputs: TypeAlias = dict[str, tuple[int, list[int | str]]]


class Shape(NamedTuple):
    """The sizes of one layer."""

    hidden: int
    intermediate: int
    experts: int
    top_k: int


QWEN3_30B = Shape(2048, 768, 128, 8)


def save(
    path: Path,
    nodes: list[onnx.NodeProto],
    inputs: Inputs,
    weights: dict[str, np.ndarray],
    functions: Sequence[onnx.FunctionProto] = (),
) -> Path:
    """Save a model of one layer at `path`, its weights beside it."""
    graph = helper.make_graph(
        nodes,
        "layer",
        [helper.make_tensor_value_info(n, *t) for n, t in inputs.items()],
        [helper.make_tensor_value_info("y", FLOAT, ["T", inputs["x"][1][1]])],
        [numpy_helper.from_array(w, n) for n, w in weights.items()],
    )
    domains = [helper.make_opsetid(d, v) for d, v in (("", 21), ("moecc", 1), ("com.microsoft", 1))]
    model = helper.make_model(graph, opset_imports=domains, ir_version=10)
    model.functions.extend(functions)
    onnx.save(
        model, path, save_as_external_data=True, location=path.name + ".data", size_threshold=1024
    )
    return path


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Return random weights [..., K] of variance 1 / K.

    A million numbers are repeated, because drawing gigabytes takes minutes.
    """
    row = rng.standard_normal((1 << 20,), np.float32) / shape[-1] ** 0.5
    return np.resize(row, shape)


def moecc_layer(path: Path, s: Shape, bits: int = 2) -> Path:
    """moecc::VQExperts with a codebook per expert, at 2 or 3 bit."""
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
        path,
        [helper.make_node("VQExperts", names, ["y"], domain="moecc", **SILU)],
        routed(s),
        weights,
        [ir.serde.serialize_function(function)],
    )


def routed(s: Shape) -> Inputs:
    """The inputs of a layer that is told the chosen experts."""
    return {
        "x": (FLOAT, ["T", s.hidden]),
        "topk_index": (INT64, ["T", s.top_k]),
        "topk_weight": (FLOAT, ["T", s.top_k]),
    }


def scored(s: Shape) -> Inputs:
    """The inputs of a layer that chooses experts by scores."""
    return {"x": (FLOAT, ["T", s.hidden]), "scores": (FLOAT, ["T", s.experts])}


SWIGLU = {
    "activation_type": "swiglu",
    "swiglu_fusion": 1,
    "activation_alpha": 1.0,
    "activation_beta": 0.0,
}


def moe_layer(path: Path, s: Shape) -> Path:
    """com.microsoft::MoE in float32."""
    rng = np.random.default_rng(0)
    weights = {
        "up": normal(rng, s.experts, 2 * s.intermediate, s.hidden),
        "down": normal(rng, s.experts, s.hidden, s.intermediate),
    }
    node = helper.make_node(
        "MoE",
        ["x", "scores", "up", "", "down"],
        ["y"],
        domain="com.microsoft",
        k=s.top_k,
        normalize_routing_weights=1,
        **SWIGLU,
    )
    return save(path, [node], scored(s), weights)


def qmoe_layer(path: Path, s: Shape, block: int = 128) -> Path:
    """com.microsoft::QMoE at 4 bit with int8 activations."""
    rng = np.random.default_rng(0)

    def packed(rows: int, columns: int) -> np.ndarray:
        return rng.integers(0, 256, (s.experts, rows, columns // 2), np.uint8)

    def scales(rows: int, columns: int) -> np.ndarray:
        return np.full((s.experts, rows, columns // block), 1 / (5 * columns**0.5), np.float32)

    weights = {
        "up": packed(2 * s.intermediate, s.hidden),
        "up_scale": scales(2 * s.intermediate, s.hidden),
        "down": packed(s.hidden, s.intermediate),
        "down_scale": scales(s.hidden, s.intermediate),
    }
    node = helper.make_node(
        "QMoE",
        ["x", "scores", "up", "up_scale", "", "down", "down_scale"],
        ["y"],
        domain="com.microsoft",
        k=s.top_k,
        expert_weight_bits=4,
        block_size=block,
        accuracy_level=4,
        normalize_routing_weights=1,
        **SWIGLU,
    )
    return save(path, [node], scored(s), weights)


def all_experts_layer(path: Path, s: Shape) -> Path:
    """Standard operators: every expert on every token, with weight zero unless it is chosen."""
    rng = np.random.default_rng(0)
    weights = {
        "up": normal(rng, s.experts, s.hidden, 2 * s.intermediate),
        "down": normal(rng, s.experts, s.intermediate, s.hidden),
        "zero": np.zeros(1, np.float32),
        "experts": np.array([s.experts], np.int64),
        "first": np.array([0], np.int64),
        "last": np.array([2], np.int64),
    }
    n = helper.make_node
    nodes = [
        n("Shape", ["x"], ["tokens"], start=0, end=1),
        n("Concat", ["tokens", "experts"], ["full"], axis=0),
        n("Expand", ["zero", "full"], ["none"]),
        n("ScatterElements", ["none", "topk_index", "topk_weight"], ["w"], axis=1),
        n("Transpose", ["w"], ["w_by_expert"], perm=[1, 0]),
        n("Unsqueeze", ["w_by_expert", "last"], ["w3"]),
        n("Unsqueeze", ["x", "first"], ["x3"]),
        n("MatMul", ["x3", "up"], ["rows"]),
        n("Split", ["rows"], ["g", "u"], axis=-1, num_outputs=2),
        n("Sigmoid", ["g"], ["s"]),
        n("Mul", ["g", "s"], ["a"]),
        n("Mul", ["a", "u"], ["h"]),
        n("MatMul", ["h", "down"], ["o"]),
        n("Mul", ["o", "w3"], ["ow"]),
        n("ReduceSum", ["ow", "first"], ["y"], keepdims=0),
    ]
    return save(path, nodes, routed(s), weights)


class Method(NamedTuple):
    """One row of the table: how its model is built, and with what it runs."""

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
