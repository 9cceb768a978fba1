"""The schedule of `rilq`'s training: rates, checks, patience, the best state, and going on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from moecc.passes._tune.training import Training
from moecc.pipeline.passes import Context, Kept


class Line:
    """Stands for the trained tensors and their loss: one number whose gradient is always 1.

    held_out: the loss that each check finds, in order; the first is that of the start.
    """

    rows = [0, 1, 2]

    def __init__(self, held_out: Sequence[float], rates: Sequence[float] = (1.0,)):
        self.values = [torch.zeros(1, requires_grad=True) for _ in rates]
        self.initial = rates
        self.held_out = list(held_out)
        self.shares: list[float] = []
        self.at: list[float] = []  # the number at each check
        self.started: list[dict[str, float]] = []
        self.trained: Any = self

    @property
    def parameters(self) -> list[Tensor]:
        return self.values

    def groups(self) -> list[dict[str, Any]]:
        return [{"params": [v], "lr": r} for v, r in zip(self.values, self.initial, strict=True)]

    def state(self) -> list[Tensor]:
        return [v.detach().clone() for v in self.values]

    def restore(self, state: list[Tensor]) -> None:
        for v, s in zip(self.values, state, strict=True):
            v.data.copy_(s)

    def held_out_terms(self) -> dict[str, float]:
        self.at.append(float(self.values[0].detach()))
        return {"kl": self.held_out.pop(0)}

    def start_at(self, terms: dict[str, float]) -> None:
        self.started.append(dict(terms))

    def with_loss(self, terms: dict[str, float]) -> dict[str, float]:
        return {**terms, "loss": 2 * terms["kl"]}

    def backward(self, row: int, share: float) -> None:
        assert row in self.rows
        self.shares.append(share)
        for v in self.values:
            (share * v.sum()).backward()


def training(line: Line, ctx: Context | None = None, **options: int) -> Training:
    settings = {"steps": 40, "batches": 1, "patience": 10} | options
    return Training(line, ctx or Context(), **settings)  # type: ignore[arg-type]


def test_the_best_of_the_checks_stays() -> None:
    losses = [5.0, 4.0, 3.0, 6.0, 3.0, 2.5, 7.0, 7.0, 7.0, 7.0, 7.0]
    line = Line(losses)
    before, least = training(line).run()
    assert before == {"kl": 5.0, "loss": 10.0} and least == {"kl": 2.5, "loss": 5.0}
    assert line.held_out == [] and len(set(line.at)) == 11  # a check every four steps
    assert float(line.values[0].detach()) == line.at[5]
    assert line.started == [{"kl": 5.0}]


def test_an_equal_loss_is_not_better_than_the_start() -> None:
    line = Line([1.0] * 11)
    before, least = training(line).run()
    assert before == least and float(line.values[0].detach()) == line.at[0] == 0.0


@pytest.mark.parametrize(("patience", "checks"), [(1, 3), (2, 6), (3, 10)])
def test_training_stops_after_so_many_checks_without_a_better_loss(
    patience: int, checks: int
) -> None:
    losses = [9.0, 8.0, 8.5, 7.0, 7.5, 7.5, 6.0, 7.0, 7.0, 7.0, 5.0]
    line = Line(losses)
    training(line, patience=patience).run()
    assert len(losses) - len(line.held_out) == checks


@pytest.mark.parametrize(
    ("steps", "at"), [(3, [1, 2, 3]), (25, [3, 6, 9, 12, 15, 18, 21, 24, 25]), (1, [1])]
)
def test_there_are_ten_checks_at_most_and_one_at_the_end(steps: int, at: list[int]) -> None:
    line = Line([1.0] * (len(at) + 1))
    found: list[int] = []
    real = line.held_out_terms

    def count() -> dict[str, float]:
        found.append(len(line.shares))
        return real()

    line.held_out_terms = count  # type: ignore[method-assign]
    training(line, steps=steps).run()
    assert found == [0, *at] and line.held_out == []


def test_rates_rise_over_twenty_steps_and_fall_to_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    line = Line([1.0] * 11, rates=(0.5, 2.0))
    seen: list[list[float]] = []
    step = torch.optim.Adam.step

    def noting(self: torch.optim.Adam, *args: Any) -> Any:
        seen.append([g["lr"] for g in self.param_groups])
        assert [g["betas"] for g in self.param_groups] == [(0.9, 0.95)] * 2
        return step(self, *args)

    monkeypatch.setattr(torch.optim.Adam, "step", noting)
    training(line, steps=50, batches=3).run()
    factors = [min(1.0, (i + 1) / 20) * (1 - i / 50) for i in range(50)]
    assert seen == [pytest.approx([0.5 * f, 2.0 * f]) for f in factors]
    assert line.shares == [1 / 3] * 150


def test_gradients_do_not_pile_up() -> None:
    """The gradient is 1 at every step, so Adam moves by the rate each time."""
    line = Line([1.0, *range(10, 0, -1)], rates=(1.0,))
    training(line, steps=10).run()
    moves = [b - a for a, b in zip(line.at, line.at[1:], strict=False)]
    rates = [min(1.0, (i + 1) / 20) * (1 - i / 10) for i in range(10)]
    assert moves == pytest.approx([-r for r in rates], rel=1e-3)


def test_an_interrupted_run_goes_on_where_it_was() -> None:
    losses = [9.0, 8.0, 8.5, 7.0, 7.5, 7.5, 6.0, 7.0, 7.0, 7.0, 6.5]
    whole = Line(losses, rates=(1.0, 3.0))
    want = training(whole).run()
    kept: dict[str, Kept] = {}

    class Stop(Exception):
        pass

    for stop in (1, 4, 7):

        def keep(key: str, work: Kept, stop: int = stop) -> Kept:
            kept[key] = Kept({k: t.clone() for k, t in work.tensors.items()}, dict(work.facts))
            if work.facts["step"] == 4 * stop:
                raise Stop
            return work

        ctx, line = Context(), Line(losses, rates=(1.0, 3.0))
        ctx.keep = keep  # type: ignore[method-assign]
        with pytest.raises(Stop):
            training(line, ctx).run()
        ctx, again = Context(), Line(losses[stop + 1 :], rates=(1.0, 3.0))
        ctx.kept = kept.get  # type: ignore[assignment]
        assert training(again, ctx).run() == want
        assert again.started == [{"kl": 9.0, "loss": 18.0}]
        for a, b in zip(again.values, whole.values, strict=True):
            assert torch.equal(a, b)
