"""What a mean and a basis are estimated to save, against loops over experts, rows and columns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from coders import costs, drawn, from_blocks
from conftest import tiny_program
from pipelines import Tiny, derive, resolved
from torch import Tensor

from moecc.errors import MoeccError
from moecc.ir import vq4
from moecc.passes._code.basis import common_mean, factorize
from moecc.passes._code.coding import encode
from moecc.passes._code.moments import Moments
from moecc.passes._code.sharing import Case, Choice, Metric, mean_of, sample, sample_size
from moecc.pipeline.bits import basis_bits, coded_bits
from moecc.pipeline.passes import Context, Layer, LayerPass, Pass
from moecc.pipeline.run import run_passes

E, N, K = 3, 8, 16
USED = torch.tensor([0.5, 0.2, 0.3])


def case(*, output: bool, input_side: bool = True) -> Case:
    """Return the case of a projection of three experts; all of them are in its sample.

    output: whether errors of the output have costs, in two blocks.
    """
    moe = tiny_program("M").moe_layers()[0]
    weight, moment = drawn(4, experts=E, rows=N, columns=K)
    s = costs(1.0, rows=N, blocks=2)[[0, 1, 0]] if output else None
    p = moe.gate_up if input_side else moe.down
    c = Case(p, weight, Metric.of(weight, moment, s), USED, list(range(E)), E, torch.Tensor, seed=0)
    return of_weights(c, weight + 2 * weight.mean(0))


def of_weights(c: Case, weight: Tensor) -> Case:
    """Return a case of other weights; all experts are in its sample."""
    metric = Metric.of(weight, c.metric.moment, c.metric.output)
    return replace(c, weight=weight, metric=metric, everyone=partial(weight.mean, 0, keepdim=True))


@pytest.mark.parametrize("sensitive", [True, False])
@pytest.mark.parametrize("kind", ["M", "I"])
def test_a_case_is_made_of_a_sample_of_its_layer_s_experts(
    tiny: Tiny,
    batches: list[Tensor],
    monkeypatch: pytest.MonkeyPatch,
    sensitive: bool,
    kind: str,
) -> None:
    """Four experts fit, of those with tokens; they stand for all, and the mean is that of all."""
    monkeypatch.setattr("moecc.passes._code.sharing._IN_SAMPLE", 1)
    found: dict[str, Case] = {}
    cost = costs(1.0, rows=16)[0, 0]

    def run_layer(self: Pass, layer: Layer, ctx: Context) -> bool:
        if not layer.moe:
            return False
        (moe,) = layer.moe
        moments: Moments = layer.data["moments", moe.path]
        used = [e for e, tokens in enumerate(moments.tokens) if tokens]
        assert (len(used) == 4) if kind == "M" else (4 < len(used) < 64)
        some = [used[i * (len(used) - 1) // 3] for i in range(4)]
        for p in moe.projections:
            weight = layer.weight(p)
            assert weight is not None
            case = found[p.name] = Case.of(layer, p, moments, ctx)
            assert case.projection == p and torch.equal(case.weight, weight[some])
            assert torch.equal(case.metric.moment, moments.of(p.name)[some])
            assert case.experts == len(weight)
            share = float(moments.mass.sum() / moments.mass[some].sum())
            torch.testing.assert_close(case.used, moments.mass[some] * share)
            mean = weight.double().mean(0, keepdim=True)
            torch.testing.assert_close(case.average.double(), mean, rtol=1e-5, atol=1e-6)
            assert torch.equal(mean_of(layer, p), case.average) or len(weight) == len(some)
            assert case.seed == ctx.seed_for("layers.0", p.name)
            costly = moments.output_of(p.name)
            assert (case.metric.output is None) == (costly is None) != sensitive
            if case.metric.output is not None and costly is not None:
                assert torch.equal(case.metric.output, costly[some])
        return False

    def run(self: Pass, program: object, ctx: Context) -> bool:
        ctx.data["sensitivity"] = {"layers.0": cost} if sensitive else {}
        return False

    passes = [derive(Pass, "costs", run=run), *resolved("moments")]
    run_passes(
        tiny(kind), [*passes, derive(LayerPass, "look", run_layer=run_layer)], Context(), batches
    )
    assert list(found) == ["gate_up", "down"]


@pytest.mark.parametrize(
    ("experts", "numbers", "some"),
    [
        (3, 1, [0, 1, 2]),
        (8, 100, list(range(8))),
        (9, 100, [0, 1, 2, 3, 4, 5, 6, 8]),
        (20, 125, [0, 3, 7, 11, 15, 19]),
        (20, 10**9, [0, 6, 12, 19]),
    ],
)
def test_a_sample_has_as_many_experts_as_fit_evenly_spaced(
    experts: int, numbers: int, some: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never fewer than four, nor more than eight; an expert without tokens only if all fit."""
    monkeypatch.setattr("moecc.passes._code.sharing._MOST_SAMPLE", 8)
    monkeypatch.setattr("moecc.passes._code.sharing._IN_SAMPLE", 800)
    mass = torch.rand(experts) + 0.1
    assert sample(mass, numbers) == sample(torch.zeros(experts), numbers) == some
    assert sample_size(experts, numbers) == len(some)
    between = torch.zeros(2 * experts)
    between[1::2] = mass
    if len(some) < experts:
        assert sample(between, numbers) == [2 * e + 1 for e in some]
        few = torch.zeros(experts)
        few[[3, 5]] = 0.5
        assert sample(few, numbers) == [3, 5]
    else:
        assert sample(mass * (mass > mass.mean()), numbers) == some


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
    experts = range(len(c.weight))
    whole = sum(
        float(c.used[e]) * float((c.weight[e] @ c.metric.moment[e] * c.weight[e]).sum())
        for e in experts
    )
    found = []
    for e in experts:
        mass = float(c.used[e]) * (1 if c.metric.output is not None else 1 / whole)
        columns = left_over(c.metric.moment[e], 0.01).mean()
        rows = (
            np.ones(N)
            if c.metric.output is None
            else left_over(from_blocks(c.metric.output)[e], 0.2)
        )
        squares = remainder.expand(len(experts), -1, -1)[e].double().square().sum(-1).numpy()
        found.append(mass * columns * float(rows @ squares))
    return found


