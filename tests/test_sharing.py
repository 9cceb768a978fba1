"""What a mean and a basis are estimated to save, against loops over experts, rows and columns."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from coders import costs, drawn
from conftest import tiny_program
from pipelines import Tiny, derive, resolved
from torch import Tensor

from moecc.errors import MoeccError
from moecc.passes._code.basis import factorize
from moecc.passes._code.coding import encode_in_parts
from moecc.passes._code.moments import Moments
from moecc.passes._code.sharing import Case
from moecc.pipeline.bits import basis_bits, coded_bits
from moecc.pipeline.passes import Context, Layer, LayerPass, Pass
from moecc.pipeline.run import run_passes

E, N, K = 3, 8, 16
USED = torch.tensor([0.5, 0.2, 0.3])


def case(*, output: bool, unit: float = 2.0, input_side: bool = True) -> Case:
    moe = tiny_program("M").moe_layers()[0]
    weight, moment = drawn(4, experts=E, rows=N, columns=K)
    weight = weight + 2 * weight.mean(0)
    s = costs(1.0, rows=N)[[0, 1, 0]] if output else None
    return Case(moe.gate_up if input_side else moe.down, weight, moment, s, USED, unit, seed=0)


@pytest.mark.parametrize("known", [(), ("down",), ("down", "gate_up")])
def test_a_case_is_made_of_its_layer_s_weights_moments_and_costs(
    tiny: Tiny, batches: list[Tensor], known: tuple[str, ...]
) -> None:
    """If down alone has costs, an error of either is as large as the layer's output costs."""
    found: dict[str, Case] = {}
    cost = costs(1.0, rows=16)[0]

    def run_layer(self: Pass, layer: Layer, ctx: Context) -> bool:
        if not layer.moe:
            return False
        (moe,) = layer.moe
        moments: Moments = layer.data["moments", moe.path]
        moments.output = {n: t for n, t in moments.output.items() if n in known}
        gate_up, down = (layer.weight(p) for p in moe.projections)
        assert gate_up is not None and down is not None
        for p, weight in zip(moe.projections, (gate_up, down), strict=True):
            case = found[p.name] = Case.of(layer, p, moments, ctx)
            assert case.projection == p and torch.equal(case.weight, weight)
            assert torch.equal(case.moment, moments.of(p.name))
            assert torch.equal(case.used, moments.mass)
            assert case.seed == ctx.seed_for("layers.0", p.name)
            both = len(known) == 2
            assert (case.output is None) != both
            if case.output is not None:
                assert torch.equal(case.output, moments.output[p.name].expand_as(case.output))
            outputs = down.double() @ moments.down.double() @ down.mT.double()
            whole = sum(
                float(m) * float(torch.trace(cost.double() @ y))
                for m, y in zip(moments.mass, outputs, strict=True)
            )
            assert case.unit == pytest.approx(whole if known == ("down",) else 1.0, rel=1e-5)
        return False

    def run(self: Pass, program: object, ctx: Context) -> bool:
        ctx.data["sensitivity"] = {"layers.0": cost}
        return False

    passes = [derive(Pass, "costs", run=run), *resolved("moments")]
    run_passes(
        tiny("M"), [*passes, derive(LayerPass, "look", run_layer=run_layer)], Context(), batches
    )
    assert list(found) == ["gate_up", "down"]


def left_over(metric: Tensor, share: float) -> np.ndarray:
    """Return what is left of an error's cost in each direction, the costly directions first."""
    m = metric.double().numpy()
    m = m + share * np.diag(m).mean() * np.eye(len(m))
    order, left = np.argsort(-np.diag(m), kind="stable"), np.zeros(len(m))
    for i, k in enumerate(order):
        later = order[i + 1 :]
        block = np.linalg.solve(m[np.ix_(later, later)], m[later, k]) if len(later) else 0
        left[k] = m[k, k] - (m[k, later] @ block if len(later) else 0)
    return left


def energy(c: Case, remainder: Tensor) -> list[float]:
    """Return step 1 by experts."""
    whole = sum(
        float(USED[e]) * float((c.weight[e] @ c.moment[e] * c.weight[e]).sum()) for e in range(E)
    )
    found = []
    for e in range(E):
        mass = float(USED[e]) * (1 if c.output is not None else c.unit / whole)
        columns = left_over(c.moment[e], 0.01).mean()
        rows = np.ones(N) if c.output is None else left_over(c.output[e], 0.2)
        squares = remainder.expand(E, -1, -1)[e].double().square().sum(-1).numpy()
        found.append(mass * columns * float(rows @ squares))
    return found


@pytest.mark.parametrize("output", [True, False])
def test_energy_counts_experts_rows_and_columns_by_what_they_cost(output: bool) -> None:
    c = case(output=output)
    for remainder in (c.weight, c.weight.mean(0, keepdim=True)):
        assert c.energy(remainder).tolist() == pytest.approx(energy(c, remainder), rel=1e-3)


