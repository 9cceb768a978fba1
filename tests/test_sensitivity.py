"""`sensitivity`, and gradients taken layer by layer, against gradients of the whole graph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pipelines import TOKENS, Tiny, compiled
from torch import Tensor, fx

from moecc.errors import MoeccError
from moecc.ir.graph import run_nodes
from moecc.ir.program import Program, output_node, stage_nodes
from moecc.passes._tune import gradients
from moecc.passes._tune.gradients import Gradients, Held, Measured, Sums
from moecc.passes._tune.routing import selection_scores
from moecc.passes._tune.trained import Trained
from moecc.passes._tune.whole import Whole
from moecc.passes.sensitivity import Combined
from moecc.pipeline.passes import Context, Kept
from moecc.pipeline.stream import StageWeights

pytestmark = pytest.mark.usefixtures("traced_once")


def test_sensitivity_equals_that_of_the_whole_graph(traced: Program) -> None:
    ids = torch.randint(0, 64, (4, 32), generator=torch.Generator().manual_seed(0))
    layered = Gradients(traced, Context()).measure("kl", [ids])
    values: dict[str, Any] = {traced.user_inputs[0].name: ids}
    paths, probes = {m.node.name: m.path for m in traced.moe_layers()}, {}
    with torch.enable_grad():
        nodes = [n for n in traced.graph.nodes if n.op == "call_function"]
        for node, value in run_nodes(nodes, values, StageWeights(traced)):
            if node.name in paths:
                probes[paths[node.name]] = torch.zeros_like(value).requires_grad_()
                values[node.name] = value + probes[paths[node.name]]
        logits = values[output_node(traced).name].flatten(0, 1)
        drawn = torch.Generator().manual_seed(Context().seed_for("sensitivity", "kl", 0, "output"))
        labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=drawn).squeeze(-1)
        loss = F.cross_entropy(logits, labels, reduction="sum")
        grads = torch.autograd.grad(loss, list(probes.values()))
    for path, g in zip(probes, grads, strict=True):
        torch.testing.assert_close(layered[path], g.T @ g / len(g), rtol=1e-3, atol=1e-9)


def test_sensitivity_predicts_the_divergence(traced: Program) -> None:
    """Add noise behind the last experts, where no router can choose other experts for it."""
    ids = torch.randint(0, 64, (16, 32), generator=torch.Generator().manual_seed(0))
    run = compiled(traced, "sensitivity{routing=0}", batches=list(ids.split(1)))
    assert not run.differed["sensitivity"]
    moe, logits = traced.moe_layers()[-1], []
    for noise in (0.0, 0.002):
        values: dict[str, Any] = {traced.user_inputs[0].name: ids}
        nodes = [n for n in traced.graph.nodes if n.op == "call_function"]
        for node, value in run_nodes(nodes, values, StageWeights(traced)):
            if node is moe.node:
                generator = torch.Generator().manual_seed(1)
                values[node.name] = value + noise * torch.randn(value.shape, generator=generator)
        logits.append(values[output_node(traced).name].double().log_softmax(-1))
    # to second order
    moved = (logits[0] - logits[1]).square()
    divergence = float((logits[0].exp() * moved).sum(-1).mean()) / 2
    want = 0.002**2 * float(run.ctx.data["sensitivity"][moe.path].trace()) / 2
    assert divergence == pytest.approx(want, rel=0.1)


def test_watched_values_come_in_the_order_of_the_graph(traced: Program) -> None:
    """Their losses are added in that order; a set's would make the last bits random."""
    names = {n.name for n in traced.graph.nodes if n.op == "call_function"}
    in_order = [[n.name for n in stage_nodes(traced, i)] for i in range(traced.layers)]
    assert Whole(traced, set(), watch=names).watched == in_order