@pytest.mark.parametrize("output", [True, False])
def test_energy_counts_experts_rows_and_columns_by_what_they_cost(output: bool) -> None:
    c = case(output=output)
    for remainder in (c.weight, c.weight.mean(0, keepdim=True)):
        assert c.energy(remainder).tolist() == pytest.approx(energy(c, remainder), rel=1e-3)


def check_choices(c: Case, found: Sequence[Choice], average: Tensor) -> None:
    """Assert that choices cost what is left behind `average` and behind a basis of two rows."""
    share = {0: 0.0, 2: 0.06, 4: 0.007}
    for x in found:
        rest = c.weight - average if x.mean else c.weight
        if x.rank:
            basis = factorize(rest, c.metric.moment, 2, input_side=c.input_side)
            rest = basis.first(x.rank).left_of(rest)
        left = sum(energy(c, rest)) + share[x.mean] * sum(energy(c, average))
        assert x.cost == pytest.approx(left / sum(energy(c, c.weight)), rel=1e-3)
        bits = coded_bits(1, N, K, x.mean) if x.mean else 0
        assert x.bits == bits + basis_bits(x.rank, c.experts, N, K, input_side=c.input_side)


@pytest.mark.parametrize("input_side", [True, False])
@pytest.mark.parametrize("output", [True, False])
def test_choices_are_all_means_with_all_ranks_and_their_costs(
    output: bool, input_side: bool
) -> None:
    c = case(output=output, input_side=input_side)
    found = list(c.choices((0, 2, 4), (0, 1, 2)))
    assert [(x.mean, x.rank) for x in found] == [
        *((0, rank) for rank in (0, 1, 2)),
        *((mean, rank) for rank in (0, 1, 2) for mean in (2, 4)),
    ]
    check_choices(c, found, c.weight.mean(0, keepdim=True))
    assert found[0].cost == 1 and found[0].bits == 0
    (one,) = c.choices((2,), (1,))
    assert (one.mean, one.rank, one.bits) == (2, 1, found[5].bits)


@pytest.mark.parametrize("output", [True, False])
def test_choices_of_a_sample_are_those_of_all_experts_behind_the_mean_of_all(output: bool) -> None:
    """The bits are those of all: the basis has coefficients for each."""
    c = case(output=output)
    everyone = torch.cat([c.weight, torch.randn(4, N, K)]).mean(0, keepdim=True)
    part = replace(c, experts=7, everyone=lambda: everyone)
    found = list(part.choices((0, 2, 4), (0, 1, 2)))
    check_choices(part, found, everyone)
    whole = list(c.choices((0, 2, 4), (0, 1, 2)))
    assert [(x.mean, x.rank) for x in found] == [(x.mean, x.rank) for x in whole]
    for mean in (0, 3):
        for rank in (0, 2):
            taken, names = part.take(mean, rank).tensors, {"basis", "coef", "coef_scale"}
            assert {n for n in taken if not n.startswith(vq4.MEAN)} == (names if rank else set())
            if mean:
                want = common_mean(everyone, 3, 0, input_side=True).tensors
                for name, tensor in want.items():
                    got = taken[name]
                    assert got is tensor is None or torch.equal(got, tensor)  # type: ignore[arg-type]


