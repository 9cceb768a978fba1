"""The rounds of coding one by one: what `encode` hands to them, their order, the state it keeps."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from coders import BITS, E, K, N, costs, drawn, error_of, from_blocks, random_state

from moecc.passes._code import coding
from moecc.passes._code.codebooks import Book, kmeans, rounded
from moecc.passes._code.coded import Coded, joined
from moecc.passes._code.coder import Coder
from moecc.passes._code.coding import _better, _costly_first, _refined, encode
from moecc.passes._code.feedback import choose
from moecc.passes._code.metric import damped


def same(a: Coded, b: Coded) -> None:
    for name, value in vars(a).items():
        other = vars(b)[name]
        assert (value is None) == (other is None), name
        if value is not None:
            torch.testing.assert_close(value, other, rtol=1e-6, atol=0, msg=name)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("kind", ["plain", "costs", "book", "no feedback"])
def test_rounds_start_from_rows_of_size_one_under_a_damped_metric(
    bits: int, shared: bool, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, moment = drawn(3)
    weight = weight * torch.linspace(0.01, 3, N).unsqueeze(-1)
    weight[1, 2] = 0
    output = costs(1.0, rows=N, blocks=2) if kind in ("costs", "no feedback") else None
    g = torch.Generator().manual_seed(4)
    random = Book(
        (torch.rand(1, 256, 2 if bits == 4 else 4, generator=g) * 100).round(), torch.ones(1, 1)
    )
    book = random if kind == "book" else None
    seen: list[tuple[Coder, Coded, int, dict[str, bool]]] = []

    def refined(coder: Coder, start: Coded, rounds: int, **options: bool) -> Coded:
        seen.append((coder, start, rounds, options))
        return start

    monkeypatch.setattr(coding, "_refined", refined)
    got = encode(
        weight,
        moment,
        output,
        bits=bits,
        shared=shared,
        seed=5,
        rounds=7,
        feedback=kind != "no feedback",
        turns=2,
        book=book,
    )
    ((coder, start, rounds, options),) = seen
    # one that all experts share is not refitted to these
    fixed = shared and book is not None
    assert rounds == 7 and options == {"shared": shared, "fixed_book": fixed}
    assert coder.bits == bits and coder.feedback == (kind != "no feedback")
    size = torch.tensor(
        [[max(float(row.double().square().mean()) ** 0.5, 1e-12) for row in w] for w in weight]
    )
    target, order = weight / size.unsqueeze(-1), torch.arange(N).expand(E, -1)
    if kind == "costs":
        assert output is not None and coder.output is not None
        found, rows = _costly_first(output, size.unsqueeze(-1))
        torch.testing.assert_close(coder.output, found)
        order = rows.squeeze(-1)
        target = torch.stack([t[o] for t, o in zip(target, order, strict=True)])
    else:
        assert coder.output is None
    torch.testing.assert_close(coder.target, target)
    h = torch.stack([m + 0.01 * m.diagonal().mean() * torch.eye(K) for m in moment])
    torch.testing.assert_close(coder.moment, h)
    torch.testing.assert_close(coder.moment, damped(moment))
    importance = torch.stack([m.diagonal() / m.diagonal().mean() for m in h])
    torch.testing.assert_close(coder.importance, importance)
    if book is None:
        centroids = kmeans(coder.target, coder.importance, bits=bits, seed=5, turns=2)
        book = rounded(centroids, bits)
    table = book.integers if shared else book.integers.expand(E, -1, -1)
    same(start, choose(coder, table, book.step.expand(E, N)))
    # rows come back in their own order and size, and zeros stay zeros
    for e in range(E):
        for i, n in enumerate(order[e].tolist()):
            assert torch.equal(got.codes[e, n], start.codes[e, i])
            if bits == 3:
                assert got.negative is not None and start.negative is not None
                assert torch.equal(got.negative[e, n], start.negative[e, i])
            want = 0 if (e, n) == (1, 2) else float(start.scale[e, i] * size[e, n])
            assert float(got.scale[e, n]) == pytest.approx(want, rel=1e-6)
    assert torch.equal(got.codebook, start.codebook)


@pytest.mark.parametrize("blocks", [1, 2, 6])
def test_costs_are_those_of_rows_of_size_one_the_costly_ones_of_a_block_first(blocks: int) -> None:
    output = costs(1.0, rows=N, blocks=blocks)
    size = torch.linspace(3, 0.5, E * N).view(E, N, 1)
    got, order = _costly_first(output, size)
    for e in range(E):
        s = torch.outer(size[e, :, 0], size[e, :, 0]) * from_blocks(output)[e]
        s = s + 0.2 * s.diagonal().mean() * torch.eye(N)
        s = s / s.diagonal().mean()
        each = [sorted(range(b, N, blocks), key=lambda n: -float(s[n, n])) for b in range(blocks)]
        # the most costly row of each block, the second of each, ..
        rows = [n for level in zip(*each, strict=True) for n in level]
        assert order[e, :, 0].tolist() == rows
        torch.testing.assert_close(from_blocks(got)[e], s[rows][:, rows])


CHOOSE, BOOK, SWEEP, SCALE = "choose", "refit_codebook", "sweep", "refit_scale"


@pytest.mark.parametrize(
    ("feedback", "fixed", "want"),
    [
        (True, False, [SWEEP, SCALE, BOOK, CHOOSE, SWEEP, SCALE, *[BOOK, SWEEP, SCALE] * 2]),
        (True, True, [SWEEP, SCALE, CHOOSE, SWEEP, SCALE, *[SWEEP, SCALE] * 2]),
        (False, False, [SCALE]),
    ],
)
def test_rounds_refit_and_sweep_and_the_best_state_stays(
    feedback: bool, fixed: bool, want: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the second round chooses all codes anew."""
    log: list[str] = []

    class State(SimpleNamespace):
        codebook, scale = "codebook", "scale"

    coder = SimpleNamespace(target=torch.zeros(E, N, K), feedback=feedback, bits=2)

    def step(name: str) -> Any:
        def run(given: object, state: Any, *more: object) -> State:
            assert given is coder and more == (("scale",) if name == CHOOSE else ())
            log.append(name)
            return State(at=len(log))

        return run

    for name in (CHOOSE, BOOK, SWEEP, SCALE):
        monkeypatch.setattr(coding, name, step(name))
    errors = {2: 5.0, 6: 3.0, 5: 3.0, 7: 4.0, 9: 3.0, 12: 6.0, 1: 1.0}
    coder.error = lambda state: torch.full((E,), errors[state.at])
    found = _refined(coder, State(at=0), 4, shared=True, fixed_book=fixed)  # type: ignore[arg-type]
    assert log == want
    assert found.at == (1 if not feedback else 5 if fixed else 6)  # type: ignore[attr-defined]


