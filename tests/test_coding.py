"""The arithmetic of coding against slow loops in float64: nearest codes, error feedback, refits, the shared basis."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layers import bits_of
from torch import Tensor

from moecc.ir import vq4
from moecc.passes._code import coding
from moecc.passes._code.basis import factorize, square_root
from moecc.passes._code.codebooks import Nearest
from moecc.passes._code.coding import Coded, _Coder, encode, encode_in_parts, pad_columns
from moecc.passes._code.metric import damped, weighted_error
from moecc.passes._code.moments import Routed
from moecc.passes.affine import CoupledSums, Sums
from moecc.pipeline.bits import basis_bits, coded_bits

E, N, K = 2, 6, 16
BITS = [2, 3, 4]


def drawn(
    seed: int = 0, *, experts: int = E, rows: int = N, columns: int = K
) -> tuple[Tensor, Tensor]:
    """Weights [E, N, K] with rows of about one, and full second moments [E, K, K] of unequal columns."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(experts, 3 * columns, columns, generator=g) * torch.linspace(0.3, 2.0, columns)
    mixed = x + 0.7 * x.roll(1, -1) + 0.4 * torch.randn(experts, 3 * columns, 1, generator=g)
    return torch.randn(experts, rows, columns, generator=g), mixed.mT @ mixed / x.shape[1]


def codebooks(bits: int, seed: int = 0, *, books: int = E, size: int = 256) -> Tensor:
    g = torch.Generator().manual_seed(100 + seed)
    v = vq4.group_size(bits)
    low = 0 if bits == 3 else -127
    return torch.randint(low, 128, (books, size, v), generator=g).float()


def coder(
    bits: int, seed: int = 0, *, feedback: bool = True, output: Tensor | None = None, **shape: int
) -> _Coder:
    weight, moment = drawn(seed, **shape)
    importance = moment.diagonal(dim1=-2, dim2=-1)
    return _Coder(
        weight, moment, importance / importance.mean(-1, keepdim=True), bits, feedback, output
    )


def scales(c: _Coder) -> Tensor:
    """Row scales that bring codebooks of -127..127 to the weights' size, unequal and not the best ones."""
    rows = c.target.shape[:2]
    return 0.02 + 0.01 * torch.rand(rows, generator=torch.Generator().manual_seed(3))


def state(bits: int, seed: int = 0, *, books: int = E) -> tuple[_Coder, Coded]:
    c = coder(bits, seed)
    return c, c.choose(codebooks(bits, seed, books=books), scales(c))


