"""`moecc::VQExperts` and `moecc::Experts` in standard operators: functions in the model file.

A runtime without moecc's op library runs these. They have two forms, and the number of routes
P = T k chooses between them at run time:

  few routes    one by one, by lookup tables: every group of v inputs is multiplied with all 256
                centroids, and codes pick from the products. Nothing is decoded. At 3 bit a table
                has every centroid with each of 16 patterns of signs
  many routes   a loop over the experts that were chosen: by tables where an expert has few
                tokens, else it is decoded and multiplied with them

One function serves all layers of a model. An operand that some layers have and others lack is
stored empty in the latter: it has no rows, and zeros stand in for them. The decoding depends on
the routing, so no runtime folds it into dense weights.

Shapes as in `moecc.ir.ops`; codes and signs in the order of `layout`; scales, biases and bases
float32.

  structure   what a body depends on        coded    a coded matrix times rows
  layer       a layer's operands            gates    activations and gates
  few, many   the two forms
"""

from __future__ import annotations

from collections.abc import Callable

from onnx_ir import Function, Value

from moecc.backends.onnx.bodies.few import few_routes
from moecc.backends.onnx.bodies.gates import gate
from moecc.backends.onnx.bodies.layer import Layer
from moecc.backends.onnx.bodies.many import many_routes
from moecc.backends.onnx.bodies.structure import (
    DENSE,
    ROUTED,
    Presence,
    Structure,
    coded_inputs,
    dense_inputs,
)
from moecc.backends.onnx.graph import FLOAT, Ops, function

__all__ = [
    "DENSE",
    "ROUTED",
    "Presence",
    "Structure",
    "coded_inputs",
    "dense_inputs",
    "experts_function",
    "gate",
    "vq_experts_function",
]

FEW_ROUTES = 16  # with more, several tokens choose an expert, and reading it once pays


def vq_experts_function(structure: Structure, opset: int) -> Function:
    """Return the body of moecc::VQExperts for a model of this structure."""

    def body(op: Ops, layer: Layer) -> Value:
        few = op.LessOrEqual(op.Size(layer.index), op.number(FEW_ROUTES))
        return op.choose(few, lambda op: few_routes(op, layer), lambda op: many_routes(op, layer))

    return _function("VQExperts", coded_inputs(), structure, opset, body)


def experts_function(structure: Structure, opset: int) -> Function:
    """Return the body of moecc::Experts, the experts of a layer that was left dense."""
    return _function("Experts", dense_inputs(), structure, opset, many_routes)


def _function(
    name: str,
    names: list[str],
    structure: Structure,
    opset: int,
    body: Callable[[Ops, Layer], Value],
) -> Function:
    values = {n: Value(name=n) for n in names}
    op = Ops()
    used = dict(values)
    for n in ("x", *DENSE):  # float16 or float32: computed in float32
        if n in used and (n == "x" or structure.has(n)):
            used[n] = op.Cast(values[n], to=FLOAT)
    y = op.CastLike(body(op, Layer(structure, used)), values["x"])
    return function(name, list(values.values()), [y], op, opset, list(structure.attributes))
