"""One MoE layer inside a function: its operands, and what both forms of the function share."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from onnx_ir import Value

from moecc.backends.onnx.bodies.coded import Stack
from moecc.backends.onnx.bodies.structure import ROUTED, Structure
from moecc.backends.onnx.graph import Ops
from moecc.ir import vq4


class Layer:
    """The operands of one experts node. Those that are not codes are float32.

    x [T, D]; index and weight [T, k], the chosen experts and their weights.
    """

    def __init__(self, structure: Structure, inputs: dict[str, Value]):
        self.structure, self.inputs = structure, inputs
        self.x, self.index, self.weight = (inputs[n] for n in ROUTED)
        self.up, self.down = Projection(self, "gate_up"), Projection(self, "down")
        self.post_norm = self.get("post_norm")

    def get(self, name: str) -> Value | None:
        return self.inputs[name] if self.structure.has(name) else None

    def normed(self, op: Ops, y: Value, scale: Value) -> Value:
        """Return y [n, D] times `scale` [D], divided by the root of its mean square."""
        scaled = op.Mul(y, scale)
        mean = op.ReduceMean(op.Mul(scaled, scaled), op.ints(-1), keepdims=1)
        return op.Div(scaled, op.Sqrt(op.Add(mean, op.number(self.structure.attributes["eps"]))))


class Basis(NamedTuple):
    """A basis that all experts of a projection share, and each expert's coefficients in it.

    gate_up: vectors [r, D], coef i8 [E, N, r], scale [E, N].
    down: vectors [r, D], coef i8 [E, r, F], scale [E, r].
    """

    vectors: Value
    coef: Value
    scale: Value


class Projection:
    """gate_up or down: each expert's matrix, coded or dense, and what the experts share."""

    def __init__(self, layer: Layer, part: str):
        self.index = layer.index
        self.dense = layer.inputs.get(part)
        self.coded = None if self.dense is not None else Stack(layer.structure, layer.inputs, part)
        self.bias = layer.get(f"{part}_bias")
        vectors, coef, scale = (layer.get(f"{part}_{n}") for n in ("basis", "coef", "coef_scale"))
        self.basis: Basis | None = None
        if vectors is not None and coef is not None and scale is not None:
            self.basis = Basis(vectors, coef, scale)
        self.mean: Stack | None = None
        if layer.structure.has(f"{part}_{vq4.MEAN}codes"):
            self.mean = Stack(layer.structure, layer.inputs, f"{part}_{vq4.MEAN.rstrip('_')}")

    def plus_mean(self, op: Ops, y: Value, product: Callable[[], Value]) -> Value:
        """Return y [n, N] plus the product with the mean, if the model has one.

        A layer without a mean stores one that has no rows, where others have one: zeros stand in.
        """
        if self.mean is None:
            return y
        x = product()
        if not self.mean.in_all_layers:
            edges = op.ints(0, 0, 0), op.Sub(op.size(y, 1), op.size(x, 1))
            x = op.Pad(x, op.Concat(*edges, axis=0))
        return op.Add(y, x)

    def through_mean(self, op: Ops, x: Value) -> Value:
        """Return x [n, K] through the mean, decoded: [n, N]."""
        assert self.mean is not None
        # The mean is matrix 0 of its stack. If that 0 were a constant, a runtime would fold the
        # decoding into dense weights, so it is computed when the model runs.
        size = op.Size(self.index)
        return op.Mul(self.mean.times(op, x, op.Sub(size, size)), self.mean.scale)