def random_state(bits: int, seed: int = 0, *, books: int = E) -> tuple[_Coder, Coded]:
    """Codes and signs that nobody chose."""
    c, g = coder(bits, seed), torch.Generator().manual_seed(seed)
    codes = torch.randint(256, (E, N, K // vq4.group_size(bits)), generator=g)
    negative = torch.rand(E, N, K, generator=g) < 0.5 if bits == 3 else None
    return c, Coded(codes, negative, codebooks(bits, seed, books=books), scales(c))


def error_of(c: _Coder, s: Coded) -> Tensor:
    """tr(D H D^T) per expert by the definition, in float64."""
    d, h = (s.dense().double() - c.target.double()), c.moment.double()
    found = [sum(float(row @ h[e] @ row) for row in d[e]) for e in range(len(d))]
    if c.output is not None:
        found = [
            float(torch.trace(c.output[e].double() @ d[e] @ h[e] @ d[e].T)) for e in range(len(d))
        ]
    return torch.tensor(found, dtype=torch.float64)


def never_more(after: Tensor, before: Tensor) -> None:
    assert bool((after <= before * (1 + 1e-5) + 1e-9).all()), (before.tolist(), after.tolist())


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


@pytest.mark.parametrize("bits", BITS)
def test_lookup_is_the_format_s_decode(bits: int) -> None:
    _, s = random_state(bits)
    signs = None if s.negative is None else vq4.pack_signs(s.negative)
    want = vq4.decode(s.codes.to(torch.uint8), signs, s.codebook.to(torch.int8), K, torch.float32)
    assert torch.equal(s.unscaled(), want)


# ---- nearest


def distance(t: np.ndarray, q: np.ndarray, metric: np.ndarray) -> float:
    """|(t - q) M|^2, component by component."""
    d = t - q
    image = [sum(d[i] * metric[i, j] for i in range(len(d))) for j in range(len(d))]
    return sum(y * y for y in image)


def slow_nearest(
    t: np.ndarray, table: np.ndarray, metric: np.ndarray, bits: int
) -> tuple[int, np.ndarray]:
    """Brute force over all codes; at 3 bit with the signs that t + 1/2 has."""
    best, chosen, least = 0, table[0], np.inf
    for code, p in enumerate(table):
        q = np.array(
            [-1 - c if bits == 3 and x + 0.5 < 0 else c for c, x in zip(p, t, strict=True)]
        )
        d = distance(t, q, metric)
        if d < least:
            best, chosen, least = code, q, d
    return best, chosen


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
        got, least = (
            distance(args[0], q[e, n].double().numpy(), args[2]),
            distance(args[0], want, args[2]),
        )
        assert got <= least * (1 + 1e-4) + 1e-3
        p = table[e % books, code[e, n]]
        assert torch.equal(
            q[e, n], p if negative is None else torch.where(negative[e, n], -1 - p, p)
        )


def test_three_bit_signs_are_the_best_ones_under_a_diagonal_metric() -> None:
    """All 16 sign patterns of every code are tried: following the signs of t + 1/2 loses nothing."""
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
def test_without_feedback_each_group_takes_its_nearest(bits: int, books: int) -> None:
    c = coder(bits, feedback=False)
    s, v = scales(c), vq4.group_size(bits)
    table = codebooks(bits, books=books)
    chosen = c.choose(table, s)
    importance = c.moment.diagonal(dim1=-2, dim2=-1)
    got = chosen.unscaled().double().numpy()
    for e, n, g in itertools.product(range(E), range(N), range(K // v)):
        cols = slice(g * v, g * v + v)
        t = (c.target[e, n, cols] / s[e, n]).double().numpy()
        metric = torch.diag(importance[e, cols].sqrt()).double().numpy()
        _, want = slow_nearest(t, table[e % books].double().numpy(), metric, bits)
        assert distance(t, got[e, n, cols], metric) <= distance(t, want, metric) * (1 + 1e-4) + 1e-3


def slow_feedback(c: _Coder, table: np.ndarray, e: int, n: int, scale: float) -> np.ndarray:
    """One row with error feedback from the definition.

    Before each group, the columns not yet coded take the values that make up best for the errors so far (least squares
    under H); the group's metric is H's Schur complement on it.
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
        c._choose(c.target, table, s, c._finders(table), block=block).unscaled().double().numpy()
    )
    same, total, errors = 0, 0, np.zeros(2)
    for e, n in itertools.product(range(E), range(N)):
        want = slow_feedback(c, table[e].double().numpy(), e, n, float(s[e, n]))
        same, total = same + int((want == chosen[e, n]).sum()), total + K
        h, w = c.moment[e].double().numpy(), c.target[e, n].double().numpy() / float(s[e, n])
        errors += [(d := q - w) @ h @ d for q in (want, chosen[e, n])]
    assert (
        same >= 0.95 * total
    )  # a tie that float32 breaks otherwise changes what follows in its row
    assert errors[1] <= 1.02 * errors[0]


@pytest.mark.parametrize("bits", BITS)
def test_feedback_pays(bits: int) -> None:
    c, plain = coder(bits, rows=24), coder(bits, rows=24, feedback=False)
    table, s = codebooks(bits), scales(c)
    assert float(error_of(c, c.choose(table, s)).sum()) < float(
        error_of(c, plain.choose(table, s)).sum()
    )


def costs(likeness: float, seed: int = 0, rows: int = 64) -> Tensor:
    """Costs [E, N, N] of output errors: full, and the rows the more alike the larger `likeness`."""
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(E, rows, 4 * rows, generator=g) + likeness * torch.randn(
        E, 1, 4 * rows, generator=g
    )
    return a @ a.mT / a.shape[-1]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("likeness", [1.0, 10.0])
def test_codes_follow_the_cost_of_output_errors(bits: int, likeness: float) -> None:
    weight, moment = drawn(5, rows=64, columns=64)
    cost = costs(likeness)
    plain, knowing = (
        encode(weight, moment, output, bits=bits, shared=False, seed=0).dense() - weight
        for output in (None, cost)
    )
    assert float(weighted_error(knowing, moment, cost).sum()) < 0.95 * float(
        weighted_error(plain, moment, cost).sum()
    )
    # the rows stand where they stood
    assert float(weighted_error(knowing, moment).sum()) < 0.5 * float(
        weighted_error(weight, moment).sum()
    )


@pytest.mark.parametrize("size", [1e-12, 1e12])
def test_codes_do_not_depend_on_the_unit_of_costs(size: float) -> None:
    weight, moment = drawn(5, rows=32)
    cost = costs(1.0, rows=32)
    want, got = (
        encode(weight, moment, c, bits=2, shared=False, seed=0) for c in (cost, cost * size)
    )
    errors = [float(weighted_error(c.dense() - weight, moment, cost).sum()) for c in (want, got)]
    assert errors[1] == pytest.approx(errors[0], rel=0.1)


def test_equal_costs_are_none() -> None:
    weight, moment = drawn(5, rows=64, columns=64)
    plain, same = (
        float(
            weighted_error(
                encode(weight, moment, c, bits=2, shared=False, seed=0).dense() - weight, moment
            ).sum()
        )
        for c in (None, torch.eye(64).expand(E, -1, -1))
    )
    assert abs(same / plain - 1) < 0.01


@given(bits=st.sampled_from(BITS), seed=st.integers(0, 10_000), likeness=st.floats(0, 30))
def test_a_sweep_under_output_costs_never_increases_the_error(
    bits: int, seed: int, likeness: float
) -> None:
    c = coder(bits, seed, rows=24, output=costs(likeness, seed, 24))
    s = c.choose(codebooks(bits, seed), scales(c))
    swept = c.sweep(s)
    # rows of a block move together, so a step may overshoot a little
    assert bool((error_of(c, swept) <= 1.05 * error_of(c, s)).all())


def test_refits_under_output_costs_are_least_squares() -> None:
    c = coder(2, rows=24, output=costs(2.0, rows=24))
    s = c.choose(codebooks(2), scales(c))
    refit, q = c.refit_scale(s), s.unscaled().double()
    assert c.output is not None
    for e in range(E):
        left, right = (
            torch.linalg.cholesky(c.output[e].double()).T,
            torch.linalg.cholesky(c.moment[e].double()),
        )
        columns = torch.stack(
            [(left[:, n : n + 1] @ q[e, n : n + 1] @ right).flatten() for n in range(24)], 1
        )
        want = torch.linalg.lstsq(
            columns, (left @ c.target[e].double() @ right).flatten().unsqueeze(1)
        ).solution
        torch.testing.assert_close(refit.scale[e].double(), want.squeeze(1), rtol=2e-3, atol=1e-6)
    assert float(error_of(c, c.refit_codebook(s)).sum()) < float(error_of(c, s).sum())


# ---- refits


@pytest.mark.parametrize("start", [state, random_state])
@given(bits=st.sampled_from(BITS), seed=st.integers(0, 10_000), books=st.sampled_from([1, E]))
def test_a_sweep_never_increases_the_error(start: Any, bits: int, seed: int, books: int) -> None:
    c, s = start(bits, seed, books=books)
    never_more(error_of(c, c.sweep(s)), error_of(c, s))


@pytest.mark.parametrize("start", [state, random_state])
@given(bits=st.sampled_from(BITS), seed=st.integers(0, 10_000), books=st.sampled_from([1, E]))
def test_refitting_scales_never_increases_the_error(
    start: Any, bits: int, seed: int, books: int
) -> None:
    c, s = start(bits, seed, books=books)
    refit = c.refit_scale(s)
    never_more(error_of(c, refit), error_of(c, s))
    assert bool((refit.scale > 0).all())


def test_refitted_scales_are_each_row_s_least_squares() -> None:
    c, s = state(2)
    refit, q = c.refit_scale(s), s.unscaled().double()
    for e, n in itertools.product(range(E), range(N)):
        h, w = c.moment[e].double(), c.target[e, n].double()
        want = float(q[e, n] @ h @ w) / float(q[e, n] @ h @ q[e, n])
        assert float(refit.scale[e, n]) == pytest.approx(want, rel=1e-4)


def test_a_row_coded_to_zero_keeps_its_scale() -> None:
    c, s = state(2)
    zero = dataclasses.replace(s, codebook=torch.zeros_like(s.codebook))
    assert torch.equal(c.refit_scale(zero).scale, s.scale)


def unrounded(c: _Coder, s: Coded, monkeypatch: pytest.MonkeyPatch, turns: int = 12) -> Coded:
    with monkeypatch.context() as m:
        m.setattr(c, "_rescaled", lambda before, book: dataclasses.replace(before, codebook=book))
        return c.refit_codebook(s, turns)


@pytest.mark.parametrize("start", [state, random_state])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("books", [1, E])
@pytest.mark.parametrize("seed", range(5))
def test_refitting_codebooks_never_increases_the_error(
    start: Any, bits: int, books: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    c, s = start(bits, seed, books=books)
    before, after = error_of(c, s), error_of(c, unrounded(c, s, monkeypatch))
    never_more(after, before) if books == E else never_more(after.sum(), before.sum())


@pytest.mark.parametrize("bits", BITS)
def test_a_refitted_codebook_is_the_least_squares_one(
    bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against numpy's solution for one shared codebook: a column of the design matrix per centroid component."""
    c, s = random_state(bits, books=1)
    v = c.v
    fixed = (
        dataclasses.replace(s, codebook=torch.zeros_like(s.codebook)).dense().double().numpy()
    )  # -1 where negative
    design, wanted = [], []
    for e, n in itertools.product(range(E), range(N)):
        root = np.linalg.cholesky(c.moment[e].double().numpy())
        row = np.zeros((K, 256 * v))
        for k in range(K):
            sign = -1.0 if s.negative is not None and bool(s.negative[e, n, k]) else 1.0
            row[k, int(s.codes[e, n, k // v]) * v + k % v] = sign * float(s.scale[e, n])
        design.append(root.T @ row)
        wanted.append(root.T @ (c.target[e, n].double().numpy() - fixed[e, n]))
    a, b = np.concatenate(design), np.concatenate(wanted)
    solution = np.linalg.lstsq(a, b, rcond=None)[0]
    least, start = float(((a @ solution - b) ** 2).sum()), float(error_of(c, s).sum())
    got = float(error_of(c, unrounded(c, s, monkeypatch, turns=400)).sum())
    assert got <= least + 1e-3 * (start - least)


@pytest.mark.parametrize("bits", BITS)
def test_rounding_a_codebook_moves_each_weight_by_half_a_step(
    bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    c, s = state(bits)
    exact = unrounded(c, s, monkeypatch)
    if (
        bits == 3
    ):  # decode is symmetric about -1/2, so a centroid below it is clamped; those are not about rounding
        exact = dataclasses.replace(exact, codebook=exact.codebook.clamp(min=-0.5))
    stored = c._rescaled(s, exact.codebook)
    assert torch.equal(stored.codebook, stored.codebook.round())
    assert float(stored.codebook.max()) <= 127 and float(stored.codebook.min()) >= (
        0 if bits == 3 else -127
    )
    step = stored.scale.unsqueeze(-1).expand_as(c.target)
    moved = (stored.dense() - exact.dense()).abs()
    if (
        bits == 3
    ):  # growing keeps -1/2 fixed: the weights shift by (grow - 1) / 2 of the old step, half a new one at most
        assert bool((moved <= 1.01 * (step + s.scale.unsqueeze(-1))).all())
    else:
        assert bool((moved <= 0.501 * step).all())


# ---- the whole of it


def relative(weight: Tensor, moment: Tensor, coded: Coded) -> float:
    return float(
        weighted_error(coded.dense() - weight, moment).sum() / weighted_error(weight, moment).sum()
    )


def recorded(monkeypatch: pytest.MonkeyPatch, at_once: int) -> list[int]:
    """Numbers of weights that are coded together from now on, at most `at_once` of them."""
    sizes: list[int] = []

    def spy(weight: Tensor, *args: Any, **options: Any) -> Coded:
        sizes.append(weight.numel())
        return encode(weight, *args, **options)

    monkeypatch.setattr(coding, "encode", spy)
    monkeypatch.setattr(coding, "AT_ONCE", at_once)
    return sizes


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("coupled", [False, True])
def test_a_shared_codebook_of_a_large_layer_is_fitted_to_a_sample(
    bits: int, coupled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, moment = drawn(experts=12, rows=256, columns=32)
    output = drawn(5, experts=12, columns=256)[1] if coupled else None
    whole = encode(weight, moment, output, bits=bits, shared=True, seed=0)
    sizes = recorded(monkeypatch, weight.numel() // 4)
    got = encode_in_parts(weight, moment, output, bits=bits, shared=True, seed=0)
    assert len(sizes) == 1 + 4 and max(sizes) <= weight.numel() // 4
    assert got.codebook.shape == whole.codebook.shape and got.scale.shape == whole.scale.shape
    errors = [float(weighted_error(c.dense() - weight, moment, output).sum()) for c in (whole, got)]
    assert errors[1] < 1.06 * errors[0]


@pytest.mark.parametrize("shared", [True, False])
def test_experts_that_fit_are_coded_together(shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, moment = drawn(experts=4, rows=32)
    want = encode(weight, moment, bits=3, shared=shared, seed=0)
    sizes = recorded(monkeypatch, weight.numel())
    got = encode_in_parts(weight, moment, bits=3, shared=shared, seed=0)
    assert sizes == [weight.numel()]
    assert all(
        torch.equal(a, b) for a, b in zip(vars(want).values(), vars(got).values(), strict=True)
    )


@pytest.mark.parametrize("shared", [True, False])
@given(seed=st.integers(0, 10_000))
def test_error_falls_as_bits_rise(shared: bool, seed: int) -> None:
    weight, moment = drawn(seed, rows=96, columns=32)
    errors = [
        relative(weight, moment, encode(weight, moment, bits=b, shared=shared, seed=0, rounds=2))
        for b in BITS
    ]
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shared", [True, False])
def test_what_encode_returns_can_be_stored(bits: int, shared: bool) -> None:
    weight, moment = drawn(2)
    coded = encode(weight, moment, bits=bits, shared=shared, seed=0)
    v = vq4.group_size(bits)
    assert (
        coded.codes.shape == (E, N, K // v)
        and 0 <= int(coded.codes.min()) <= int(coded.codes.max()) <= 255
    )
    assert coded.codebook.shape == (1 if shared else E, 256, v)
    assert torch.equal(coded.codebook, coded.codebook.to(torch.int8).float())
    assert (coded.negative is not None) == (bits == 3) and bool((coded.scale > 0).all())
    assert bits != 3 or int(coded.codebook.min()) >= 0
    stored = coded.stored()
    assert tuple(stored) == vq4.CODED and (stored["signs"] is None) == (bits != 3)
    assert [t.dtype for t in stored.values() if t is not None and t.dtype != torch.uint8] == [
        torch.int8,
        torch.float16,
    ]
    part: Any = {vq4.MEAN + n: t for n, t in stored.items()}
    torch.testing.assert_close(
        vq4.mean_part(part, K, torch.float32), coded.dense(), rtol=1e-3, atol=1e-6
    )
    assert bits_of(stored) == coded_bits(E, N, K, bits, books=1 if shared else E)


@pytest.mark.parametrize("bits", BITS)
def test_the_same_seed_gives_the_same_codes(bits: int) -> None:
    weight, moment = drawn(3)
    first, again = (encode(weight, moment, bits=bits, shared=False, seed=5) for _ in range(2))
    assert all(
        torch.equal(a, b)
        for a, b in (
            (first.codes, again.codes),
            (first.codebook, again.codebook),
            (first.scale, again.scale),
        )
    )


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("columns", [12, 13])
def test_padded_columns_cost_nothing(bits: int, columns: int) -> None:
    weight, moment = drawn(4, rows=64, columns=columns)
    wide, wide_moment = pad_columns(weight, moment)
    assert wide.shape[-1] == 16 and wide_moment.shape[-2:] == (16, 16)
    assert (
        not wide[..., columns:].any()
        and not wide_moment[:, columns:].any()
        and not wide_moment[..., columns:].any()
    )
    coded = encode(wide, wide_moment, bits=bits, shared=False, seed=0)
    kept = weighted_error(coded.dense()[..., :columns] - weight, moment)
    torch.testing.assert_close(kept, weighted_error(coded.dense() - wide, wide_moment))
    assert float((kept / weighted_error(weight, moment)).max()) < {2: 0.3, 3: 0.06, 4: 0.02}[bits]


def test_a_multiple_of_eight_is_not_padded() -> None:
    weight, moment = drawn(4)
    assert pad_columns(weight, moment) == (weight, moment)


def test_rows_of_zeros_stay_zero_and_finite() -> None:
    weight, moment = drawn(5)
    weight[:, 1] = 0
    coded = encode(weight, moment, bits=2, shared=False, seed=0)
    assert (
        bool(torch.isfinite(coded.dense()).all()) and float(coded.dense()[:, 1].abs().max()) < 1e-9
    )


def test_an_expert_that_saw_nothing_is_coded_all_the_same() -> None:
    weight, moment = drawn(6)
    moment[0] = 0
    coded = encode(weight, moment, bits=2, shared=False, seed=0)
    error = (coded.dense() - weight)[0].square().sum() / weight[0].square().sum()
    assert bool(torch.isfinite(coded.dense()).all()) and float(error) < 0.5


# ---- the shared basis and the affine line


def test_square_root() -> None:
    _, h = drawn(1)
    root, inverse = square_root(h)
    torch.testing.assert_close(root @ root, h, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(root @ inverse, torch.eye(K).expand(E, -1, -1), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("input_side", [True, False])
@pytest.mark.parametrize("rank", [1, 3])
def test_the_shared_basis_against_numpy_s_svd(input_side: bool, rank: int) -> None:
    weight, moment = drawn(7, experts=3, rows=10, columns=8)
    shared = factorize(weight, moment, rank, input_side=input_side)
    got = (weight - shared.left_of(weight)).double().numpy()
    w, h = weight.double().numpy(), moment.double().numpy()
    if input_side:
        c = h.mean(0)
        c = c + np.eye(8) * (1e-3 * np.diag(c).mean())
        values, vectors = np.linalg.eigh(c)
        root, inverse = (vectors * values**p @ vectors.T for p in (0.5, -0.5))
        v = np.linalg.svd(np.concatenate(list(w @ root)))[2][:rank].T
        want = w @ root @ v @ v.T @ inverse
    else:
        parts = []
        for e in range(3):
            c = h[e] + np.eye(8) * (1e-3 * np.diag(h[e]).mean())
            parts.append(
                w[e] @ np.linalg.cholesky(c)
            )  # any root of C has the same left singular vectors
        u = np.linalg.svd(np.concatenate(parts, axis=1))[0][:, :rank]
        want = u @ u.T @ w
    assert np.abs(got - want).max() <= 0.01 * np.abs(want).max()


def test_a_full_basis_leaves_only_rounding() -> None:
    weight, moment = drawn(8, experts=3, rows=10, columns=8)
    for input_side, rank in ((True, 8), (False, 10)):
        left = factorize(weight, moment, rank, input_side=input_side).left_of(weight)
        assert float(left.abs().max()) < 0.03 * float(weight.abs().max())


def test_a_stored_basis_has_the_format_s_shapes() -> None:
    weight, moment = drawn(8, experts=3, rows=10, columns=8)
    for input_side, basis, coef in ((True, (2, 8), (3, 10, 2)), (False, (2, 10), (3, 2, 8))):
        got = factorize(weight, moment, 2, input_side=input_side)
        want = {
            "basis": (basis, torch.float16),
            "coef": (coef, torch.int8),
            "coef_scale": (coef[:2], torch.float16),
        }
        assert {
            n: (tuple(t.shape), t.dtype) for n, t in got.tensors.items() if t is not None
        } == want
        bits = 16 * math.prod(basis) + 8 * math.prod(coef) + 16 * math.prod(coef[:2])
        assert bits_of(got.tensors) == bits == basis_bits(2, 3, 10, 8, input_side=input_side)
    assert basis_bits(0, 3, 10, 8, input_side=True) == 0


@pytest.mark.parametrize("offset", [True, False])
def test_the_affine_line_against_numpy(offset: bool) -> None:
    """Weighted least squares per channel, drawn towards slope 1 and offset 0 by 32 tokens."""
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
    v, t, weight = (
        torch.randn(30, 3, generator=g),
        torch.randn(30, 3, generator=g),
        torch.rand(30, generator=g),
    )
    whole, halves = (
        Sums.of(v, t, weight),
        Sums.of(v[::2], t[::2], weight[::2]) + Sums.of(v[1::2], t[1::2], weight[1::2]),
    )
    torch.testing.assert_close(halves.line(), whole.line())
    slope, shift = whole.line()
    want = float(
        (weight[:, None].double() * (t.double() - slope * v.double() - shift).square()).sum()
    )
    assert halves.error(slope, shift) == pytest.approx(want, rel=1e-5)


def test_the_affine_line_without_tokens_changes_nothing() -> None:
    slope, shift = Sums.of(torch.zeros(0, 3), torch.zeros(0, 3), torch.zeros(0)).line()
    assert bool((slope == 1).all()) and bool((shift == 0).all())


@pytest.mark.parametrize("offset", [True, False])
def test_slopes_under_output_costs_are_least_squares_together(offset: bool) -> None:
    g = torch.Generator().manual_seed(0)
    v, weight = torch.randn(4000, 6, generator=g).double(), torch.rand(4000, generator=g).double()
    t = 1.3 * v + 0.4 * v.roll(1, 1) + 0.2 + 0.1 * torch.randn(4000, 6, generator=g)
    cost = costs(1.0, rows=6)[0].double()
    sums = CoupledSums.of(v[::2], t[::2], weight[::2], cost) + CoupledSums.of(
        v[1::2], t[1::2], weight[1::2], cost
    )
    slope, shift = sums.line(offset=offset)
    r = t - slope * v - shift
    want = float((weight * ((r @ cost) * r).sum(-1)).sum())
    assert sums.error(slope, shift) == pytest.approx(want, rel=1e-6)
    for near in (0.98, 1.02):  # the prior of a few tokens is all that keeps it from the minimum
        assert sums.error(1 + near * (slope - 1), shift) > want * (1 - 1e-4)
    small = CoupledSums.of(v, t, weight, cost * 1e-12).line(offset=offset)
    torch.testing.assert_close(small[0], slope, rtol=1e-6, atol=1e-9)
    alone, alike = Sums.of(v, t, weight), CoupledSums.of(v, t, weight, torch.eye(6))
    for got, plain in zip(alike.line(offset=offset), alone.line(offset=offset), strict=True):
        torch.testing.assert_close(got, plain, rtol=1e-4, atol=1e-6)
    assert alike.error(slope, shift) == pytest.approx(alone.error(slope, shift), rel=1e-9)


def test_a_slot_without_weight_gives_an_expert_no_token() -> None:
    index, weight = (
        torch.tensor([[0, 1], [2, 0], [0, 0]]),
        torch.tensor([[0.0, 0.4], [0.3, 0.2], [0.0, 0.0]]),
    )
    routed = Routed(torch.randn(3, 4), index, weight, None)
    assert [routed.rows(e).tolist() for e in range(4)] == [[1], [0], [1], []]
