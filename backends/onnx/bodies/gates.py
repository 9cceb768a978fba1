"""`moecc.ir.gates` in ONNX operators, in float32.

g and u are the gate rows and the up rows of the first projection, [n, F] each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from onnx_ir import Value

from moecc.backends.onnx.graph import Ops
from moecc.types import Json

Activation: TypeAlias = Callable[[Ops, Value], Value]
# (op, g, u, activation, alpha, limit) -> hidden units [n, F]
Gate: TypeAlias = Callable[[Ops, Value, Value, Activation, float, float], Value]


def gate(op: Ops, rows: Value, attributes: Json) -> Value:
    """Return the hidden units [n, F] of rows [n, 2F], or of rows [n, F] without a gate."""
    act, kind = ACTIVATIONS[attributes["act"]], attributes["gate"]
    if kind == "none":
        return act(op, rows)
    g, u = op.several("Split", 2, rows, axis=-1, num_outputs=2)
    return GATES[kind](op, g, u, act, attributes["alpha"], attributes["limit"])


def _gelu(op: Ops, x: Value) -> Value:
    half = op.Mul(op.number(0.5), op.Add(op.number(1.0), op.Erf(op.Mul(x, op.number(0.5**0.5)))))
    return op.Mul(x, half)


def _gelu_tanh(op: Ops, x: Value) -> Value:
    cube = op.Mul(op.number(0.044715), op.Mul(x, op.Mul(x, x)))
    inner = op.Mul(op.number((2 / 3.141592653589793) ** 0.5), op.Add(x, cube))
    return op.Mul(x, op.Mul(op.number(0.5), op.Add(op.number(1.0), op.Tanh(inner))))


def _relu2(op: Ops, x: Value) -> Value:
    positive = op.Relu(x)
    return op.Mul(positive, positive)


ACTIVATIONS: dict[str, Activation] = {
    "silu": lambda op, x: op.Mul(x, op.Sigmoid(x)),
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": lambda op, x: op.Relu(x),
    "relu2": _relu2,
    "sigmoid": lambda op, x: op.Sigmoid(x),
    "tanh": lambda op, x: op.Tanh(x),
    "identity": lambda op, x: op.Identity(x),
}


def _clamped(op: Ops, g: Value, u: Value, limit: float) -> tuple[Value, Value]:
    high, low = op.number(limit), op.number(-limit)
    return op.Min(g, high), op.Max(op.Min(u, high), low)


def _glu(op: Ops, g: Value, u: Value, act: Activation, alpha: float, limit: float) -> Value:
    return op.Mul(act(op, g), u)


def _clamp(op: Ops, g: Value, u: Value, act: Activation, alpha: float, limit: float) -> Value:
    g, u = _clamped(op, g, u, limit)
    return op.Mul(act(op, g), u)


def _clamp_after(op: Ops, g: Value, u: Value, act: Activation, alpha: float, limit: float) -> Value:
    g, u = _clamped(op, act(op, g), u, limit)
    return op.Mul(g, u)


def _oai(op: Ops, g: Value, u: Value, act: Activation, alpha: float, limit: float) -> Value:
    g, u = _clamped(op, g, u, limit)
    return op.Mul(op.Add(u, op.number(1.0)), op.Mul(g, op.Sigmoid(op.Mul(g, op.number(alpha)))))


def _softcap(op: Ops, g: Value, u: Value, act: Activation, alpha: float, limit: float) -> Value:
    def capped(x: Value, cap: float) -> Value:
        return op.Mul(op.Tanh(op.Div(x, op.number(cap))), op.number(cap))

    return op.Mul(op.Mul(capped(g, alpha), op.Sigmoid(g)), capped(u, limit))


GATES: dict[str, Gate] = {
    "glu": _glu,
    "f32": _glu,
    "clamp": _clamp,
    "clamp_f32": _clamp,
    "clamp_after": _clamp_after,
    "oai": _oai,
    "softcap": _softcap,
}
