"""The ops of moecc's dialect: schema, fake shapes, derivatives, routing, torch.compile, export."""

from __future__ import annotations

import io
import shutil

import pytest
import torch
from op_calls import CALLS, D, E, calls, floats, is_float, routed
from torch import Tensor, nn
from torch.autograd import gradcheck

from moecc.ir import ops

# ---- what torch expects of an op


@pytest.mark.parametrize("name", CALLS)
def test_ops_pass_the_checks_of_torch(name: str) -> None:
    op, args, attributes = calls(torch.float32)[name]
    leaves = [t.detach().requires_grad_() if is_float(t) else t for t in args]
    torch.library.opcheck(op, leaves, attributes)


@pytest.mark.parametrize("name", CALLS)
def test_derivatives_equal_finite_differences(name: str) -> None:
    """Check every float operand; codebooks and coefficients are made float for it."""
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

    leaves = [args[i].detach().clone().requires_grad_() for i in places]
    assert gradcheck(call, leaves, fast_mode=True, atol=1e-6)


def test_an_operand_that_needs_no_gradient_gets_none() -> None:
    op, args, attributes = CALLS["experts-all"]
    args = [t.clone() if isinstance(t, Tensor) else t for t in args]
    args[4].requires_grad_()
    op(*args, **attributes).sum().backward()
    assert args[4].grad is not None and args[0].grad is None and args[3].grad is None


# ---- routing at its edges

ROUTED = ["experts-all", "klt-all", "vq2-all", "vq3-all", "vq4-all", "expert_linear"]


def with_routing(
    name: str, x: Tensor, index: Tensor, weight: Tensor, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Call an op of ROUTED with other tokens and routing."""
    op, args, attributes = calls(dtype)[name]
    first = [x, index] if name == "expert_linear" else [x, index, weight]
    result: Tensor = op(*first, *args[len(first) :], **attributes)
    return result


def one_by_one(name: str, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """Make one call per token and choice; combine the results here."""

    def call(t: int, j: int) -> Tensor:
        slot = slice(t, t + 1), slice(j, j + 1)
        return with_routing(name, x[t : t + 1], index[slot], weight[slot])

    choices = range(index.shape[1])
    parts = torch.stack([torch.cat([call(t, j) for j in choices]) for t in range(len(x))])
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
def test_routing_at_its_edges_equals_one_call_per_choice(name: str, index: list[list[int]]) -> None:
    chosen = torch.tensor(index)
    x, weight = floats(80, 3, D), floats(81, *chosen.shape)
    got = with_routing(name, x, chosen, weight)
    torch.testing.assert_close(got, one_by_one(name, x, chosen, weight), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ROUTED)
def test_no_tokens_give_no_rows_and_a_gradient(name: str) -> None:
    x = torch.zeros(0, D, dtype=torch.float64, requires_grad=True)
    index, weight = torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2, dtype=torch.float64)
    got = with_routing(name, x, index, weight)
    assert got.shape == ((0, 2, 3) if name == "expert_linear" else (0, D))
    assert got.dtype == torch.float64
    got.sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape


@pytest.mark.parametrize("name", ROUTED)
@pytest.mark.parametrize("wrong", [E, -1])
def test_an_expert_index_out_of_range_is_refused(name: str, wrong: int) -> None:
    index = torch.tensor([[0, wrong]])
    with pytest.raises(IndexError, match=rf"expert index outside 0\.\.{E - 1}"):
        with_routing(name, floats(80, 1, D), index, floats(81, 1, 2))


@pytest.mark.parametrize("name", ROUTED)
def test_bfloat16_tokens_give_bfloat16_results(name: str) -> None:
    """klt_experts and vq_experts compute in float32 in between."""
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
    """One call of each op, with its weights as buffers."""

    def __init__(self, names: tuple[str, ...] = EVERY_OP):
        super().__init__()
        self.calls = []
        for name in names:
            op, args, attributes = calls(torch.float32)[name]
            # operands before `start` are inputs of the module, the others its buffers
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
def test_inductor_gives_the_same_as_eager() -> None:
    module = Calls(("experts-all", "vq2-all"))
    with torch.no_grad():
        compiled = torch.compile(module, fullgraph=True)
        torch.testing.assert_close(compiled(*inputs(5)), module(*inputs(5)))


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
