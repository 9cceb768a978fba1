"""Choosing codes against slow loops in float64: the measures, the nearest code, error feedback."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from coders import (
    BITS,
    E,
    K,
    N,
    codebooks,
    coder,
    costs,
    distance,
    drawn,
    error_of,
    random_state,
    scales,
    slow_nearest,
)
from torch import Tensor

from moecc.ir import vq4
from moecc.passes._code import metric
from moecc.passes._code.codebooks import Nearest
from moecc.passes._code.coder import Coder
from moecc.passes._code.feedback import choose, choose_rows, finders
from moecc.passes._code.metric import damped, feedback_factor, pivots, weighted, weighted_error

# ---- measures


def test_weighted_error_against_the_loop() -> None:
    d, h = drawn(1)
    want = [
        sum(
            d[e, n, i] * h[e, i, j] * d[e, n, j]
            for n in range(N)
            for i in range(K)
            for j in range(K)
        )
        for e in range(E)
    ]
    torch.testing.assert_close(weighted_error(d, h), torch.stack(want), rtol=1e-4, atol=1e-4)


def test_damping_adds_a_share_of_the_mean_diagonal() -> None:
    _, h = drawn(1)
    got = damped(h, 0.01)
    for e in range(E):
        share = 0.01 * float(h[e].diagonal().mean())
        torch.testing.assert_close(got[e], h[e] + share * torch.eye(K))
    assert bool(torch.linalg.eigvalsh(damped(torch.zeros(1, K, K))).min() > 0)


def test_weighted_error_with_output_costs_against_the_loop() -> None:
    d, h = drawn(1)
    s = costs(1.0)[:, :N, :N]
    want = [
        sum(float(s[e, a, b] * (d[e, a] @ h[e] @ d[e, b])) for a in range(N) for b in range(N))
        for e in range(E)
    ]
    torch.testing.assert_close(weighted_error(d, h, s), torch.tensor(want), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(weighted(d, h, s), s @ d @ h)
    torch.testing.assert_close(weighted(d, h, None), d @ h)


def test_the_factor_of_feedback_gives_back_the_inverse() -> None:
    _, h = drawn(1)
    u = feedback_factor(h)
    assert torch.equal(u, u.triu())
    torch.testing.assert_close(u.mT @ u, torch.linalg.inv(h), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("share", [0.01, 0.2])
def test_pivots_are_what_later_columns_cannot_make_up_for(share: float) -> None:
    _, h = drawn(2)
    got = pivots(h, share)
    for e, m in enumerate(h.double().numpy()):
        m = m + share * np.diag(m).mean() * np.eye(K)
        order = np.argsort(-np.diag(m), kind="stable").tolist()
        for i, k in enumerate(order):
            later = order[i + 1 :]
            made_up = m[k, later] @ np.linalg.solve(m[np.ix_(later, later)], m[later, k])
            assert float(got[e, k]) == pytest.approx(m[k, k] - made_up, rel=1e-4)
    assert torch.equal(pivots(h), pivots(h, 0.01))


def test_pivots_of_one_shared_matrix_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    _, h = drawn(2)
    want = pivots(h[:1], 0.2).expand(5, -1)
    monkeypatch.setattr("moecc.passes._code.metric.AT_ONCE", 1)  # one expert at a time
    assert torch.equal(pivots(h), torch.cat([pivots(h[:1]), pivots(h[1:])]))
    calls: list[int] = []
    real = metric._pivots
    monkeypatch.setattr(metric, "_pivots", lambda m: calls.append(len(m)) or real(m))
    assert torch.equal(pivots(h[:1].expand(5, -1, -1), 0.2), want) and calls == [1]


@pytest.mark.parametrize("bits", BITS)
def test_lookup_equals_the_decode_of_the_format(bits: int) -> None:
    _, s = random_state(bits)
    signs = None if s.negative is None else vq4.pack_signs(s.negative)
    want = vq4.decode(s.codes.to(torch.uint8), signs, s.codebook.to(torch.int8), K, torch.float32)
    assert torch.equal(s.unscaled(), want)


def metrics(v: int, seed: int, *, diagonal: bool = False) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    if diagonal:
        return torch.diag_embed(0.5 + torch.rand(E, v, generator=g))
    return torch.eye(v) + 0.4 * torch.randn(E, v, v, generator=g)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("books", [1, E])
def test_nearest_against_brute_force(bits: int, diagonal: bool, books: int) -> None:
    v = vq4.group_size(bits)
    metric, table = metrics(v, bits, diagonal=diagonal), codebooks(bits, books=books, size=40)
    t = torch.randn(E, 12, v, generator=torch.Generator().manual_seed(7)) * 60
    code, negative, q = Nearest(table, metric, bits)(t)
    for e, n in itertools.product(range(E), range(12)):
        args = [x.double().numpy() for x in (t[e, n], table[e % books], metric[e])]
        _, want = slow_nearest(args[0], args[1], args[2], bits)
        got = distance(args[0], q[e, n].double().numpy(), args[2])
        least = distance(args[0], want, args[2])
        assert got <= least * (1 + 1e-4) + 1e-3
        p = table[e % books, code[e, n]]
        assert torch.equal(
            q[e, n], p if negative is None else torch.where(negative[e, n], -1 - p, p)
        )


def test_three_bit_signs_are_the_best_ones_under_a_diagonal_metric() -> None:
    """Try all 16 sign patterns of every code: following the signs of t + 1/2 loses nothing."""
    metric, table = metrics(4, 2, diagonal=True), codebooks(3, size=12)
    t = torch.randn(E, 8, 4, generator=torch.Generator().manual_seed(8)) * 60
    q = Nearest(table, metric, 3)(t)[2]
    for e, n in itertools.product(range(E), range(8)):
        args = [x.double().numpy() for x in (t[e, n], metric[e])]
        every = (
            np.array([-1 - c if s else c for c, s in zip(p, pattern, strict=True)])
            for p in table[e].double().numpy()
            for pattern in itertools.product((False, True), repeat=4)
        )
        least = min(distance(args[0], each, args[1]) for each in every)
        assert distance(args[0], q[e, n].double().numpy(), args[1]) <= least * (1 + 1e-4) + 1e-3


# ---- choosing codes


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("books", [1, E])
def test_without_feedback_each_group_takes_its_nearest_code(bits: int, books: int) -> None:
    c = coder(bits, feedback=False)
    s, v = scales(c), vq4.group_size(bits)
    table = codebooks(bits, books=books)
    chosen = choose(c, table, s)
    importance = c.moment.diagonal(dim1=-2, dim2=-1)
    got = chosen.unscaled().double().numpy()
    for e, n, g in itertools.product(range(E), range(N), range(K // v)):
        cols = slice(g * v, g * v + v)
        t = (c.target[e, n, cols] / s[e, n]).double().numpy()
        metric = torch.diag(importance[e, cols].sqrt()).double().numpy()
        _, want = slow_nearest(t, table[e % books].double().numpy(), metric, bits)
        assert distance(t, got[e, n, cols], metric) <= distance(t, want, metric) * (1 + 1e-4) + 1e-3


def slow_feedback(c: Coder, table: np.ndarray, e: int, n: int, scale: float) -> np.ndarray:
    """Code one row with error feedback, by its definition.

    Before each group, the columns that are not coded yet take the values that best correct the
    errors made so far (least squares under H). The group's metric is H's Schur complement on it.
    """
    v, h = c.v, c.moment[e].double().numpy()
    w = c.target[e, n].double().numpy() / scale
    q, coded = np.zeros(K), []
    for group in c.order[e].tolist():
        here = list(range(group * v, group * v + v))
        rest = [k for k in range(K) if k not in coded]
        after = [k for k in rest if k not in here]
        free = w.copy()
        if coded:
            free[rest] -= np.linalg.solve(
                h[np.ix_(rest, rest)], h[np.ix_(rest, coded)] @ (q[coded] - w[coded])
            )
        schur = h[np.ix_(here, here)].copy()
        if after:
            cross = h[np.ix_(here, after)]
            schur -= cross @ np.linalg.solve(h[np.ix_(after, after)], cross.T)
        _, q[here] = slow_nearest(free[here], table, np.linalg.cholesky(schur), c.bits)
        coded += here
    return q


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("block", [8, 128])
def test_error_feedback_against_least_squares_at_every_step(bits: int, block: int) -> None:
    c = coder(bits)
    table, s = codebooks(bits), scales(c)
    chosen = (
        choose_rows(c, c.target, table, s, finders(c, table), block=block)
        .unscaled()
        .double()
        .numpy()
    )
    same, total, errors = 0, 0, np.zeros(2)
    for e, n in itertools.product(range(E), range(N)):
        want = slow_feedback(c, table[e].double().numpy(), e, n, float(s[e, n]))
        same, total = same + int((want == chosen[e, n]).sum()), total + K
        h, w = c.moment[e].double().numpy(), c.target[e, n].double().numpy() / float(s[e, n])
        errors += [(d := q - w) @ h @ d for q in (want, chosen[e, n])]
    # float32 may break a tie the other way, which changes the rest of that row
    assert same >= 0.95 * total
    assert errors[1] <= 1.02 * errors[0]


@pytest.mark.parametrize("bits", BITS)
def test_feedback_lowers_the_error(bits: int) -> None:
    c, plain = coder(bits, rows=24), coder(bits, rows=24, feedback=False)
    table, s = codebooks(bits), scales(c)
    assert float(error_of(c, choose(c, table, s)).sum()) < float(
        error_of(c, choose(plain, table, s)).sum()
    )
