"""The eager references of the ops against loops in float64, and every gate against its formula."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import slow_vq4 as slow
import torch
from op_calls import (
    ATTRIBUTES,
    CALLS,
    D,
    E,
    F,
    calls,
    dense,
    floats,
    is_float,
    quantized,
    routed,
    vq,
)
from torch import Tensor

from moecc.ir import gates, ops

# ---- activations and gates against plain formulas

PLAIN: dict[str, Callable[[float], float]] = {
    "silu": lambda x: x / (1 + math.exp(-x)),
    "gelu": lambda x: x * 0.5 * (1 + math.erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: (
        0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    ),
    "relu": lambda x: max(x, 0.0),
    "relu2": lambda x: max(x, 0.0) ** 2,
    "sigmoid": lambda x: 1 / (1 + math.exp(-x)),
    "tanh": math.tanh,
    "identity": lambda x: x,
}


def clip(x: float, limit: float) -> float:
    return max(-limit, min(x, limit))


def plain_gate(gate: str, act: str, g: float, u: float, alpha: float, limit: float) -> float:
    """Compute a hidden unit from its gate row g and up row u, scalar by scalar."""
    f = PLAIN[act]
    match gate:
        case "glu" | "f32":
            return f(g) * u
        case "clamp" | "clamp_f32":
            return f(min(g, limit)) * clip(u, limit)
        case "clamp_after":
            return min(f(g), limit) * clip(u, limit)
        case "oai":
            g, u = min(g, limit), clip(u, limit)
            return (u + 1) * g / (1 + math.exp(-alpha * g))
        case "softcap":
            return alpha * math.tanh(g / alpha) / (1 + math.exp(-g)) * limit * math.tanh(u / limit)
    raise AssertionError(f"no plain formula for gate {gate}")


@pytest.mark.parametrize("gate", [*gates.GATES, "none"])
@pytest.mark.parametrize("act", gates.ACTIVATIONS)
def test_every_activation_and_gate_against_its_formula(act: str, gate: str) -> None:
    alpha, limit = 1.3, 0.7
    rows = floats(9, 3, 8, scale=2.0)
    got = gates.apply_gate(rows, act, gate, alpha, limit)
    if gate == "none":
        want = [[PLAIN[act](x) for x in row] for row in rows.tolist()]
    else:
        want = [
            [plain_gate(gate, act, row[i], row[4 + i], alpha, limit) for i in range(4)]
            for row in rows.tolist()
        ]
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_every_activation_has_a_plain_formula() -> None:
    assert PLAIN.keys() == gates.ACTIVATIONS.keys()


@pytest.mark.parametrize("gate", ["f32", "clamp_f32", "softcap"])
def test_gates_in_float32_round_once(gate: str) -> None:
    rows = floats(9, 3, 8, dtype=torch.bfloat16)
    got = gates.apply_gate(rows, "silu", gate, 1.3, 0.7)
    want = gates.apply_gate(rows.float(), "silu", gate, 1.3, 0.7).bfloat16()
    assert got.dtype == torch.bfloat16 and torch.equal(got, want)


# ---- references against slow loops


def slow_experts(args: list[Any], attributes: dict[str, Any]) -> Tensor:
    """Compute moecc::experts token by token, choice by choice, in float64."""
    x, index, weight, gate_up, down, gate_up_bias, down_bias, post_norm = [
        t.double() if is_float(t) else t for t in args
    ]
    out = torch.zeros_like(x)
    for t in range(len(x)):
        for j, e in enumerate(index[t].tolist()):
            hidden = slow_gate(slow_linear(gate_up[e], x[t].tolist(), gate_up_bias, e), attributes)
            y = torch.tensor(slow_linear(down[e], hidden, down_bias, e), dtype=torch.float64)
            if post_norm is not None:
                y = y * post_norm
                y = y / math.sqrt(float((y**2).mean()) + attributes["eps"])
            out[t] += weight[t, j] * y
    return out


def slow_linear(weight: Tensor, x: list[float], bias: Tensor | None, e: int) -> list[float]:
    rows = [sum(a * b for a, b in zip(row, x, strict=True)) for row in weight.tolist()]
    return rows if bias is None else [r + b for r, b in zip(rows, bias[e].tolist(), strict=True)]


def slow_gate(rows: list[float], attributes: dict[str, Any]) -> list[float]:
    act, gate, alpha, limit = (attributes[k] for k in ("act", "gate", "alpha", "limit"))
    if gate == "none":
        return [PLAIN[act](r) for r in rows]
    half = len(rows) // 2
    return [plain_gate(gate, act, rows[i], rows[half + i], alpha, limit) for i in range(half)]


@pytest.mark.parametrize("gate", [*gates.GATES, "none"])
@pytest.mark.parametrize("optional", [False, True])
def test_experts_against_the_loop(gate: str, optional: bool) -> None:
    args, attributes = (
        [*routed(), *dense(optional=optional, gate=gate)],
        {**ATTRIBUTES, "gate": gate},
    )
    got, want = ops.EXPERTS(*args, **attributes), slow_experts(args, attributes)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_experts_compute_in_the_type_of_their_weights() -> None:
    args = [*routed(), *dense(optional=True)]
    args[0] = args[0].bfloat16()
    got, want = ops.EXPERTS(*args, **ATTRIBUTES), slow_experts(args, ATTRIBUTES)
    assert got.dtype == torch.bfloat16 and torch.equal(got, want.bfloat16())


def undone(args: list[Any]) -> list[Any]:
    """Return the arguments of `experts` that equal those of a klt_experts call."""
    r, weights, rest = args[:3], [args[3].clone(), args[4].clone()], args[19:]
    for weight, (base, coef, coef_scale, *coded), input_side in zip(
        weights, (args[5:12], args[12:19]), (True, False), strict=True
    ):
        for e in range(E):
            if base is not None:
                low = coef[e].double() * coef_scale[e][:, None]
                weight[e] += low @ base if input_side else base.T @ low
            if coded[0] is not None:
                p = slow.arrays(dict(zip(slow.CODED, coded, strict=True)))
                own = torch.from_numpy(slow.unscaled(p, weight.shape[2])[0])
                weight[e] += own * coded[3][0][:, None]
    return [*r, *weights, *rest]


@pytest.mark.parametrize("name", ["klt", "klt-mean", "klt-all"])
def test_klt_experts_against_the_loop(name: str) -> None:
    op, args, attributes = calls()[name]
    got = op(*args, **attributes)
    torch.testing.assert_close(got, slow_experts(undone(args), attributes), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_vq_experts_with_slope_and_offset_against_the_loop(bits: int) -> None:
    """slope and offset act on the coded part, so a scale and a bias can take them up."""
    args = [*routed(), *vq(bits, optional=True)]
    got = ops.VQ_EXPERTS(*args, **ATTRIBUTES)
    weights: list[Tensor] = []
    biases: list[Tensor] = []
    count = len(slow.NAMES)
    for start, columns, input_side in ((3, D, True), (5 + count, F, False)):
        p = dict(zip(slow.NAMES, args[start : start + count], strict=True))
        slope, offset = args[start + count : start + count + 2]
        p["scale"] = p["scale"] * slope
        weights.append(torch.from_numpy(slow.dense(slow.arrays(p), columns, input_side=input_side)))
        biases.append(p["bias"] + offset)
    want = slow_experts([*args[:3], *weights, *biases, args[-1]], ATTRIBUTES)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("bias", [False, True])
def test_q_linear_against_the_loop(bits: int, bias: bool) -> None:
    x, weight, scale, zero, shift = quantized(bits, bias=bias)
    assert x is not None and weight is not None and scale is not None and zero is not None
    got = ops.Q_LINEAR(x, weight, scale, zero, shift, bits=bits)
    full = torch.zeros(7, 16, dtype=torch.float64)
    for n in range(7):
        for k in range(16):
            if bits == 8:
                q = int(weight[n, k])
            else:
                byte = int(weight[n, k // 2])
                q = byte % 16 if k % 2 == 0 else byte // 16
            full[n, k] = (q - int(zero[n, k // 8])) * float(scale[n, k // 8])
    want = torch.zeros(3, 5, 7, dtype=torch.float64)
    for i in range(3):
        for j in range(5):
            for n in range(7):
                product = sum(full[n, k] * x[i, j, k] for k in range(16))
                want[i, j, n] = product + (0 if shift is None else shift[n])
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", ["expert_linear", "expert_linear-slots"])
def test_expert_linear_against_the_loop(name: str) -> None:
    op, (x, index, weight), _ = CALLS[name]
    got = op(x, index, weight)
    for t in range(index.shape[0]):
        for j in range(index.shape[1]):
            row = x[t] if x.dim() == 2 else x[t, j]
            expert = weight[index[t, j]]
            want = [sum(expert[n, d] * row[d] for d in range(D)) for n in range(len(expert))]
            torch.testing.assert_close(got[t, j], torch.stack(want), rtol=1e-12, atol=1e-13)