@pytest.mark.parametrize("bits", [2, 3])
def test_of_two_states_each_expert_keeps_its_better_one(bits: int) -> None:
    (_, best), (_, state) = random_state(bits, 1), random_state(bits, 2)
    least, error = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.5])
    got, left = _better(best, least, state, error, False)
    assert left.tolist() == [1.0, 1.5]
    for name, value in vars(got).items():
        if value is not None:
            assert torch.equal(value[0], vars(best)[name][0]), name
            assert torch.equal(value[1], vars(state)[name][1]), name
    assert (got.negative is None) == (bits != 3)
    for more, taken in ((0.4, state), (0.6, best)):  # with a shared codebook the sum decides
        error = torch.tensor([1.0 + more, 1.5])
        got, left = _better(best, least, state, error, True)
        assert got is taken and torch.equal(left, error if taken is state else least)
    assert _better(None, least, state, error, False) == (state, error)


@pytest.mark.parametrize("blocks", [0, 1, 2])
def test_the_error_of_a_state_by_its_definition(blocks: int) -> None:
    c, state = random_state(3)
    c = replace(c, output=costs(1.0, rows=N, blocks=blocks) if blocks else None)
    torch.testing.assert_close(c.error(state).double(), error_of(c, state), rtol=1e-4, atol=0)


def test_rows_are_put_in_another_order_expert_by_expert() -> None:
    _, state = random_state(3)
    order = torch.stack([torch.randperm(N) for _ in range(E)])
    got = state.rows(order.unsqueeze(-1))
    for e in range(E):
        for name in ("codes", "negative", "scale"):
            assert torch.equal(vars(got)[name][e], vars(state)[name][e][order[e]]), name
    assert got.codebook is state.codebook
    assert replace(state, negative=None).rows(order.unsqueeze(-1)).negative is None


@pytest.mark.parametrize("dim", [0, 1])
def test_joined_parts_are_those_of_one_after_the_other(dim: int) -> None:
    _, state = random_state(3)
    parts = [
        Coded(
            *(t.narrow(dim, start, 1) for t in (state.codes, state.negative)),
            state.codebook,
            state.scale.narrow(dim, start, 1),
        )  # type: ignore[union-attr]
        for start in range(state.codes.shape[dim])
    ]
    same(joined(parts, dim, state.codebook), state)
    unsigned = [replace(p, negative=None) for p in parts]
    assert joined(unsigned, dim, state.codebook).negative is None
