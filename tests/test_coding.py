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
    from_blocks,
    loops,  # noqa: F401 (a fixture)
    random_state,
    scales,
    slow_nearest,
)
from torch import Tensor

from moecc.ir import vq4
from moecc.passes._code import codebooks as books_of
from moecc.passes._code import metric
from moecc.passes._code.codebooks import Nearest, clamp_codebook, kmeans, rounded
from moecc.passes._code.coder import Coder
from moecc.passes._code.feedback import choose, choose_rows, finders
from moecc.passes._code.metric import (
    apart,
    costly,
    damped,
    diagonal,
    feedback_factor,
    pivots,
    together,
    weighted,
    weighted_error,
)

# ---- measures

pytestmark = pytest.mark.usefixtures("loops")


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


@pytest.mark.parametrize("blocks", [1, 2])
def test_weighted_error_with_output_costs_against_the_loop(blocks: int) -> None:
    d, h = drawn(1)
    output = costs(1.0, rows=N, blocks=blocks)
    s = from_blocks(output)
    want = [
        sum(float(s[e, a, b] * (d[e, a] @ h[e] @ d[e, b])) for a in range(N) for b in range(N))
        for e in range(E)
    ]
    got = weighted_error(d, h, output)
    torch.testing.assert_close(got, torch.tensor(want), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(weighted(d, h, output), s @ d @ h)
    torch.testing.assert_close(weighted(d, h, None), d @ h)


def test_the_factor_of_feedback_gives_back_the_inverse() -> None:
    _, h = drawn(1)
    u = feedback_factor(h)
    assert torch.equal(u, u.triu())
    torch.testing.assert_close(u.mT @ u, torch.linalg.inv(h), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("blocks", [1, 2, 3, 6])
def test_blocks_of_costs_stand_for_the_matrix_with_zeros_beside_them(blocks: int) -> None:
    rows, s = torch.randn(E, N, 3), costs(1.0, rows=N, blocks=blocks)
    for b in range(blocks):
        assert torch.equal(apart(rows, blocks)[:, b], rows[:, b::blocks])
    assert torch.equal(together(apart(rows, blocks)), rows)
    torch.testing.assert_close(costly(rows, s), from_blocks(s) @ rows)
    assert torch.equal(diagonal(s), from_blocks(s).diagonal(dim1=-2, dim2=-1))
    torch.testing.assert_close(from_blocks(damped(s, 0.2)), damped(from_blocks(s), 0.2))
    left = together(pivots(s, 0.2).unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(left, pivots(from_blocks(s), 0.2))
    alike = pivots(s[:1].expand(4, -1, -1, -1), 0.2)
    assert torch.equal(alike, pivots(s[:1], 0.2).expand(4, -1, -1))


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


# ---- centroids


@pytest.mark.parametrize("bits", BITS)
def test_rounding_brings_the_largest_centroid_to_127(bits: int) -> None:
    """At 3 bit a centroid stands for half a unit more than its whole number."""
    centroids = torch.tensor([[[1.0, 0.51], [-0.25, 2.54]], [[-1.27, 0.1], [0.014, 0.3]]])
    book = rounded(centroids, bits)
    assert book.step.flatten().tolist() == pytest.approx([0.02, 0.01]) and book.step.ndim == 2
    exact = centroids / torch.tensor([0.02, 0.01]).view(2, 1, 1) - (0.5 if bits == 3 else 0)
    exact = exact.clamp(0 if bits == 3 else -127, 127)
    assert float((book.integers - exact).abs().max()) < 0.501
    assert torch.equal(book.integers, book.integers.round())
    nothing = rounded(torch.zeros(1, 2, 2), bits)
    assert float(nothing.step) == pytest.approx(1e-12) and not nothing.integers.any()


@pytest.mark.parametrize(("bits", "least"), [(2, -127), (3, 0), (4, -127)])
def test_a_codebook_is_clamped_by_rounding_to_the_range_of_the_format(
    bits: int, least: int
) -> None:
    values = torch.tensor([-300.0, -127.4, -0.6, 0.4, 0.6, 127.4, 300.0])
    want = [least, least, max(-1, least), 0, 1, 127, 127]
    assert clamp_codebook(values, bits).tolist() == want


def slow_kmeans(points: np.ndarray, cost: np.ndarray, turns: int, g: torch.Generator) -> np.ndarray:
    """Lloyd's algorithm with a cost per component; a centroid without points moves to a random one.

    Points start with a chance that follows their cost, as far as there are enough of them.
    """
    chance = torch.from_numpy((cost * points**2).sum(1) + 1e-9)
    start = torch.multinomial(chance, 256, replacement=len(points) < 256, generator=g)
    centroids = points[start.numpy()].copy()
    for _ in range(turns):
        nearest = np.array(
            [
                int((w * (p - centroids) ** 2).sum(1).argmin())
                for p, w in zip(points, cost, strict=True)
            ]
        )
        for c in range(256):
            own = nearest == c
            if own.any():
                centroids[c] = (cost[own] * points[own]).sum(0) / cost[own].sum(0)
        empty = [c for c in range(256) if c not in nearest]
        if empty:
            again = torch.randint(len(points), (len(empty),), generator=g)
            centroids[empty] = points[again.numpy()]
    return centroids


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    ("kind", "turns", "sample"), [("normal", 4, 1 << 14), ("normal", 2, 400), ("few", 1, 1 << 14)]
)
def test_centroids_of_kmeans_against_loops(
    bits: int, kind: str, turns: int, sample: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of few different points several centroids are alike, so that some of them have no points."""
    monkeypatch.setattr(books_of, "_SAMPLE", sample)
    v, g = vq4.group_size(bits), torch.Generator().manual_seed(bits)
    shape = 2, 20, 16 * v
    if kind == "few":
        target = torch.randint(-2, 3, shape, generator=g).double()
        importance = torch.randint(1, 3, (2, shape[-1]), generator=g).double()
    else:
        target = torch.randn(shape, generator=g).double()
        importance = 0.5 + torch.rand(2, shape[-1], generator=g).double()
    groups = list(itertools.product(range(2), range(20), range(16)))
    points = np.array([target[e, n, j * v : j * v + v].numpy() for e, n, j in groups])
    cost = np.array([importance[e, j * v : j * v + v].numpy() for e, _, j in groups])
    points = abs(points) if bits == 3 else points
    g = torch.Generator().manual_seed(11)
    if sample < len(points):
        chosen = torch.randint(len(points), (sample,), generator=g).numpy()
        points, cost = points[chosen], cost[chosen]
    want = torch.from_numpy(slow_kmeans(points, cost, turns, g)).unsqueeze(0)
    torch.testing.assert_close(
        kmeans(target, importance, bits=bits, seed=11, turns=turns), want, rtol=1e-6, atol=1e-6
    )


def test_centroids_hold_every_group_if_there_are_few() -> None:
    target = torch.randn(1, 2, 16, generator=torch.Generator().manual_seed(1))
    found = kmeans(target, torch.ones(1, 16), bits=2, seed=0, turns=15)[0]
    for group in target.reshape(-1, 4):
        assert float((found - group).abs().amax(1).min()) < 1e-6


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