@pytest.mark.parametrize(("kind", "last"), [("routing", 2), ("kl", 4)])
def test_nothing_behind_the_last_loss_runs(
    kind: str, last: int, tiny: Tiny, batches: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Experts are in stages 1 and 2; without a router behind it, a layer's routing has no loss."""
    program = tiny("MMD")
    ran: dict[int, int] = Counter()
    stage_of = {n.name: n.meta["layer"] for n in program.graph.nodes if "layer" in n.meta}

    def noting(nodes: Sequence[fx.Node], *more: Any) -> Any:
        ran[max(stage_of[n.name] for n in nodes)] += 1
        return run_nodes(nodes, *more)

    monkeypatch.setattr("moecc.pipeline.batches.run_nodes", noting)
    monkeypatch.setattr("moecc.passes._tune.gradients.run_nodes", noting)
    Gradients(program, Context()).measure(kind, batches[:1])
    assert set(ran) == set(range(last + 1))


class Shelf:
    """What a run keeps, by key, in the order of keeping."""

    def __init__(self) -> None:
        self.works: dict[str, Kept] = {}
        self.order: list[str] = []

    def keep(self, key: str, work: Kept) -> Kept:
        self.order.append(key)
        self.works[key] = Kept({k: t.clone() for k, t in work.tensors.items()}, work.facts)
        return self.works[key]

    def forget(self, key: str) -> None:
        del self.works[key]

    def context(self) -> Context:
        return Context(keep=self.keep, kept=self.works.get, forget=self.forget)


def test_costs_of_a_layer_are_kept_before_the_backward_reaches_the_next(
    tiny: Tiny, batches: list[Tensor]
) -> None:
    program, shelf = tiny("MM"), Shelf()
    found = Gradients(program, shelf.context()).measure("kl", batches[:2])
    first, second = (m.path for m in program.moe_layers())
    behind_second, behind_first = (n for n in found if n not in (first, second))
    # nothing but a sum is behind the experts
    assert torch.equal(found[first], found[behind_first])
    assert shelf.order == ["sensitivity kl 2", "sensitivity kl 1", "sensitivity kl"]
    assert [len(shelf.works[key].tensors) for key in shelf.order] == [1, 1, 0]
    assert not torch.equal(found[second], found[first])
    assert torch.equal(found[second], found[behind_second])
    for name, cost in found.items():
        assert found.trace(name) == pytest.approx(float(cost.trace()), rel=1e-5)


@pytest.mark.parametrize("same", [True, False])
def test_one_cost_serves_names_whose_gradients_are_the_same(same: bool) -> None:
    sums, drawn = Sums(), torch.Generator().manual_seed(0)
    a, b = ([torch.randn(2, 3, 4, generator=drawn) for _ in range(2)] for _ in "ab")
    sums.add("a", a)
    sums.add("b", a if same else b)
    measured = Measured([sums.kept()])
    for name, found in (("a", a), ("b", a if same else b)):
        g = torch.cat(found).flatten(0, 1)
        torch.testing.assert_close(measured[name], g.T @ g / len(g))
        assert measured.trace(name) == pytest.approx(float((g * g).sum()) / len(g))
    assert len(sums.found) == 2 - same and list(measured) == ["a", "b"]


@pytest.mark.parametrize("most", [0, 1000, 3000, 1 << 30])
@pytest.mark.parametrize("kind", ["kl", "routing"])
def test_values_that_memory_does_not_hold_are_kept_until_the_backward_has_taken_them(
    kind: str, most: int, tiny: Tiny, batches: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dense layer before the experts holds nothing."""
    program, shelf, sizes = tiny("DMM"), Shelf(), list[tuple[int, int]]()
    want = Gradients(program, Context()).measure(kind, batches[:2])
    adding = Held.add

    def noting(self: Held, *args: Any) -> None:
        adding(self, *args)
        on_disk = [w for key, w in shelf.works.items() if "values" in key]
        spilled = sum(t.nbytes for work in on_disk for t in work.tensors.values())
        sizes.append((self.in_memory(), spilled))

    monkeypatch.setattr(Held, "add", noting)
    monkeypatch.setattr(gradients, "IN_MEMORY", most)
    found = Gradients(program, shelf.context()).measure(kind, batches[:2])
    assert all(torch.equal(cost, found[name]) for name, cost in want.items())
    assert not [key for key in shelf.works if "values" in key]
    state = 2 * 6 * 16 * 4  # bytes: of two batches of six tokens
    # before two layers, in front of the last loss, and what experts give
    whole = state * (5 if kind == "kl" else 3)
    assert sizes[-1] == (sizes[-1][0], whole - sizes[-1][0])
    assert all(here <= most for here, _ in sizes) and (sizes[-1][1] > 0) == (most < whole)


def test_costs_that_an_interrupted_run_has_kept_are_not_measured_again(
    tiny: Tiny, batches: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    program, shelf = tiny("MM"), Shelf()
    want = Gradients(program, shelf.context()).once("kl", batches[:2])
    measured: list[str] = []
    measure = Gradients.measure

    def noting(self: Gradients, kind: str, some: list[Tensor]) -> Measured:
        measured.append(kind)
        return measure(self, kind, some)

    monkeypatch.setattr(Gradients, "measure", noting)
    for lost, again in (([], 0), (shelf.order[:1], 1), ([], 1)):
        for key in lost:  # its file is damaged
            del shelf.works[key]
        found = Gradients(program, shelf.context()).once("kl", batches[:2])
        assert len(measured) == again and list(found) == list(want)
        assert all(torch.equal(cost, want[name]) for name, cost in found.items())


def test_experts_are_read_one_at_a_time_forward_and_backward(
    tiny: Tiny, batches: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tiny("MM")
    read, reading = Counter[tuple[str, tuple[int, ...]]](), program.read

    def noting(name: str, *, experts: Sequence[int] | None = None) -> Tensor:
        read[name, tuple(experts or ())] += 1
        return reading(name, experts=experts)

    monkeypatch.setattr(program, "read", noting)
    Gradients(program, Context()).measure("kl", batches[:4])
    one_by_one = {
        (f"layers.{layer}.{name}", (e,)): 1 + layer  # no gradient enters the first layer
        for layer in range(2)
        for name in ("gate_up", "down")
        for e in range(program.moe_layers()[0].sizes[0])
    }
    assert {key: n for key, n in read.items() if key[0].endswith(("gate_up", "down"))} == one_by_one


@pytest.mark.parametrize("into", ["result", "residual"])
def test_values_that_are_written_into_give_the_same_costs(
    into: str, tiny: Tiny, batches: list[Tensor]
) -> None:
    """The sum behind the experts, in place of one of its parts."""
    program = tiny("MM")
    want = {k: Gradients(program, Context()).measure(k, batches[:2]) for k in ("kl", "routing")}
    for moe in program.moe_layers():
        (add,) = moe.node.users
        assert add.target is torch.ops.aten.add.Tensor
        add.target = torch.ops.aten.add_.Tensor
        other = next(n for n in add.all_input_nodes if n is not moe.node)
        add.args = (moe.node, other) if into == "result" else (other, moe.node)
    for kind, found in want.items():
        got = Gradients(program, Context()).measure(kind, batches[:2])
        assert got.keys() == found.keys() and found
        assert all(torch.equal(cost, got[name]) for name, cost in found.items())


def test_a_head_that_gives_no_numbers_is_named_as_a_loss_is_taken(
    tiny: Tiny, batches: list[Tensor]
) -> None:
    program = tiny("M")
    program.add("head.weight", torch.full((16, 16), torch.nan))
    with pytest.raises(MoeccError, match=r"^what the head gives is NaN: "):
        Gradients(program, Context()).measure("kl", batches[:1])


@pytest.mark.parametrize("kept", [True, False])
def test_weights_that_stay_in_memory_are_read_once(
    kept: bool, tiny: Tiny, batches: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    program, read = tiny("MD"), []
    reading = program.read
    monkeypatch.setattr(program, "read", lambda name: read.append(name) or reading(name))
    whole = Whole(program, set(), spare=kept * (1 << 20))
    for ids in batches[:2]:
        whole.forward(ids, lambda wanted: {})
    layers = [w.name for w in program.weights.values() if w.name != "head.weight"]
    assert sorted(read) == sorted(layers * (1 if kept else 2))


def test_sensitivity_of_routing_counts_later_routers_alone(traced: Program) -> None:
    run = compiled(traced, "sensitivity{kl=0}")
    first, last = (m.path for m in traced.moe_layers())
    assert first in run.ctx.data["sensitivity"] and last not in run.ctx.data["sensitivity"]
    both = compiled(traced, "sensitivity")
    traces = [float(both.ctx.data["sensitivity"][path].trace()) for path in (first, last)]
    assert traces[0] > traces[1] > 0


def diagonal(**sizes: tuple[float, float]) -> Measured:
    works = []
    for name, size in sizes.items():
        facts = {"same": {name: name}, "traces": {name: sum(size)}}
        works.append(Kept({name: torch.diag(torch.tensor(size))}, facts))
    return Measured(works)


@pytest.mark.parametrize(("kl_weight", "routing_weight"), [(1.0, 1.0), (2.0, 0.5), (0.25, 3.0)])
def test_routing_weighs_its_weight_times_kl_over_the_layers_that_have_both(
    kl_weight: float, routing_weight: float
) -> None:
    # layers a and b have both: traces of 10 and 4 in all; c has no router behind it
    kl = diagonal(a=(1.0, 2.0), b=(3.0, 4.0), c=(100.0, 100.0))
    routing = diagonal(a=(1.0, 1.0), b=(2.0, 0.0), d=(5.0, 7.0))
    found = Combined(kl, routing, kl_weight, routing_weight)
    factor = routing_weight * kl_weight * 10 / 4
    want = {
        "a": (kl_weight + factor, 2 * kl_weight + factor),
        "b": (3 * kl_weight + 2 * factor, 4 * kl_weight),
        "c": (100 * kl_weight, 100 * kl_weight),
        "d": (5 * factor, 7 * factor),
    }
    assert list(found) == ["a", "b", "c", "d"] and len(found) == 4
    assert "d" in found and "e" not in found
    for _ in range(2):  # asking twice changes nothing
        for name, entries in want.items():
            torch.testing.assert_close(found[name], torch.diag(torch.tensor(entries)))


@pytest.mark.parametrize("routing", [{}, {"a": (0.0, 0.0)}, {"d": (5.0, 7.0)}])
def test_without_a_common_layer_kinds_keep_their_own_units(
    routing: dict[str, tuple[float, float]],
) -> None:
    found = Combined(diagonal(a=(1.0, 2.0)), diagonal(**routing), 3.0, 0.5)
    assert torch.equal(found["a"], torch.diag(torch.tensor((3.0, 6.0))))
    assert "d" not in routing or torch.equal(found["d"], torch.diag(torch.tensor((2.5, 3.5))))


def test_sensitivity_takes_even_batches_for_kl_and_odd_ones_for_routing(traced: Program) -> None:
    run = compiled(traced, "sensitivity{kl=2,routing=0.5,tokens=48}")
    program = run.ctx.reference
    assert program is not None
    # two batches of 24 tokens each
    kl = Gradients(program, Context()).measure("kl", [TOKENS[0], TOKENS[2]])
    routing = Gradients(program, Context()).measure("routing", [TOKENS[1], TOKENS[3]])
    both = kl.keys() & routing.keys()
    assert kl.keys() - both and both
    traces = [sum(float(found[n].trace()) for n in both) for found in (kl, routing)]
    assert set(run.ctx.data["sensitivity"]) == kl.keys()
    for name, found in run.ctx.data["sensitivity"].items():
        want = 2 * kl[name]
        if name in both:
            want = want + 0.5 * 2 * traces[0] / traces[1] * routing[name]
        torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(("off", "kind"), [("kl", "routing"), ("routing", "kl")])
def test_a_kind_that_is_measured_alone_takes_all_batches(
    traced: Program, off: str, kind: str
) -> None:
    run = compiled(traced, f"sensitivity{{{off}=0,{kind}=3,tokens=48}}")
    program = run.ctx.reference
    assert program is not None
    want = Gradients(program, Context()).measure(kind, TOKENS[:2])
    found = run.ctx.data["sensitivity"]
    assert set(found) == want.keys() and want
    for name, value in want.items():
        torch.testing.assert_close(found[name], 3 * value)


def test_without_sensitivity_all_output_channels_count_alike(traced: Program) -> None:
    off, plain = compiled(traced, "sensitivity{kl=0,routing=0},vq"), compiled(traced, "vq")
    assert off.texts["layer001-vq"] == plain.texts["layer001-vq"]
    run = compiled(traced, "sensitivity,vq")
    assert run.texts["layer001-vq"] != plain.texts["layer001-vq"]
    path = traced.moe_layers()[0].path
    told = [r.ctx.audit[f"{path}.gate_up"]["errors"] for r in (run, plain)]
    assert told == ["weighted by sensitivity", "all channels alike"]


def test_gradients_layer_by_layer_equal_those_of_the_whole_graph(traced: Program) -> None:
    program = compiled(traced, "kbvq{rank=2}").program
    trained = Trained(program, Context(), rank=3, experts=True, lr=1.0)
    with torch.no_grad():
        for b in trained.b.values():
            b.normal_(std=0.05)
    routers = {selection_scores(m).name for m in program.moe_layers()}
    whole = Whole(program, trained.placeholders, watch=routers)
    inner = {name: lambda scores: scores.float().sin().sum() for name in routers}

    def loss(values: object, logits: Tensor) -> Tensor:
        return logits.float().square().mean()

    whole.backward(TOKENS[0], trained.values, loss, inner)
    got = [p.grad for p in trained.parameters]

    weights = StageWeights(program)
    values: dict[str, Any] = {program.user_inputs[0].name: TOKENS[0]}
    nodes = [n for n in program.graph.nodes if n.op == "call_function"]
    with torch.enable_grad():
        shared = StageWeights.sharing(weights, trained.values(trained.placeholders))
        for _ in run_nodes(nodes, values, shared):
            pass
        want = values[whole.output].float().square().mean()
        want = want + sum(values[n].float().sin().sum() for n in routers)
        grads = torch.autograd.grad(want, trained.parameters, allow_unused=True)
    assert sum(g is not None for g in got) > 20
    for g, w in zip(got, grads, strict=True):
        assert (g is None) == (w is None)
        if g is not None and w is not None:
            torch.testing.assert_close(g, w, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("layers", [(), (0,), (1,), (0, 1)])
def test_losses_inside_the_layers_count_where_they_depend_on_what_is_trained(
    layers: tuple[int, ...], tiny: Tiny, batches: list[Tensor]
) -> None:
    """The first layer's router does not see the first layer's experts, the second's does."""
    program, ids = tiny("MM"), batches[0]
    moes = program.moe_layers()
    place, routers = moes[0].operand("gate_up").name, [selection_scores(m).name for m in moes]
    parameter = program.read("layers.0.gate_up").requires_grad_()
    whole = Whole(program, {place}, watch=routers)
    inner = {routers[i]: lambda scores: scores.sin().sum() for i in layers}

    def trained(wanted: set[str]) -> dict[str, Tensor]:
        return {place: parameter} if place in wanted else {}

    whole.backward(ids, trained, lambda values, logits: logits.square().mean(), inner)
    values: dict[str, Any] = {program.user_inputs[0].name: ids}
    nodes = [n for n in program.graph.nodes if n.op == "call_function"]
    with torch.enable_grad():
        weights = StageWeights.sharing(StageWeights(program), {place: parameter})
        for _ in run_nodes(nodes, values, weights):
            pass
        want = values[whole.output].square().mean()
        want = want + sum(values[name].sin().sum() for name in inner)
        (grad,) = torch.autograd.grad(want, [parameter])
    torch.testing.assert_close(parameter.grad, grad, rtol=1e-4, atol=1e-6)