@pytest.mark.parametrize(("mean", "rank"), [(0, 0), (3, 2)])
@pytest.mark.parametrize("output", [True, False])
def test_a_cost_is_measured_on_some_experts_and_scaled_to_all(
    output: bool, mean: int, rank: int
) -> None:
    c = case(output=output)
    six = [0, 1, 2, 0, 1, 2]
    scale = torch.linspace(1, 2, 6)[:, None, None]
    used = torch.tensor([0.3, 0.1, 0.2, 0.0, 0.15, 0.25])
    s = None if c.metric.output is None else c.metric.output[six]
    metric = replace(c.metric, moment=c.metric.moment[six], output=s)
    c = of_weights(replace(c, metric=metric, used=used, experts=6), c.weight[six] * scale)
    remainder = c.take(mean, rank).left_of(c.weight)
    whole = sum(
        float(u) * float((w @ h * w).sum())
        for u, w, h in zip(used, c.weight, c.metric.moment, strict=True)
    )
    measured = 0.0
    some = [0, 1, 2, 5]  # expert 3 is not used: four of the others, evenly spaced
    for e in some:
        matrices = (remainder, c.metric.moment, c.metric.output)
        w, h, s = (None if t is None else t[e : e + 1] for t in matrices)
        assert w is not None and h is not None
        coded = encode(w, h, s, bits=2, shared=True, seed=0, rounds=1, turns=5)
        d = (coded.dense() - w)[0].double()
        own = torch.eye(N).double() if s is None else from_blocks(s)[0].double()
        error = float(torch.trace(own @ d @ h[0].double() @ d.T))
        measured += float(used[e]) * (1 if output else 1 / whole) * error
    energy = c.energy(remainder)
    want = measured * float(energy.sum() / energy[some].sum())
    assert c.cost(2, mean, rank) == pytest.approx(want, rel=1e-3) and want > 0
    assert replace(c, used=torch.zeros(6)).cost(2) == 0.0


@pytest.mark.parametrize("experts", [3, 9])
def test_experts_are_siblings_if_an_exact_mean_is_worth_two_bits(experts: int) -> None:
    """Two bits of a mean are two thirds of a bit for each of three experts: a factor of 4^(2/3).

    Three of nine, in a sample, save as much each, and a third as much will do.
    """
    c = case(output=False)
    mean = c.weight.mean(0, keepdim=True)
    apart = c.weight - mean
    found = set()
    for grow in (0.1, 0.3, 0.5, 1.0, 2.0, 4.0):
        other = replace(of_weights(c, apart + grow * mean), experts=experts)
        left, whole = (sum(energy(other, w)) for w in (apart, other.weight))
        assert other.siblings() == (whole > left * 4 ** (2 / experts)), grow
        found.add(other.siblings())
    assert found == {True, False}


@pytest.mark.parametrize("output", [True, False])
def test_a_basis_of_all_experts_earns_its_bits_if_enough_energy_of_the_sample_is_in_it(
    output: bool,
) -> None:
    c = case(output=output)
    all_of_them = [4, 0, 5, 1, 6, 2, 7]  # experts 1, 3 and 5 are the sample
    weight = torch.cat([c.weight, torch.randn(5, N, K)])[all_of_them]
    moment = torch.cat([c.metric.moment, drawn(9, experts=5, rows=N, columns=K)[1]])[all_of_them]
    c = replace(c, some=[1, 3, 5], experts=7)
    mean = common_mean(weight.mean(0, keepdim=True), 2, 0, input_side=True)
    basis = mean | factorize(mean.left_of(weight), moment, 3, input_side=True)
    left = [sum(energy(c, part.left_of(weight)[c.some])) for part in (mean, basis)]
    saved = math.log(left[0] / left[1], 4)
    assert saved > 0.05
    for share in (0.99, 1.01):
        assert c.earns(mean, basis, share * saved) == (share < 1)


def test_means_and_ranks_on_offer_follow_the_options() -> None:
    c = case(output=False)
    assert c.siblings()
    assert c.offers("auto", "auto") == ((0, 2, 3, 4), (0,))  # a fourth of 16 dimensions
    assert c.offers("off", 3) == ((0,), (3,)) and c.offers(3, 16) == ((3,), (16,))
    with pytest.raises(MoeccError, match="rank=17 is more than gate_up's 16 dimensions"):
        c.offers(2, 17)
    apart = of_weights(c, c.weight - c.weight.mean(0))
    assert apart.offers("auto", 1) == ((0,), (1,))
    wide = replace(c, weight=torch.randn(E, N, 128))
    assert wide.offers("off", "auto") == ((0,), (0, 4, 8, 16))
    down = replace(case(output=False, input_side=False), weight=torch.randn(E, 80, K))
    assert down.hidden == 80 and down.offers("off", "auto") == ((0,), (0, 4, 8, 16))
