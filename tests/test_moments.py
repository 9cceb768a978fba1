"""`moments`: token by token in numpy; the memory that it needs, and the tokens that it sees."""

from __future__ import annotations

import math
import weakref
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import slow_vq4 as slow
import torch
from coders import from_blocks, in_blocks
from pipelines import Tiny, derive, resolved
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moecc.errors import MoeccError
from moecc.ir import ops
from moecc.ir.gates import rows_per_unit
from moecc.ir.program import Program
from moecc.passes._code.codebooks import Book
from moecc.passes._code.moments import (
    Common,
    Expert,
    Routed,
    Seen,
    _sent,
    gate_slopes,
    hidden_units,
    mean_outer,
    measure,
    routed_tokens,
)
from moecc.passes._code.sharing import Metric
from moecc.passes._code.units import Settings, Unit, code
from moecc.passes.affine import judged
from moecc.passes.moments import MeasureMoments
from moecc.pipeline.passes import Context, Layer, LayerPass, Pass
from moecc.pipeline.run import run_passes
from moecc.pipeline.stream import Stream

pytestmark = pytest.mark.usefixtures("traced_once")


class Peak(TorchDispatchMode):
    """Count the most bytes that new tensors hold at one time while the mode is on."""

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[int, int] = {}  # storage -> tensors on it
        self.now = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, Tensor):
                storage = t.untyped_storage()
                key, nbytes = storage.data_ptr(), storage.nbytes()
                self.count(key, nbytes, 1)
                weakref.finalize(t, self.count, key, nbytes, -1)
        return result

    def count(self, storage: int, nbytes: int, more: int) -> None:
        before = self.held.get(storage, 0)
        self.held[storage] = before + more
        self.now += nbytes * ((before + more > 0) - (before > 0))
        self.most = max(self.most, self.now)


def entered(program: Program, batches: list[Tensor]) -> Layer:
    """Return the first layer of a program."""
    stream = Stream(program, batches)
    stream.advance()
    return Layer(1, program, program, stream, stream)


def slopes(rows: np.ndarray) -> np.ndarray:
    """Return the derivative of silu(g) u by the gate rows g and by the up rows u."""
    g, u = np.split(rows, 2)
    s = 1 / (1 + np.exp(-g))
    return np.concatenate([u * (s + g * s * (1 - s)), g * s])


class Slow:
    """The moments of a layer, token by token."""

    def __init__(self, layer: Layer, routed: Routed, least: int, squared: bool):
        (moe,) = layer.moe
        up, self.down = (layer.weight(p).double().numpy() for p in moe.projections)
        x = routed.x.double().numpy()
        logits = routed.logits.numpy() if routed.logits is not None else None
        average = np.mean([np.outer(row, row) for row in x], 0)
        self.tokens, self.mass, self.starved = [], [], {}
        self.inputs, self.hidden, self.slopes = [], [], []
        for e in range(4):
            chose = {
                t: float(w) ** 2 if squared else 1.0
                for t in range(len(x))
                for i, w in zip(routed.index[t].tolist(), routed.weight[t].tolist(), strict=True)
                if i == e
            }
            self.tokens.append(len(chose))
            self.mass.append(sum(chose.values()) / len(x))
            share = 16 / (len(chose) + 16)
            own = mean_of({t: np.outer(x[t], x[t]) for t in chose}, chose)
            self.inputs.append((1 - share) * own + share * average)
            if len(chose) < least:
                most = np.arange(len(x)) if logits is None else np.argsort(-logits[:, e])
                chose = dict.fromkeys(most[:least].tolist(), 1.0)
                self.starved[e] = len(chose)
            rows = {t: up[e] @ x[t] for t in chose}
            hidden = {t: slow.silu_glu(r) for t, r in rows.items()}
            self.hidden.append(mean_of({t: np.outer(h, h) for t, h in hidden.items()}, chose))
            tilt = {t: slopes(r) for t, r in rows.items()}
            self.slopes.append(mean_of({t: np.outer(s, s) for t, s in tilt.items()}, chose))


def mean_of(values: dict[int, np.ndarray], weights: dict[int, float]) -> np.ndarray:
    total = sum(weights.values())
    return np.sum([weights[t] * v for t, v in values.items()], 0) / total