@pytest.mark.parametrize("input_side", [True, False])
@pytest.mark.parametrize("output", [True, False])
def test_choices_are_all_means_with_all_ranks_and_their_costs(
    output: bool, input_side: bool
) -> None:
    c = case(output=output, input_side=input_side)
    found = list(c.choices((0, 2, 4), (0, 1, 2), 7.0))
    assert [(x.mean, x.rank) for x in found] == [
        *((0, rank) for rank in (0, 1, 2)),
        *((mean, rank) for rank in (0, 1, 2) for mean in (2, 4)),
    ]
    average = c.weight.mean(0, keepdim=True)
    unit = 7.0 / sum(energy(c, c.weight))
    share = {0: 0.0, 2: 0.06, 4: 0.007}
    for x in found:
        rest = c.weight - average if x.mean else c.weight
        if x.rank:
            basis = factorize(rest, c.moment, 2, input_side=input_side)
            rest = basis.first(x.rank).left_of(rest)
        want = unit * (sum(energy(c, rest)) + share[x.mean] * sum(energy(c, average)))
        assert x.cost == pytest.approx(want, rel=1e-3)
        bits = coded_bits(1, N, K, x.mean) if x.mean else 0
        assert x.bits == bits + basis_bits(x.rank, E, N, K, input_side=input_side)
    assert found[0].cost == pytest.approx(7.0, rel=1e-5) and found[0].bits == 0
    (one,) = c.choices((2,), (1,), 7.0)
    assert (one.mean, one.rank, one.bits) == (2, 1, found[5].bits)


@pytest.mark.parametrize(("mean", "rank"), [(0, 0), (3, 2)])
@pytest.mark.parametrize("output", [True, False])
def test_a_cost_is_measured_on_some_experts_and_scaled_to_all(
    output: bool, mean: int, rank: int
) -> None:
    c = case(output=output)
    six = [0, 1, 2, 0, 1, 2]
    scale = torch.linspace(1, 2, 6)[:, None, None]
    used = torch.tensor([0.3, 0.1, 0.2, 0.0, 0.15, 0.25])
    s = None if c.output is None else c.output[six]
    c = replace(c, weight=c.weight[six] * scale, moment=c.moment[six], output=s, used=used)
    remainder = c.take(mean, rank).left_of(c.weight)
    some = [0, 1, 2, 5]  # expert 3 is not used: four of the others, evenly spaced
    coded = encode_in_parts(
        remainder[some],
        c.moment[some],
        None if c.output is None else c.output[some],
        bits=2,
        shared=True,
        seed=0,
        rounds=1,
        turns=5,
    )
    d = (coded.dense() - remainder[some]).double()
    whole = sum(
        float(u) * float((w @ h * w).sum())
        for u, w, h in zip(used, c.weight, c.moment, strict=True)
    )
    measured = 0.0
    for i, e in enumerate(some):
        own = torch.eye(N).double() if c.output is None else c.output[e].double()
        error = float(torch.trace(own @ d[i] @ c.moment[e].double() @ d[i].T))
        measured += float(used[e]) * (1 if output else c.unit / whole) * error
    energy = c.energy(remainder)
    want = measured * float(energy.sum() / energy[some].sum())
    assert c.cost(2, mean, rank) == pytest.approx(want, rel=1e-3) and want > 0
    assert replace(c, used=torch.zeros(6)).cost(2) == 0.0


def test_experts_are_siblings_if_an_exact_mean_is_worth_two_bits() -> None:
    """Two bits of a mean are two thirds of a bit for each of three experts: a factor of 4^(2/3)."""
    c = case(output=False)
    apart = c.weight - c.weight.mean(0)
    for grow in (0.1, 0.5, 1.0, 2.0, 4.0):
        weight = apart + grow * c.weight.mean(0)
        other = replace(c, weight=weight)
        left, whole = (sum(energy(other, w)) for w in (apart, weight))
        assert other.siblings() == (whole > left * 4 ** (2 / 3)), grow
    assert replace(c, weight=apart + 4 * c.weight.mean(0)).siblings()
    assert not replace(c, weight=apart + 0.1 * c.weight.mean(0)).siblings()


def test_means_and_ranks_on_offer_follow_the_options() -> None:
    c = case(output=False)
    assert c.siblings()
    assert c.offers("auto", "auto") == ((0, 2, 3, 4), (0,))  # a fourth of 16 dimensions
    assert c.offers("off", 3) == ((0,), (3,)) and c.offers(3, 16) == ((3,), (16,))
    with pytest.raises(MoeccError, match="rank=17 is more than gate_up's 16 dimensions"):
        c.offers(2, 17)
    apart = replace(c, weight=c.weight - c.weight.mean(0))
    assert apart.offers("auto", 1) == ((0,), (1,))
    wide = replace(c, weight=torch.randn(E, N, 128))
    assert wide.offers("off", "auto") == ((0,), (0, 4, 8, 16))
    down = replace(case(output=False, input_side=False), weight=torch.randn(E, 80, K))
    assert down.hidden == 80 and down.offers("off", "auto") == ((0,), (0, 4, 8, 16))
