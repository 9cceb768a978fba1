"""The slopes and offsets of `affine` against numpy, and the rows that an expert sees."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from coders import costs, from_blocks

from moecc.passes._code.moments import Routed
from moecc.passes._code.regression import CoupledSums, Sums, sums_of
from moecc.passes.affine import judged


@pytest.mark.parametrize("offset", [True, False])
def test_the_affine_line_against_numpy(offset: bool) -> None:
    """It is weighted least squares per channel, with 32 tokens of prior for slope 1, offset 0."""
    g = torch.Generator().manual_seed(0)
    v, weight = torch.randn(40, 3, generator=g), torch.rand(40, generator=g)
    t = (
        v * torch.tensor([0.9, 1.2, 1.0])
        + torch.tensor([0.5, 0.0, -0.2])
        + 0.1 * torch.randn(40, 3, generator=g)
    )
    slope, shift = Sums.of(v, t, weight).line(offset=offset)
    trust = 40 / (40 + 32)
    for n in range(3):
        x, y, w = (a.double().numpy() for a in (v[:, n], t[:, n], weight.sqrt()))
        columns = [x * w, w] if offset else [x * w]
        fit = np.linalg.lstsq(np.stack(columns, 1), y * w, rcond=None)[0]
        want = 1 + trust * (fit[0] - 1)
        assert float(slope[n]) == pytest.approx(want, abs=1e-5)
        share = weight.double().numpy() / float(weight.double().sum())
        residual = float((share * (y - want * x)).sum()) if offset else float(shift[n]) / trust
        assert float(shift[n]) == pytest.approx(trust * residual, abs=1e-5)


def test_sums_of_two_halves_give_the_line_and_the_error_of_the_whole() -> None:
    g = torch.Generator().manual_seed(1)
    v, t = torch.randn(30, 3, generator=g), torch.randn(30, 3, generator=g)
    weight = torch.rand(30, generator=g)
    whole = Sums.of(v, t, weight)
    halves = Sums.of(v[::2], t[::2], weight[::2]) + Sums.of(v[1::2], t[1::2], weight[1::2])
    torch.testing.assert_close(halves.line(), whole.line())
    slope, shift = whole.line()
    left = t.double() - slope * v.double() - shift
    want = float((weight[:, None].double() * left.square()).sum())
    assert halves.error(slope, shift) == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("coupled", [False, True])
def test_the_error_of_a_line_is_summed_over_tokens(coupled: bool) -> None:
    g = torch.Generator().manual_seed(2)
    v, t = torch.randn(2, 9, 6, generator=g).double()
    weight = torch.rand(9, generator=g).double()
    cost = costs(1.0, rows=6)[0, 0].double() if coupled else None
    sums = sums_of(v, t, weight, cost)
    assert isinstance(sums, CoupledSums if coupled else Sums) and sums.plain.count == 9
    metric = torch.eye(6).double() if cost is None else cost
    slope, shift = torch.rand(6, generator=g).double(), torch.randn(6, generator=g).double()
    for a, b in ((slope, shift), (slope, 0.0), (1.0, 0.0)):
        left = t - a * v - b
        want = sum(float(w * (r @ metric @ r)) for w, r in zip(weight, left, strict=True))
        assert sums.error(a, b) == pytest.approx(want, rel=1e-6)
    torch.testing.assert_close(sums.line(), sums.line(offset=True))
    assert not torch.equal(sums.line()[1], sums.line(offset=False)[1])


def test_the_affine_line_without_tokens_changes_nothing() -> None:
    slope, shift = Sums.of(torch.zeros(0, 3), torch.zeros(0, 3), torch.zeros(0)).line()
    assert bool((slope == 1).all()) and bool((shift == 0).all())


@pytest.mark.parametrize("offset", [True, False])
def test_slopes_under_output_costs_are_least_squares_together(offset: bool) -> None:
    g = torch.Generator().manual_seed(0)
    v, weight = torch.randn(4000, 6, generator=g).double(), torch.rand(4000, generator=g).double()
    t = 1.3 * v + 0.4 * v.roll(1, 1) + 0.2 + 0.1 * torch.randn(4000, 6, generator=g)
    cost = costs(1.0, rows=6)[0, 0].double()
    sums = CoupledSums.of(v[::2], t[::2], weight[::2], cost) + CoupledSums.of(
        v[1::2], t[1::2], weight[1::2], cost
    )
    slope, shift = sums.line(offset=offset)
    r = t - slope * v - shift
    want = float((weight * ((r @ cost) * r).sum(-1)).sum())
    assert sums.error(slope, shift) == pytest.approx(want, rel=1e-6)
    for near in (0.98, 1.02):  # only the prior of 32 tokens keeps it off the minimum
        assert sums.error(1 + near * (slope - 1), shift) > want * (1 - 1e-4)
    small = CoupledSums.of(v, t, weight, cost * 1e-12).line(offset=offset)
    torch.testing.assert_close(small[0], slope, rtol=1e-6, atol=1e-9)
    alone, alike = Sums.of(v, t, weight), CoupledSums.of(v, t, weight, torch.eye(6))
    for got, plain in zip(alike.line(offset=offset), alone.line(offset=offset), strict=True):
        torch.testing.assert_close(got, plain, rtol=1e-4, atol=1e-6)
    assert alike.error(slope, shift) == pytest.approx(alone.error(slope, shift), rel=1e-9)


def test_a_slot_without_weight_gives_an_expert_no_token() -> None:
    index = torch.tensor([[0, 1], [2, 0], [0, 0]])
    weight = torch.tensor([[0.0, 0.4], [0.3, 0.2], [0.0, 0.0]])
    routed = Routed(torch.randn(3, 4), index, weight, None)
    assert [routed.rows(e).tolist() for e in range(4)] == [[1], [0], [1], []]


@pytest.mark.parametrize("blocks", [1, 3])
def test_channels_are_judged_block_by_block_as_if_all_together(blocks: int) -> None:
    """Under costs of which every direction has at least a fifth of the mean."""
    g = torch.Generator().manual_seed(4)
    v, weight = torch.randn(200, 6, generator=g).double(), torch.rand(200, generator=g).double()
    t = 1.2 * v + 0.3 * v.roll(3, 1) + 0.1 + torch.randn(200, 6, generator=g)
    cost = costs(1.0, rows=6, blocks=blocks)[0].double()
    whole = from_blocks(cost)
    whole += 0.2 * whole.diagonal().mean() * torch.eye(6)
    found, parts = judged(v, t, weight, cost), (slice(0, None, 2), slice(1, None, 2))
    fit, rest = (CoupledSums.of(v[i], t[i], weight[i], whole) for i in parts)
    assert found.coded == pytest.approx(rest.error(1.0, 0.0), rel=1e-6)
    assert found.slope == pytest.approx(rest.error(fit.line(offset=False)[0], 0.0), rel=1e-6)
    assert found.both == pytest.approx(rest.error(*fit.line()), rel=1e-6)
    for offset, line in found.lines.items():
        torch.testing.assert_close(line, (fit + rest).line(offset=offset), rtol=1e-5, atol=1e-7)
    want = Sums.of(v, t, weight)
    torch.testing.assert_close(vars(found.sums), vars(want))
    alike = judged(v, t, weight, None)
    torch.testing.assert_close(alike.lines[True], want.line(), rtol=1e-6, atol=1e-9)
