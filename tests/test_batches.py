"""Nodes run on many batches, experts one by one: as batch by batch with all experts at once."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Sequence
from functools import cache

import pytest
import torch
from conftest import tiny_batches, tiny_program
from op_calls import CALLS, D, calls, floats, routed
from pipelines import compiled
from torch import Tensor, fx, nn

from moecc.errors import MoeccError
from moecc.ir import ops
from moecc.ir.graph import run_nodes
from moecc.ir.program import Program, Weight, stage_nodes
from moecc.ir.tensors import Held
from moecc.pipeline import batches
from moecc.pipeline.batches import pull_experts, run_batches, split
from moecc.pipeline.stream import Stream
from moecc.pipeline.workers.base import Alone
from moecc.pipeline.workers.processes import Processes
from moecc.types import Value

EXPERTS = [name for name, (op, _, _) in CALLS.items() if op in ops.MOE_OPS]


@pytest.fixture(params=["apart", "side by side"], autouse=True)
def values_lie(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run each test with values that lie side by side too, as those of large models do."""
    if request.param == "side by side":
        monkeypatch.setattr(batches, "_LARGE_BYTES", 1)
        monkeypatch.setattr(batches, "_TOKENS", 2)
        monkeypatch.setattr(batches, "TOGETHER", 4)


AROUND: dict[str, Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor]] = {
    "values of their own": lambda x, experts: x + experts(2 * x).tanh(),
    "a view": lambda x, experts: x[:1] + experts(x) + x.view(-1, 1, x.shape[1])[:, 0],
    "rows that are written": lambda x, experts: rows_written(2 * x, experts),
    "columns that are written": lambda x, experts: columns_written(2 * x, experts),
    "another type": lambda x, experts: retyped(2 * x, experts),
}


def rows_written(y: Tensor, experts: Callable[[Tensor], Tensor]) -> Tensor:
    first = y.narrow(0, 0, 1)
    found = experts(y)
    first.add_(1)
    return y + found


def columns_written(y: Tensor, experts: Callable[[Tensor], Tensor]) -> Tensor:
    some = y.narrow(1, 2, 3)
    found = experts(y)
    some.mul_(3)
    return y + found


def retyped(y: Tensor, experts: Callable[[Tensor], Tensor]) -> Tensor:
    numbers = y.view(torch.int64)
    found = experts(y)
    return y + found + (numbers & 1)


