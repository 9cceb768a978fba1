"""The dialect's ops: schema, fake shapes, derivatives, and the eager references against loops in float64."""

from __future__ import annotations

import io
import math
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import slow_vq4 as slow
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck

from moecc.ir import gates, ops

E, D, F = 4, 8, 6  # experts, hidden, intermediate
ATTRIBUTES: dict[str, Any] = dict(act="silu", gate="glu", alpha=1.7, limit=0.8, eps=1e-6)
Call = tuple[Any, list[Any], dict[str, Any]]


# ---- calls of every op


def floats(
    salt: int, *shape: int, dtype: torch.dtype = torch.float64, scale: float = 1.0
) -> Tensor:
    return (torch.from_numpy(slow.uniform(salt, *shape)) * scale).to(dtype)


def whole(
    salt: int, *shape: int, low: int = 0, high: int = 255, dtype: torch.dtype = torch.uint8
) -> Tensor:
    return torch.from_numpy(slow.numbers(salt, *shape) % (high - low + 1) + low).to(dtype)


def routed(tokens: int = 5, top_k: int = 2, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """x, chosen experts and routing weights; expert 2 gets no token."""
    index = whole(2, tokens, top_k, high=E - 2, dtype=torch.int64)
    index = torch.where(index == 2, torch.full_like(index, E - 1), index)
    return [floats(1, tokens, D, dtype=dtype), index, floats(3, tokens, top_k, dtype=dtype)]


def dense(
    *, optional: bool, gate: str = "glu", dtype: torch.dtype = torch.float64
) -> list[Tensor | None]:
    n = gates.rows_per_unit(gate) * F
    extra = [floats(6, E, n, dtype=dtype), floats(7, E, D, dtype=dtype), floats(8, D, dtype=dtype)]
    return [
        floats(4, E, n, D, dtype=dtype), floats(5, E, D, F, dtype=dtype), *(extra if optional else [None] * 3),
    ]  # fmt: skip


def basis(salt: int, coef_shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """basis [r, D], coef i8, coef_scale."""
    rank = coef_shape[2] if coef_shape[1] != 2 else 2
    return [
        floats(salt, rank, D, dtype=dtype), whole(salt + 1, *coef_shape, low=-127, high=127, dtype=torch.int8),
        floats(salt + 2, *coef_shape[:2], dtype=dtype, scale=0.01),
    ]  # fmt: skip


def mean(salt: int, bits: int, rows: int, columns: int, dtype: torch.dtype) -> list[Tensor | None]:
    """codes, signs, codebook and scale of the matrix that all experts share as it is."""
    drawn = slow.draw(salt, experts=1, rows=rows, columns=columns, bits=bits)
    return [cast(drawn[name], dtype) for name in slow.NAMES[:4]]


def cast(value: Any, dtype: torch.dtype) -> Tensor | None:
    """A drawn array as a tensor, floats in `dtype`."""
    t = None if value is None else torch.from_numpy(value)
    return t if t is None or not t.is_floating_point() else t.to(dtype)


def klt(
    *, optional: bool, means: bool | None = None, dtype: torch.dtype = torch.float64
) -> list[Tensor | None]:
    weights = dense(optional=optional, dtype=dtype)
    up, down = (
        (basis(20, (E, 2 * F, 3), dtype), basis(30, (E, 2, F), dtype))
        if optional
        else ([None] * 3, [None] * 3)
    )
    up_mean, down_mean = [None] * 4, [None] * 4
    if optional if means is None else means:
        up_mean, down_mean = mean(25, 3, 2 * F, D, dtype), mean(35, 4, D, F, dtype)
    return [*weights[:2], *up, *up_mean, *down, *down_mean, *weights[2:]]


def vq(
    bits: int, *, optional: bool, means: bool | None = None, shared: bool = False, affine: bool | None = None,
    dtype: torch.dtype = torch.float64,
) -> list[Tensor | None]:  # fmt: skip
    """The operands after the routing; codebooks stay whole numbers of type i8. A mean has other bits than the experts."""
    found: list[Tensor | None] = []
    affine = optional if affine is None else affine
    means = optional if means is None else means
    gate_up, down = slow.draw_layer(
        bits, experts=E, hidden=D, intermediate=F, bits=bits, shared=shared, rank=2 if optional else 0, bias=optional,
        mean={2: 3, 3: 4, 4: 2}[bits] if means else 0,
    )  # fmt: skip
    for p, rows, salt in ((gate_up, 2 * F, 40), (down, D, 50)):
        found += [cast(value, dtype) for value in p.values()]
        found.append(1 + floats(salt, E, rows, dtype=dtype, scale=0.1) if affine else None)
        found.append(floats(salt + 1, E, rows, dtype=dtype, scale=0.1) if affine else None)
    return [*found, floats(8, D, dtype=dtype) if optional else None]


def quantized(bits: int, *, bias: bool, dtype: torch.dtype = torch.float64) -> list[Tensor | None]:
    """x, weight u8 [N, K bits / 8], scale [N, K / 8], zero u8, bias of q_linear with K = 16."""
    return [
        floats(60, 3, 5, 16, dtype=dtype), whole(61, 7, 16 * bits // 8), floats(62, 7, 2, dtype=dtype, scale=0.01),
        whole(63, 7, 2, high=2**bits - 1), floats(64, 7, dtype=dtype) if bias else None,
    ]  # fmt: skip


def calls(dtype: torch.dtype = torch.float64) -> dict[str, Call]:
    """Every op with and without what is optional, and with a mean as all that experts share."""
    found: dict[str, Call] = {}
    for optional in (False, True):
        suffix = "-all" if optional else ""
        r = routed(dtype=dtype)
        found[f"experts{suffix}"] = (
            ops.EXPERTS,
            [*r, *dense(optional=optional, dtype=dtype)],
            ATTRIBUTES,
        )
        found[f"klt{suffix}"] = (
            ops.KLT_EXPERTS,
            [*r, *klt(optional=optional, dtype=dtype)],
            ATTRIBUTES,
        )
        for bits in (2, 3, 4):
            operands = vq(bits, optional=optional, shared=bits == 4, dtype=dtype)
            found[f"vq{bits}{suffix}"] = (ops.VQ_EXPERTS, [*r, *operands], ATTRIBUTES)
        for bits in (4, 8):
            args = quantized(bits, bias=optional, dtype=dtype)
            found[f"q_linear{bits}{suffix}"] = (ops.Q_LINEAR, args, {"bits": bits})
    x, index, _ = r = routed(dtype=dtype)
    found["klt-mean"] = (
        ops.KLT_EXPERTS,
        [*r, *klt(optional=False, means=True, dtype=dtype)],
        ATTRIBUTES,
    )
    found["vq2-mean"] = (
        ops.VQ_EXPERTS,
        [*r, *vq(2, optional=False, means=True, dtype=dtype)],
        ATTRIBUTES,
    )
    weight = floats(70, E, 3, D, dtype=dtype)
    found["expert_linear"] = (torch.ops.moecc.expert_linear.default, [x, index, weight], {})
    per_slot = floats(71, 5, 2, D, dtype=dtype)
    found["expert_linear-slots"] = (
        torch.ops.moecc.expert_linear.default,
        [per_slot, index, weight],
        {},
    )
    return found


CALLS = calls()


# ---- what torch expects of an op


@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name: str) -> None:
    op, args, attributes = calls(torch.float32)[name]
    leaves = [t.detach().requires_grad_() if is_float(t) else t for t in args]
    torch.library.opcheck(op, leaves, attributes)


def is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


@pytest.mark.parametrize("name", CALLS)
def test_gradcheck(name: str) -> None:
    """Derivatives of every float operand, codebooks and coefficients of vq_experts made float among them."""
    op, args, attributes = CALLS[name]
    if op in (ops.VQ_EXPERTS, ops.KLT_EXPERTS):
        args = [t.double() if isinstance(t, Tensor) and t.dtype == torch.int8 else t for t in args]
    places = [i for i, t in enumerate(args) if is_float(t)]

    def call(*values: Tensor) -> Tensor:
        full = list(args)
        for i, value in zip(places, values, strict=True):
            full[i] = value
        result: Tensor = op(*full, **attributes)
        return result

    assert gradcheck(
        call, [args[i].detach().clone().requires_grad_() for i in places], fast_mode=True, atol=1e-6
    )


def test_what_is_not_wanted_gets_no_gradient() -> None:
    op, args, attributes = CALLS["experts-all"]
    args = [t.clone() if isinstance(t, Tensor) else t for t in args]
    args[4].requires_grad_()
    op(*args, **attributes).sum().backward()
    assert args[4].grad is not None and args[0].grad is None and args[3].grad is None


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
    """A hidden unit from its gate row g and up row u, scalar by scalar."""
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


def test_the_plain_formulas_cover_the_whole_set() -> None:
    assert PLAIN.keys() == gates.ACTIVATIONS.keys()


@pytest.mark.parametrize("gate", ["f32", "clamp_f32", "softcap"])
def test_gates_in_float32_round_once(gate: str) -> None:
    rows = floats(9, 3, 8, dtype=torch.bfloat16)
    got = gates.apply_gate(rows, "silu", gate, 1.3, 0.7)
    want = gates.apply_gate(rows.float(), "silu", gate, 1.3, 0.7).bfloat16()
    assert got.dtype == torch.bfloat16 and torch.equal(got, want)


# ---- references against slow loops


def slow_experts(args: list[Any], attributes: dict[str, Any]) -> Tensor:
    """moecc::experts token by token, choice by choice, in float64."""
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


def run_experts(args: list[Any], **changed: Any) -> tuple[Tensor, Tensor]:
    attributes = {**ATTRIBUTES, **changed}
    return ops.EXPERTS(*args, **attributes), slow_experts(args, attributes)


@pytest.mark.parametrize("gate", [*gates.GATES, "none"])
@pytest.mark.parametrize("optional", [False, True])
def test_experts_against_the_loop(gate: str, optional: bool) -> None:
    got, want = run_experts([*routed(), *dense(optional=optional, gate=gate)], gate=gate)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def undone(args: list[Any]) -> list[Any]:
    """The operands of `experts` that a klt_experts call stands for."""
    r, weights, rest = args[:3], [args[3].clone(), args[4].clone()], args[19:]
    for weight, (base, coef, coef_scale, *coded), input_side in zip(
        weights, (args[5:12], args[12:19]), (True, False), strict=True
    ):
        for e in range(E):
            if base is not None:
                low = coef[e].double() * coef_scale[e][:, None]
                weight[e] += low @ base if input_side else base.T @ low
            if coded[0] is not None:
                p = {
                    name: None if t is None else t.numpy()
                    for name, t in zip(slow.NAMES[:4], coded, strict=True)
                }
                weight[e] += (
                    torch.from_numpy(slow.unscaled(p, weight.shape[2])[0]) * coded[3][0][:, None]
                )
    return [*r, *weights, *rest]


@pytest.mark.parametrize("name", ["klt", "klt-mean", "klt-all"])
def test_klt_experts_against_the_loop(name: str) -> None:
    op, args, attributes = calls()[name]
    got = op(*args, **attributes)
    torch.testing.assert_close(got, slow_experts(undone(args), attributes), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_vq_experts_with_slope_and_offset_against_the_loop(bits: int) -> None:
    """slope and offset act on the coded part: the same as a scale and a bias that have taken them up."""
    args = [*routed(), *vq(bits, optional=True)]
    got = ops.VQ_EXPERTS(*args, **ATTRIBUTES)
    weights: list[Tensor] = []
    biases: list[Tensor] = []
    count = len(slow.NAMES)
    for start, columns, input_side in ((3, D, True), (5 + count, F, False)):
        p = dict(zip(slow.NAMES, args[start : start + count], strict=True))
        slope, offset = args[start + count : start + count + 2]
        p["scale"] = p["scale"] * slope
        arrays = {k: None if v is None else v.numpy() for k, v in p.items()}
        weights.append(torch.from_numpy(slow.dense(arrays, columns, input_side=input_side)))
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
                want[i, j, n] = sum(full[n, k] * x[i, j, k] for k in range(16)) + (
                    0 if shift is None else shift[n]
                )
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", ["expert_linear", "expert_linear-slots"])
def test_expert_linear_against_the_loop(name: str) -> None:
    op, (x, index, weight), _ = CALLS[name]
    got = op(x, index, weight)
    for t in range(index.shape[0]):
        for j in range(index.shape[1]):
            row = x[t] if x.dim() == 2 else x[t, j]
            want = [
                sum(weight[index[t, j], n, d] * row[d] for d in range(D))
                for n in range(weight.shape[1])
            ]
            torch.testing.assert_close(got[t, j], torch.stack(want), rtol=1e-12, atol=1e-13)


# ---- routing at its edges

ROUTED = ["experts-all", "klt-all", "vq2-all", "vq3-all", "vq4-all", "expert_linear"]


def with_routing(
    name: str, x: Tensor, index: Tensor, weight: Tensor, dtype: torch.dtype = torch.float64
) -> Tensor:
    op, args, attributes = calls(dtype)[name]
    first = [x, index] if name == "expert_linear" else [x, index, weight]
    result: Tensor = op(*first, *args[len(first) :], **attributes)
    return result


def one_by_one(name: str, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """The same as one call per token and choice, combined here."""
    parts = torch.stack([
        torch.cat([with_routing(name, x[t : t + 1], index[t : t + 1, j : j + 1], weight[t : t + 1, j : j + 1])
                   for j in range(index.shape[1])]) for t in range(len(x))
    ])  # fmt: skip
    return parts.squeeze(2) if name == "expert_linear" else parts.sum(1)


@pytest.mark.parametrize("name", ROUTED)
@pytest.mark.parametrize(
    "index",
    [
        [[0, 1], [1, 0], [3, 1]],
        [[2, 2], [2, 2], [2, 2]],
        [[1, 1], [0, 3], [3, 3]],
        [[0], [3], [0]],
        [[3, 2, 1, 0]] * 3,
    ],
    ids=["empty-expert", "one-takes-all", "duplicates", "k1", "every-expert"],
)
def test_routing_at_its_edges(name: str, index: list[list[int]]) -> None:
    chosen = torch.tensor(index)
    x, weight = floats(80, 3, D), floats(81, *chosen.shape)
    got = with_routing(name, x, chosen, weight)
    torch.testing.assert_close(got, one_by_one(name, x, chosen, weight), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ROUTED)
def test_no_tokens(name: str) -> None:
    x = torch.zeros(0, D, dtype=torch.float64, requires_grad=True)
    index, weight = torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2, dtype=torch.float64)
    got = with_routing(name, x, index, weight)
    assert (
        got.shape == ((0, 2, 3) if name == "expert_linear" else (0, D))
        and got.dtype == torch.float64
    )
    got.sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape


@pytest.mark.parametrize("name", ROUTED)
@pytest.mark.parametrize("wrong", [E, -1])
def test_an_expert_that_is_not_there(name: str, wrong: int) -> None:
    index = torch.tensor([[0, wrong]])
    with pytest.raises(IndexError, match=rf"expert index outside 0\.\.{E - 1}"):
        with_routing(name, floats(80, 1, D), index, floats(81, 1, 2))


@pytest.mark.parametrize("name", ROUTED)
def test_bfloat16_tokens(name: str) -> None:
    """x in bfloat16: the result is too; klt_experts and vq_experts compute in float32 in between."""
    x, index, weight = routed(dtype=torch.bfloat16)
    dtype = torch.bfloat16 if name in ("experts-all", "expert_linear") else torch.float32
    got = with_routing(name, x, index, weight, dtype)
    want = with_routing(name, x.float(), index, weight.float(), torch.float32)
    assert got.dtype == torch.bfloat16
    close = 0.05 if name in ("experts-all", "expert_linear") else 0.01
    torch.testing.assert_close(got.float(), want, rtol=close, atol=close * float(want.abs().max()))


@pytest.mark.parametrize("name", ROUTED)
def test_permuting_experts_changes_nothing(name: str) -> None:
    op, args, attributes = CALLS[name]
    order = torch.tensor([2, 0, 3, 1])
    inverse = torch.argsort(order)
    r = 2 if name == "expert_linear" else 3
    moved = [
        t[order] if isinstance(t, Tensor) and t.dim() > 1 and len(t) == E else t for t in args[r:]
    ]
    got = op(args[0], inverse[args[1]], *args[2:r], *moved, **attributes)
    torch.testing.assert_close(got, op(*args, **attributes), rtol=1e-12, atol=1e-13)


# ---- torch.compile and torch.export


EVERY_OP = ("experts-all", "klt-all", "vq3-all", "q_linear4-all", "expert_linear")


class Calls(nn.Module):
    """One call of each op, its weights as buffers."""

    def __init__(
        self,
        names: tuple[str, ...] = (
            "experts-all",
            "klt-all",
            "vq3-all",
            "q_linear4-all",
            "expert_linear",
        ),
    ):
        super().__init__()
        self.calls = []
        for name in names:
            op, args, attributes = calls(torch.float32)[name]
            start = {"q_linear4-all": 1, "expert_linear": 2}.get(name, 3)
            held = []
            for i, value in enumerate(args[start:]):
                held.append(None if value is None else f"{name.replace('-', '_')}_{i}")
                if value is not None:
                    self.register_buffer(str(held[-1]), value)
            self.calls.append((op, held, attributes, start))

    def forward(self, x: Tensor, index: Tensor, weight: Tensor) -> list[Tensor]:
        found = []
        for op, held, attributes, start in self.calls:
            operands = [None if name is None else getattr(self, name) for name in held]
            first = [torch.cat([x, x], -1)] if start == 1 else [x, index, weight][:start]
            found.append(op(*first, *operands, **attributes))
        return found


def inputs(tokens: int) -> tuple[Tensor, ...]:
    return tuple(routed(tokens, dtype=torch.float32))


def test_every_op_compiles_in_one_graph_forward_and_backward() -> None:
    module = Calls()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (5, 7):
        x, index, weight = inputs(tokens)
        results = []
        for f in (module, compiled):
            leaf = x.clone().requires_grad_()
            y = f(leaf, index, weight)
            torch.stack([t.sum() for t in y]).sum().backward()
            results.append([*y, leaf.grad])
        torch.testing.assert_close(results[1], results[0])


@pytest.mark.skipif(
    shutil.which("c++") is None and shutil.which("g++") is None,
    reason="inductor needs a C++ compiler",
)
def test_inductor_gives_the_same() -> None:
    module = Calls(("experts-all", "vq2-all"))
    with torch.no_grad():
        torch.testing.assert_close(
            torch.compile(module, fullgraph=True)(*inputs(5)), module(*inputs(5))
        )


def test_every_op_is_exported_saved_and_loaded() -> None:
    module, tokens = Calls(), torch.export.Dim("tokens", min=2, max=64)
    shapes = tuple({0: tokens} for _ in range(3))
    exported = torch.export.export(module, inputs(5), dynamic_shapes=(*shapes,))
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for count in (5, 9):
        torch.testing.assert_close(loaded(*inputs(count)), module(*inputs(count)))