@pytest.mark.parametrize("squared", [True, False])
@pytest.mark.parametrize("least", [1, 28])
def test_moments_are_means_over_the_tokens_of_each_expert(
    tiny: Tiny, batches: list[Tensor], least: int, squared: bool
) -> None:
    layer = entered(tiny("M"), batches)
    (moe,) = layer.moe
    routed = routed_tokens(layer, moe)
    g = torch.randn(20, 16, generator=torch.Generator().manual_seed(0))
    cost = g.T @ g
    found = measure(layer, moe, routed, cost, least, squared=squared)
    want = Slow(layer, routed, least, squared)
    assert found.tokens.tolist() == want.tokens and found.starved == want.starved
    assert bool(want.starved) == (least == 28) and len(want.starved) < 4
    np.testing.assert_allclose(found.mass, want.mass, rtol=1e-5)
    np.testing.assert_allclose(found.of("gate_up"), want.inputs, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.of("down"), want.hidden, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.typical(), np.mean(want.inputs, 0), rtol=1e-4, atol=1e-5)
    behind = found.output_of("down")
    assert behind is not None and torch.equal(behind, cost.expand(4, 1, -1, -1))
    got = found.output_of("gate_up")
    assert got is not None
    for e, tilt in enumerate(want.slopes):
        unit = want.down[e].T @ cost.double().numpy() @ want.down[e]
        np.testing.assert_allclose(got[e, 0], np.tile(unit, (2, 2)) * tilt, rtol=1e-3, atol=1e-3)
    fewest, worst = min((want.tokens[e], e) for e in range(4))
    note = (
        f"{moe.path}: {len(want.starved)} of 4 experts got fewer than 28 routed tokens, "
        f"expert {worst} only {fewest}; calibrated on 28 sent to each on purpose"
    )
    assert found.notes == ([note] if want.starved else [])


