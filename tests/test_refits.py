"""Refits of scales and codebooks, and sweeps over the codes, against least squares in float64."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

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
    error_of,
    from_blocks,
    in_blocks,
    loops,  # noqa: F401 (a fixture)
    never_more,
    random_state,
    scales,
    slow_nearest,
    state,
)
from hypothesis import given
from hypothesis import strategies as st

from moecc.passes._code.coded import Coded
from moecc.passes._code.coder import Coder
from moecc.passes._code.feedback import choose
from moecc.passes._code.refit import best_codebook, refit_codebook, refit_scale, rescaled
from moecc.passes._code.sweep import sweep

Start = Callable[..., tuple[Coder, Coded]]  # `state` or `random_state`

pytestmark = pytest.mark.usefixtures("loops")


@given(
    bits=st.sampled_from(BITS),
    seed=st.integers(0, 10_000),
    likeness=st.floats(0, 30),
    blocks=st.sampled_from([1, 3]),
)
def test_a_sweep_under_output_costs_never_increases_the_error(
    bits: int, seed: int, likeness: float, blocks: int
) -> None:
    c = coder(bits, seed, rows=24, output=costs(likeness, seed, 24, blocks))
    s = choose(c, codebooks(bits, seed), scales(c))
    swept = sweep(c, s)
    # the rows of a block move together, so a step may overshoot a little
    assert bool((error_of(c, swept) <= 1.05 * error_of(c, s)).all())


@pytest.mark.parametrize("blocks", [1, 3])
def test_refits_under_output_costs_are_least_squares(blocks: int) -> None:
    c = coder(2, rows=24, output=costs(2.0, rows=24, blocks=blocks))
    s = choose(c, codebooks(2), scales(c))
    refit, q = refit_scale(c, s), s.unscaled().double()
    assert c.output is not None
    for e in range(E):
        left = torch.linalg.cholesky(from_blocks(c.output)[e].double()).T
        right = torch.linalg.cholesky(c.moment[e].double())
        columns = torch.stack(
            [(left[:, n : n + 1] @ q[e, n : n + 1] @ right).flatten() for n in range(24)], 1
        )
        target = (left @ c.target[e].double() @ right).flatten().unsqueeze(1)
        want = torch.linalg.lstsq(columns, target).solution
        torch.testing.assert_close(refit.scale[e].double(), want.squeeze(1), rtol=2e-3, atol=1e-6)
    assert float(error_of(c, refit_codebook(c, s)).sum()) < float(error_of(c, s).sum())


@pytest.mark.parametrize("start", [state, random_state])
@given(bits=st.sampled_from(BITS), seed=st.integers(0, 10_000), books=st.sampled_from([1, E]))
def test_a_sweep_never_increases_the_error(start: Start, bits: int, seed: int, books: int) -> None:
    c, s = start(bits, seed, books=books)
    never_more(error_of(c, sweep(c, s)), error_of(c, s))


def slow_sweep(
    q: np.ndarray, pull: np.ndarray, h: np.ndarray, table: np.ndarray, bits: int
) -> np.ndarray:
    """Choose each group of one row again, one after the other, with all others fixed.

    q: the row as coded, in units of its scale. pull: how far off it is, in the same units.
    """
    target, q, v = q + pull, q.copy(), table.shape[1]
    for g in range(len(q) // v):
        here = slice(g * v, g * v + v)
        others = target - q
        others[here] = 0
        # without this group the row is off by `others`; the best value makes up for these too
        best = target[here] + np.linalg.solve(h[here, here], h[here] @ others)
        root = np.linalg.cholesky(h[here, here])
        _, new = slow_nearest(best, table, root, bits)
        costs = [float((((best - x) @ root) ** 2).sum()) for x in (new, q[here])]
        # at 3 bit the signs so far may be better than those of the best value
        q[here] = new if bits != 3 or costs[0] < costs[1] else q[here]
    return q


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("likeness", "blocks"), [(None, 1), (0.1, 1), (3.0, 1), (3.0, 2)])
def test_a_swept_code_is_the_best_with_all_others_fixed(
    bits: int, likeness: float | None, blocks: int
) -> None:
    """Rows that depend on each other move 16 together, by less if they pull the same way.

    So do 16 of every block of costs.
    """
    rows = 6 if likeness is None else 18 * blocks
    output = None if likeness is None else from_blocks(costs(likeness, rows=rows, blocks=blocks))
    if output is not None:  # of unequal sizes
        size = torch.linspace(0.5, 3, rows)
        output = size * output * size.unsqueeze(-1)
    given = None if output is None else in_blocks(output, blocks)
    c = coder(bits, rows=rows, output=given)
    s = Coded(*vars(choose(c, codebooks(bits), scales(c))).values())
    if bits == 3:  # signs that the codes were not chosen with
        s = dataclasses.replace(s, negative=torch.rand(s.negative.shape) < 0.5)  # type: ignore[union-attr]
    got, lengths = sweep(c, s), []
    for e in range(E):
        h, scale, table = (x[e].double().numpy() for x in (c.moment, s.scale, s.codebook))
        w, q = c.target[e].double().numpy(), s.unscaled()[e].double().numpy()
        steps = (slice(0, 16 * blocks), slice(16 * blocks, rows)) if rows > 6 else (slice(0, 6),)
        for block in steps:
            start = q.copy()
            for n in range(block.start, block.stop):
                off = w - start * scale[:, None]
                if output is None:
                    pull = off[n]
                else:
                    cost = output[e].double().numpy()
                    inner = cost[block, block]
                    unit = np.sqrt(np.diag(inner))
                    most = np.linalg.eigvalsh(inner / unit / unit[:, None])[-1]
                    lengths.append(max(1, most - 1))
                    pull = cost[n] @ off / cost[n, n] / lengths[-1]
                q[n] = slow_sweep(start[n], pull / scale[n], h, table, bits)
        same = q == got.unscaled()[e].double().numpy()
        # float32 may break a tie the other way
        assert same.mean() > 0.95
    assert likeness is None or (max(lengths) > 2) == (likeness > 1)


@pytest.mark.parametrize("start", [state, random_state])
@given(bits=st.sampled_from(BITS), seed=st.integers(0, 10_000), books=st.sampled_from([1, E]))
def test_refitting_scales_never_increases_the_error(
    start: Start, bits: int, seed: int, books: int
) -> None:
    c, s = start(bits, seed, books=books)
    refit = refit_scale(c, s)
    never_more(error_of(c, refit), error_of(c, s))
    assert bool((refit.scale > 0).all())


def test_refitted_scales_are_the_least_squares_scales_of_their_rows() -> None:
    c, s = state(2)
    refit, q = refit_scale(c, s), s.unscaled().double()
    for e, n in itertools.product(range(E), range(N)):
        h, w = c.moment[e].double(), c.target[e, n].double()
        want = float(q[e, n] @ h @ w) / float(q[e, n] @ h @ q[e, n])
        assert float(refit.scale[e, n]) == pytest.approx(want, rel=1e-4)


def test_a_row_coded_to_zero_keeps_its_scale() -> None:
    c, s = state(2)
    zero = dataclasses.replace(s, codebook=torch.zeros_like(s.codebook))
    assert torch.equal(refit_scale(c, zero).scale, s.scale)


def unrounded(c: Coder, s: Coded, turns: int = 12) -> Coded:
    """Refit the codebook and leave it unrounded."""
    return dataclasses.replace(s, codebook=best_codebook(c, s, turns))


@pytest.mark.parametrize("start", [state, random_state])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("books", [1, E])
@pytest.mark.parametrize("seed", range(5))
def test_refitting_codebooks_never_increases_the_error(
    start: Start, bits: int, books: int, seed: int
) -> None:
    c, s = start(bits, seed, books=books)
    before, after = error_of(c, s), error_of(c, unrounded(c, s))
    never_more(after, before) if books == E else never_more(after.sum(), before.sum())


@pytest.mark.parametrize("bits", BITS)
def test_a_refitted_codebook_is_the_least_squares_codebook(bits: int) -> None:
    """Compare with numpy's solution for one shared codebook.

    The design matrix has a column per centroid component.
    """
    c, s = random_state(bits, books=1)
    v = c.v
    # a negative weight is -1 - centroid, so a codebook of zeros still decodes to -1 there
    fixed = dataclasses.replace(s, codebook=torch.zeros_like(s.codebook)).dense().double().numpy()
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
    got = float(error_of(c, unrounded(c, s, turns=400)).sum())
    assert got <= least + 1e-3 * (start - least)


@pytest.mark.parametrize("bits", BITS)
def test_rounding_a_codebook_moves_each_weight_by_half_a_step(bits: int) -> None:
    c, s = state(bits)
    exact = unrounded(c, s)
    if bits == 3:
        # Decode is symmetric about -1/2 and clamps centroids below it: leave those out.
        exact = dataclasses.replace(exact, codebook=exact.codebook.clamp(min=-0.5))
    stored = rescaled(s, exact.codebook, bits)
    assert torch.equal(stored.codebook, stored.codebook.round())
    assert float(stored.codebook.max()) <= 127 and float(stored.codebook.min()) >= (
        0 if bits == 3 else -127
    )
    step = stored.scale.unsqueeze(-1)
    # at 3 bit growing keeps -1/2 fixed, which is where decode is symmetric
    fixed = 0.5 * (step - s.scale.unsqueeze(-1)) if bits == 3 else 0
    moved = (stored.dense() - exact.dense() + fixed).abs()
    assert bool((moved <= 0.501 * step).all())


@pytest.mark.parametrize("bits", BITS)
def test_a_codebook_of_any_size_is_stored_up_to_127(bits: int) -> None:
    _, s = random_state(bits)
    shift = 0.5 if bits == 3 else 0.0
    small = 1e-4 * (s.codebook + shift) - shift
    stored = rescaled(s, small, bits)
    largest = stored.codebook.abs().amax((-2, -1))
    assert bool((largest >= 126).all()) and bool((largest <= 127).all())
    assert torch.equal(stored.codebook, stored.codebook.round())
    want = (small + shift) * s.scale[:, :1, None]
    torch.testing.assert_close(
        (stored.codebook + shift) * stored.scale[:, :1, None], want, rtol=0, atol=1e-4 * 0.02
    )


@pytest.mark.parametrize("size", [1e-9, 1e9])
@pytest.mark.parametrize("coupled", [False, True])
def test_refitted_scales_do_not_depend_on_the_unit_of_moments(size: float, coupled: bool) -> None:
    c = coder(2, output=costs(2.0, rows=N) if coupled else None)
    s = choose(c, codebooks(2), scales(c))
    other = dataclasses.replace(c, moment=c.moment * size)
    torch.testing.assert_close(refit_scale(other, s).scale, refit_scale(c, s).scale)