class Call(nn.Module):
    """One call of an experts op between other ops; its operands are buffers."""

    def __init__(self, name: str, dtype: torch.dtype, around: str):
        super().__init__()
        self.around = AROUND[around]
        self.op, args, self.attributes = calls(dtype)[name]
        self.names: list[str | None] = []
        for i, value in enumerate(args[3:]):
            self.names.append(None if value is None else f"operand{i}")
            if value is not None:
                self.register_buffer(f"operand{i}", value)

    def forward(self, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        operands = [None if n is None else getattr(self, n) for n in self.names]

        def experts(x: Tensor) -> Tensor:
            found: Tensor = self.op(x, index, weight.abs(), *operands, **self.attributes)
            return found

        return self.around(x, experts)


@cache
def program_of(
    name: str, dtype: torch.dtype = torch.float64, around: str = "values of their own"
) -> Program:
    """Return a program of one call of `op_calls`, whose operands are held."""
    module, tokens = Call(name, dtype, around), torch.export.Dim("tokens", min=2, max=64)
    shapes = tuple({0: tokens} for _ in range(3))
    exported = torch.export.export(module, tuple(routed(dtype=dtype)), dynamic_shapes=shapes)
    held = dict(module.named_buffers())
    placeholders = {f"b_{name}": Weight(name) for name in held}
    for node in exported.graph.nodes:
        node.meta.update(path="", layer=0)
        if node.target in ops.MOE_OPS:
            node.meta["path"] = "experts"
    return Program(exported.graph_module, placeholders, Held(held), None, exported, source="call")


def given(*batches: Sequence[Tensor]) -> list[dict[str, Value]]:
    """Return the values of each batch before the first node."""
    return [dict(zip(("x", "index", "weight"), batch, strict=True)) for batch in batches]


def whole(program: Program, values: dict[str, Value]) -> dict[str, Value]:
    """Return the values of all nodes for one batch, each node run with all its operands."""
    weights = {n: program.read(w.name) for n, w in program.weights.items()}
    nodes = [n for n in program.graph.nodes if n.op == "call_function"]
    for _ in run_nodes(nodes, values := dict(values), weights):
        pass
    return values


def run(
    program: Program, values: list[dict[str, Value]], keep: set[str]
) -> list[tuple[str, int, Value]]:
    """Run all nodes on all batches; return the results in the order of the visits."""
    weights = {n: program.read(w.name) for n, w in program.weights.items()}
    nodes = [n for n in program.graph.nodes if n.op == "call_function"]
    seen: list[tuple[str, int, Value]] = []
    run_batches(
        program, nodes, values, weights, keep, lambda n, v, batch: seen.append((n.name, batch, v))
    )
    return seen


def checked(program: Program, values: list[dict[str, Value]], **close: float) -> None:
    """Assert that every node's result is that of each batch run by itself."""
    want = [whole(program, batch) for batch in values]
    last = [n for n in program.graph.nodes if n.op == "call_function"][-1].name
    seen = run(program, values, {last})
    made = [n.name for n in program.graph.nodes if n.op == "call_function"]
    assert sorted((name, batch) for name, batch, _ in seen) == sorted(
        (name, batch) for name in made for batch in range(len(values))
    )
    for name, batch, value in seen:
        other = want[batch][name]
        assert isinstance(value, Tensor) and isinstance(other, Tensor)
        assert value.dtype == other.dtype
        torch.testing.assert_close(value, other, **close)
    for batch, there in enumerate(values):
        torch.testing.assert_close(there[last], want[batch][last], **close)


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_one_by_one_give_what_all_at_once_give(name: str) -> None:
    """For dense and coded ones, with every operand; expert 2 gets no token."""
    g = torch.Generator().manual_seed(0)
    drawn = []
    for tokens in (5, 5, 2, 7):
        x, index, weight = routed(tokens)
        drawn.append((torch.randn(x.shape, generator=g).double(), index, weight))
    checked(program_of(name), given(*drawn), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["experts-all", "klt-all", "vq3-all"])
@pytest.mark.parametrize(
    ("index", "weight"),
    [
        ([[0, 1], [1, 0], [3, 1]], [[0.0, 1.0], [0.5, 0.5], [0.0, 0.0]]),
        ([[2, 2], [2, 2], [0, 0]], [[0.25, 0.5], [1.0, 0.0], [0.5, 0.5]]),
        ([[3, 2, 1, 0]] * 3, [[0.1, 0.2, 0.3, 0.4]] * 3),
        ([[3]] * 3, [[2.0]] * 3),
    ],
    ids=["no-weight", "an-expert-twice", "every-expert", "one-takes-all"],
)
def test_routing_at_its_edges(name: str, index: list[list[int]], weight: list[list[float]]) -> None:
    chosen, weights = torch.tensor(index), torch.tensor(weight).double()
    drawn = ((floats(80 + i, 3, D), chosen, weights) for i in range(2))
    checked(program_of(name), given(*drawn), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["experts", "experts-all"])
def test_gradients_pulled_through_experts_one_by_one_are_those_of_all_at_once(name: str) -> None:
    """A batch goes to one expert alone, twice; expert 2 gets no other token."""
    program = program_of(name)
    node, drawn = program.moe_layers()[0].node, [routed(5), routed(5), routed(2)]
    drawn[1][1] = torch.full_like(drawn[1][1], 2)
    weights = {n: program.read(w.name) for n, w in program.weights.items()}
    grads = [floats(i, *x.shape) for i, (x, _, _) in enumerate(drawn)]
    values = [{n.name: t for n, t in zip(node.args, batch, strict=False)} for batch in drawn]
    found = pull_experts(program, node, values, weights, grads)
    operands = [weights[n.name] if isinstance(n, fx.Node) else None for n in node.args[3:]]
    for (x, index, weight), grad, pulled in zip(drawn, grads, found, strict=True):
        inputs = x.requires_grad_(), weight.requires_grad_()
        y = ops.REFERENCE[node.target](x, index, weight, *operands, **node.kwargs)
        for got, want in zip(pulled, torch.autograd.grad(y, inputs, grad), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


def test_parts_of_a_tuple_stay_with_what_makes_it() -> None:
    """A part that is taken behind the experts is no value of its own there."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    pair = graph.call_function(torch.topk, (x, 2))
    first = graph.call_function(operator.getitem, (pair, 0))
    experts = graph.call_function(ops.EXPERTS, (first,))
    second = graph.call_function(operator.getitem, (pair, 1))
    last = graph.call_function(torch.add, (experts, second))
    nodes = [pair, first, experts, second, last]
    assert split(nodes) == [[pair, first, second], [experts], [last]]
    assert split([experts, pair, first]) == [[experts], [pair, first]] and split([]) == []


@pytest.mark.parametrize("around", AROUND)
def test_values_that_share_numbers_still_do_behind_the_experts(around: str) -> None:
    """An op may write into one of them."""
    program = program_of("experts", around=around)
    last = [n for n in program.graph.nodes if n.op == "call_function"][-1].name
    values = given(routed(5), routed(5), routed(3))
    want = [whole(program, batch)[last] for batch in values]
    run(program, values, {last})
    for there, value in zip(values, want, strict=True):
        torch.testing.assert_close(there[last], value, rtol=1e-9, atol=1e-11)


def test_results_have_the_type_of_the_tokens() -> None:
    """Sums are in float32."""
    for name in ("experts-all", "vq2-all"):
        program = program_of(name, torch.float32)
        half = [[t.bfloat16() if t.is_floating_point() else t for t in routed(n)] for n in (5, 3)]
        values = given(*half)
        want = [whole(program, batch) for batch in values]
        node = program.moe_layers()[0].node.name
        for seen, batch, value in run(program, values, set()):
            if seen == node:
                other = want[batch][node]
                assert isinstance(value, Tensor) and isinstance(other, Tensor)
                assert value.dtype == torch.bfloat16
                torch.testing.assert_close(value, other, rtol=0.01, atol=0.01)


@pytest.mark.parametrize("wrong", [4, -1])
def test_an_index_out_of_range_is_refused_with_its_node(wrong: int) -> None:
    program = program_of("vq2")
    x, index, weight = routed(3)
    index[2, 1] = wrong
    says = (
        rf"^node %{program.moe_layers()[0].node.name} \(moecc\.vq_experts\) in stage 0 failed: "
        r"moecc: expert index outside 0\.\.3$"
    )
    with pytest.raises(MoeccError, match=says):
        run(program, given(routed(3), (x, index, weight)), set())


def test_batches_without_tokens_and_no_batches_are_run_too() -> None:
    program = program_of("experts-all")
    none = [t[:0] for t in routed()]
    checked(program, given(none, routed(3)), rtol=1e-9, atol=1e-11)
    checked(program, given(none), rtol=1e-9, atol=1e-11)
    assert run(program, [], set()) == []


@pytest.mark.parametrize(
    "text",
    ["", "klt{rank=2,mean=3}", "klt{rank=2,mean=off},vq{bits=3,rounds=1}", "dense{group=16}"],
)
def test_a_stage_of_many_batches_equals_each_batch_by_itself(text: str) -> None:
    program = tiny_program("MD")
    if text:
        program = compiled(program, text, batches=tiny_batches()).program
    ids = tiny_batches(3)
    stream = Stream(program, ids)
    want = [{program.user_inputs[0].name: batch} for batch in ids]
    for stage in range(program.layers):
        found = advanced(stream)
        weights = {n: program.read(w.name) for n, w in program.weights.items()}
        for batch, values in enumerate(want):
            for node, value in run_nodes(stage_nodes(program, stage), values, weights):
                got = found.pop((node.name, batch))
                torch.testing.assert_close(got, value, rtol=1e-5, atol=1e-6)
        assert not found


@pytest.mark.parametrize("at_once", [1, 1 << 20])
def test_workers_give_what_one_of_them_gives(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    """Dense experts and coded ones, one in a unit or all."""
    monkeypatch.setattr(batches, "_AT_ONCE", at_once)
    monkeypatch.setattr(batches, "_TOKENS", 2048)  # as in the workers
    monkeypatch.setattr(batches, "TOGETHER", 4096)
    float_model = tiny_program("MD")
    pipeline = "klt{rank=2,mean=3},vq{rounds=1}"
    coded = compiled(float_model.copy(), pipeline, batches=tiny_batches()).program
    with Processes(2, print) as pool:
        for program in (float_model, coded):
            alone, spread, threads = (
                Stream(program, tiny_batches(), workers) for workers in (Alone(), pool, None)
            )
            for _ in range(program.layers):
                want, found, near = map(advanced, (alone, spread, threads))
                assert want.keys() == found.keys() == near.keys()
                for key, value in want.items():
                    if isinstance(value, Tensor):
                        assert torch.equal(value, tensor(found[key])), key
                        torch.testing.assert_close(value, tensor(near[key]))
        node = float_model.moe_layers()[0].node
        rows = (floats(i, 6, width, dtype=torch.float32) for i, width in enumerate((16, 2, 16)))
        x, weight, grad = rows
        index = torch.arange(12).view(6, 2) % 4
        names = [n.name for n in node.args[:3] if isinstance(n, fx.Node)]
        there: list[dict[str, Value]] = [dict(zip(names, (x, index, weight), strict=True))]
        weights = {n: float_model.read(w.name) for n, w in float_model.weights.items()}
        (want,), (pulled,), (near_by,) = (
            pull_experts(float_model, node, there, weights, [grad], workers)
            for workers in (Alone(), pool, None)
        )
        for one, other, third in zip(want, pulled, near_by, strict=True):
            assert torch.equal(one, other)
            torch.testing.assert_close(one, third)


def tensor(value: Value) -> Tensor:
    assert isinstance(value, Tensor)
    return value


def advanced(stream: Stream) -> dict[tuple[str, int], Value]:
    """Take a stream through a stage; return the results by node and batch."""
    found: dict[tuple[str, int], Value] = {}
    stream.advance(lambda node, value, batch: found.update({(node.name, batch): value}))
    return found


def test_an_expert_s_weights_are_read_once_for_all_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of an expert without tokens are not, and no two experts' are in memory together."""
    read: list[tuple[str, list[int] | None]] = []
    alive = weakref.WeakSet[Tensor]()
    reading = Program.read

    def noted(self: Program, name: str, *, experts: Sequence[int] | None = None) -> Tensor:
        found = reading(self, name, experts=experts)
        read.append((name, None if experts is None else list(experts)))
        if experts is not None:
            alive.add(found)
            assert len(alive) <= 2  # gate_up and down
        return found

    program = program_of("experts-all")
    values = given(routed(5), routed(4))
    weights = {n: program.read(w.name) for n, w in program.weights.items()}
    assert isinstance(values[0]["index"], Tensor)
    chosen = sorted({int(e) for e in values[0]["index"].flatten()})
    assert chosen == [0, 1, 3]
    monkeypatch.setattr(Program, "read", noted)
    monkeypatch.setattr(batches, "_AT_ONCE", 1)
    nodes = [n for n in program.graph.nodes if n.op == "call_function"]
    run_batches(program, nodes, values, weights, set(), lambda *seen: None)
    assert read == [(name, [e]) for e in chosen for name in ("operand0", "operand1")]


@pytest.mark.parametrize("keep", [set(), {"add"}])
def test_a_value_is_dropped_after_its_last_use(keep: set[str]) -> None:
    """Values between experts nodes are of all batches, so that none may stay longer."""
    program = tiny_program("MM")
    nodes = [n for n in program.graph.nodes if n.op == "call_function"]
    values: list[dict[str, Value]] = [{program.user_inputs[0].name: b} for b in tiny_batches(3)]
    weights = {n: program.read(w.name) for n, w in program.weights.items()}
    last = {i.name: at for at, n in enumerate(nodes) for i in n.all_input_nodes}
    made: list[tuple[int, int, weakref.ref[Tensor]]] = []  # batch, last use, value
    progress, most = [0, 0, 0], 0

    def visit(node: fx.Node, value: Value, batch: int) -> None:
        nonlocal most
        at = progress[batch] = nodes.index(node)
        there = set(values[batch]) - {node.name}
        assert all(name in keep or last[name] >= at for name in there), node.name
        most = max(most, sum(ref() is not None for b, use, ref in made if use < progress[b]))
        if isinstance(value, Tensor) and node.name not in keep:
            made.append((batch, last.get(node.name, len(nodes)), weakref.ref(value)))

    run_batches(program, nodes, values, weights, keep, visit)
    assert most == 0
    assert all(set(there) == keep | {nodes[-1].name} for there in values)