@pytest.mark.parametrize("least", [1, 28])
def test_an_expert_s_metric_is_computed_when_it_is_asked_for(
    tiny: Tiny, batches: list[Tensor], least: int
) -> None:
    """Also once other weights are in its place: it is of those that were measured."""
    layer = entered(tiny("M"), batches)
    (moe,) = layer.moe
    routed = routed_tokens(layer, moe)
    found = measure(layer, moe, routed, torch.eye(16), least)
    want = Slow(layer, routed, least, True)
    first = layer.program.read("layers.0.gate_up")
    layer.program.add("layers.0.gate_up", torch.zeros(4, 16, 16))
    for e in range(4):
        expert = found.expert(e)
        assert torch.equal(expert.weight("gate_up"), first[e])
        np.testing.assert_array_equal(expert.weight("down"), want.down[e])
        behind = np.tile(want.down[e].T @ want.down[e], (2, 2)) * want.slopes[e]
        for name, moments, costs in (
            ("gate_up", want.inputs, behind),
            ("down", want.hidden, np.eye(16)),
        ):
            moment, output = expert.metric(name)
            assert output is not None
            np.testing.assert_allclose(moment, moments[e], rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(output[0], costs, rtol=1e-3, atol=1e-3)
            assert torch.equal(moment, expert.moment(name))
    for name in ("gate_up", "down"):
        for get in (found.of, found.output_of):
            some, whole = get(name, [2, 0]), get(name)
            assert some is not None and whole is not None and len(whole) == 4
            assert torch.equal(some, whole[[2, 0]])


def test_without_sensitivity_no_error_has_a_cost_of_its_own(
    tiny: Tiny, batches: list[Tensor]
) -> None:
    layer = entered(tiny("M"), batches)
    (moe,) = layer.moe
    routed = routed_tokens(layer, moe)
    found, alike = (measure(layer, moe, routed, cost) for cost in (torch.eye(16), None))
    assert found.weighted and not alike.weighted
    for name in ("gate_up", "down"):
        assert alike.output_of(name) is None and alike.output_of(name, [1]) is None
        moment, output = alike.expert(1).metric(name)
        assert output is None and torch.equal(moment, found.expert(1).moment(name))


def test_small_matrices_are_computed_once_and_large_ones_are_not_kept(
    tiny: Tiny, batches: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = entered(tiny("M"), batches)
    (moe,) = layer.moe
    routed = routed_tokens(layer, moe)
    for most, kept in ((16 * 16, {"gate_up", "down", "output"}), (16 * 16 - 1, {"down"})):
        monkeypatch.setattr("moecc.passes._code.moments._SMALL", most)
        found = measure(layer, moe, routed, torch.eye(16))
        first = {name: found.expert(1).metric(name)[0] for name in ("gate_up", "down")}
        assert found.expert(1).made.keys() == kept and found.expert(0).made == {}
        for name, moment in first.items():
            again = found.expert(1).moment(name)
            assert torch.equal(again, moment) and (again is moment) == (name in kept)


@pytest.mark.parametrize(("down", "cost"), [(1.0, None), (1e3, 1e4), (1e-9, 1.0)])
def test_errors_that_float32_cannot_add_up_are_refused_with_their_projection(
    tiny: Tiny,
    batches: list[Tensor],
    monkeypatch: pytest.MonkeyPatch,
    down: float,
    cost: float | None,
) -> None:
    """None is larger than tr(S) |W|^2 tr(H), where a factor below 1 counts as 1."""
    program = tiny("M")
    program.add("layers.0.down", down * program.read("layers.0.down"))
    layer = entered(program, batches)
    (moe,) = layer.moe
    behind = None if cost is None else cost * torch.eye(16)
    found = measure(layer, moe, routed_tokens(layer, moe), behind)
    for e in range(4):
        for name in ("gate_up", "down"):
            expert = found.expert(e)
            moment, output = expert.metric(name)
            both = [m.view(m.shape[-1], -1) for m in (moment, output) if m is not None]
            traces = [float(m.double().trace()) for m in both]
            norm = float(expert.weight(name).double().square().sum())
            most = math.prod(max(factor, 1) for factor in (norm, *traces))
            monkeypatch.setattr("moecc.passes._code.moments._MOST", 1.001 * most)
            expert.metric(name)
            monkeypatch.setattr("moecc.passes._code.moments._MOST", 0.999 * most)
            with pytest.raises(MoeccError) as error:
                expert.metric(name)
            says = f"{moe.path}.{name}: squared errors of its output may reach {most:.0e} on "
            assert str(error.value).startswith(says)
            monkeypatch.undo()


def test_a_token_s_weight_is_the_sum_of_its_slots_for_an_expert() -> None:
    index = torch.tensor([[0, 1], [1, 1], [2, 0], [0, 2]])
    weight = torch.tensor([[0.5, 0.25], [0.5, 0.125], [0.75, 0.0], [0.0, 1.0]])
    routed = Routed(torch.zeros(4, 3), index, weight, None)
    assert [routed.rows(e).tolist() for e in range(4)] == [[0], [0, 1], [2, 3], []]
    assert routed.weight_of(1, routed.rows(1)).tolist() == [0.25, 0.625]
    assert routed.weight_of(2, torch.tensor([0, 3])).tolist() == [0.0, 1.0]


def test_without_logits_a_starved_expert_gets_evenly_spaced_tokens() -> None:
    x = torch.zeros(9, 3)
    for logits in (None, torch.zeros(9, 2)):  # of other experts
        routed = Routed(x, torch.zeros(9, 1).long(), torch.ones(9, 1), logits)
        assert _sent(routed, 2, 5).tolist() == [0, 2, 4, 6, 8]
        assert _sent(routed, 2, 20).tolist() == list(range(9))


def test_a_mean_without_tokens_or_weights_is_zero() -> None:
    x = torch.randn(5, 3)
    for found in (mean_outer(x[:0]), mean_outer(x, torch.zeros(5)), mean_outer(x[:0], x[:0, 0])):
        assert torch.equal(found, torch.zeros(3, 3))
    torch.testing.assert_close(mean_outer(x), sum(torch.outer(r, r) for r in x) / 5)


@pytest.mark.parametrize("weighted", [True, False])
def test_a_mean_of_many_tokens_is_taken_of_some_at_a_time(
    weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moecc.passes._code.moments._TOGETHER", 4)
    asked: list[int] = []

    def change(x: Tensor) -> Tensor:
        asked.append(len(x))
        return torch.cat([x, x.square()], -1)

    x, weight = torch.randn(10, 3), torch.rand(10)
    weight[4:8] = 0  # these are taken together
    for tokens, parts in ((10, [4, 4, 2]), (4, [4]), (0, [0])):
        seen = Seen(x[:tokens], weight[:tokens] if weighted else None)
        got = seen.mean_outer(change)
        assert asked == parts
        asked.clear()
        want = torch.zeros(6, 6).double()
        for row, w in zip(
            change(seen.x).double(), weight if weighted else [1.0] * 10, strict=False
        ):
            want += float(w) * torch.outer(row, row)
        total = float(weight[:tokens].sum()) if weighted else tokens
        torch.testing.assert_close(got.double(), want / max(total, 1), rtol=1e-5, atol=1e-6)
        asked.clear()
    assert not Seen(x, torch.zeros(10)).mean_outer(change).any()


@pytest.mark.parametrize("gate", ["glu", "clamp", "oai", "none"])
def test_slopes_of_a_gate_against_finite_differences(gate: str) -> None:
    a = dict(act="silu", gate=gate, alpha=1.3, limit=0.8, eps=1e-6)
    g = torch.Generator().manual_seed(1)
    x = torch.randn(7, 3, generator=g).double()
    weight, bias = (torch.randn(*s, generator=g).double() for s in ((8, 3), (8,)))
    found = gate_slopes(a, x, weight, bias)
    assert found.shape == (7, 8)
    for n in range(8):
        step = torch.zeros(8).double()
        step[n] = 1e-6
        up, down = (hidden_units(a, x, weight, bias + s).sum(-1) for s in (step, -step))
        torch.testing.assert_close(found[:, n], (up - down) / 2e-6, rtol=1e-4, atol=1e-6)


def test_matrices_of_one_expert_are_in_memory_at_a_time(
    tiny: Tiny, batches: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moecc.passes._code.moments._SMALL", 0)
    layer = entered(tiny("I"), batches)
    (moe,) = layer.moe
    routed = routed_tokens(layer, moe)
    with Peak() as measuring:
        found = measure(layer, moe, routed, torch.eye(16))
    one = 4 * 16 * 16  # bytes of one expert's moment
    assert measuring.most < 16 * one
    found.output_of("down")  # a view that all experts share, and keep

    def most(experts: range) -> int:
        with Peak() as peak:
            for e in experts:
                for name in ("gate_up", "down"):
                    found.expert(e).metric(name)
        return peak.most

    assert most(range(64)) == max(most(range(e, e + 1)) for e in range(64)) < 32 * one


def drawn_expert(gate: str, units: int, hidden: int, block: int) -> Expert:
    """Return an expert with a bias and six tokens; errors of its output have random costs."""
    g, rows = torch.Generator().manual_seed(3), units * rows_per_unit(gate)
    a = dict(act="silu", gate=gate, alpha=1.3, limit=0.8)
    x, s = torch.randn(6, hidden, generator=g), torch.randn(hidden, hidden, generator=g)
    up, down = (torch.randn(*size, generator=g) for size in ((rows, hidden), (hidden, units)))
    seen, bias = Seen(x, torch.rand(6, generator=g)), torch.randn(rows, generator=g)
    return Expert(Common(a, torch.eye(hidden), s @ s.T, block), "e", seen, seen, up, down, bias)


@pytest.mark.parametrize("gate", ["glu", "oai", "none"])
@pytest.mark.parametrize(("block", "blocks"), [(18, (1, 1)), (6, (3, 3)), (2, (9, 15))])
def test_costs_in_blocks_are_those_of_all_rows_but_for_what_is_between_blocks(
    gate: str, block: int, blocks: tuple[int, int]
) -> None:
    """Here of 9 hidden units and 15 channels."""
    expert = drawn_expert(gate, 9, 15, block)
    alike = replace(expert, common=replace(expert.common, block=100), made={})
    for name, count in zip(("gate_up", "down"), blocks, strict=True):
        got, full = expert.output(name), alike.output(name)
        assert got is not None and full is not None and (len(got), len(full)) == (count, 1)
        torch.testing.assert_close(got, in_blocks(full[0], count))
        if name == "gate_up" and gate != "none":  # a unit's gate row and up row are in one block
            torch.testing.assert_close(from_blocks(got).diagonal(9), full[0].diagonal(9))


@pytest.mark.parametrize("name", ["gate_up", "down"])
def test_no_step_of_coding_makes_a_matrix_of_all_rows_with_all_rows(name: str) -> None:
    expert = drawn_expert("glu", *((512, 16) if name == "gate_up" else (16, 1024)), 32)
    weight = expert.weight(name).unsqueeze(0)
    settings = Settings(bits=2, shared=False, rounds=2, feedback=True, seed=0)
    # k-means, which has no costs, takes more
    book = Book(torch.randint(-127, 128, (1, 256, 4)).float(), torch.full((1, 1), 0.02))
    unit = Unit(name, (expert,), weight, settings, book)
    v, t = torch.randn(2, 9, 1024)
    with Peak() as peak:
        code(unit, expert.common)
        moment, output = expert.metric(name)
        assert output is not None
        Metric.of(weight, moment.unsqueeze(0), output.unsqueeze(0))
        judged(v, t, torch.rand(9), output)
    given = name == "down"  # S, which all experts share, is such a matrix
    assert peak.most < (1 + given) * 4 * 1024**2


@pytest.mark.parametrize("routing", ["squared", "one"])
@pytest.mark.parametrize("sensitive", [True, False])
def test_the_pass_leaves_measurements_for_its_options_and_says_how_errors_count(
    routing: str, sensitive: bool, tiny: Tiny, batches: list[Tensor]
) -> None:
    layer, ctx, cost = entered(tiny("M"), batches), Context(), torch.eye(16)
    (moe,) = layer.moe
    if sensitive:
        ctx.data["sensitivity"] = {moe.path: cost}
    assert MeasureMoments(min_tokens=28, routing=routing).run_layer(layer, ctx) is False
    found, routed = layer.data["moments", moe.path], layer.data["routed", moe.path]
    behind = cost if sensitive else None
    want = measure(layer, moe, routed, behind, 28, squared=routing == "squared")
    for name in ("gate_up", "down"):
        assert torch.equal(found.of(name), want.of(name))
        errors = "weighted by sensitivity" if sensitive else "all channels alike"
        assert ctx.audit[f"{moe.path}.{name}"] == {"errors": errors}
    assert found.weighted == want.weighted == sensitive and found.starved == want.starved
    assert ctx.notes == want.notes and len(ctx.notes) == 1


def test_the_pass_leaves_coded_experts_alone(tiny: Tiny, batches: list[Tensor]) -> None:
    layer, ctx = entered(tiny("MM"), batches), Context()
    coded, dense = layer.program.moe_layers()
    coded.node.target = ops.VQ_EXPERTS
    dense.node.meta["layer"] = 1
    assert layer.moe[0].path == coded.path and len(layer.moe) == 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moecc.passes.moments.routed_tokens", lambda layer, moe, **_: moe.path)
        patch.setattr(
            "moecc.passes.moments.measure",
            lambda *a, **k: SimpleNamespace(weighted=False, notes=[a[2]]),
        )
        MeasureMoments().run_layer(layer, ctx)
    assert layer.data.keys() == {("routed", dense.path), ("moments", dense.path)}


@pytest.mark.parametrize("behind", ["coded", "float"])
def test_text_goes_through_coded_layers_or_through_those_of_the_float_model(
    tiny: Tiny, batches: list[Tensor], behind: str
) -> None:
    """Targets can still be asked for in the same layer, behind the moments."""
    found: dict[str, Routed] = {}

    def run_layer(self: Pass, layer: Layer, ctx: Context) -> bool:
        for moe in layer.moe:
            found[moe.path] = layer.data["routed", moe.path]
            assert layer.targets.stage == layer.index + 1
        return False

    want, look = dict[str, Routed](), derive(LayerPass, "look", run_layer=run_layer)
    run_passes(tiny("MM"), [*resolved("moments"), look], Context(), batches)
    want.update(found)
    coding = resolved(f"moments{{behind={behind}}},vq{{rounds=1}}")
    run_passes(tiny("MM"), [coding[0], look, *coding[1:]], Context(), batches)
    assert list(found) == list(want) == ["layers.0", "layers.1"]
    assert torch.equal(found["layers.0"].x, want["layers.0"].x)
    assert torch.equal(found["layers.1"].x, want["layers.1"].x) == (behind == "float")
