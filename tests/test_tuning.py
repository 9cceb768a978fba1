"""The schedule of `vsraq`'s tuning, on a loss that a test makes up, and what it tells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pipelines import Tiny, derive, resolved
from torch import Tensor

from moecc.passes._tune.block import Block
from moecc.passes._tune.tuned import split
from moecc.passes.vsraq import AlignRouting, _Run
from moecc.pipeline.passes import Context, Layer, LayerPass, Pass
from moecc.pipeline.run import run_passes


class Line:
    """Stands for a block and its tuned tensors: two numbers, whose gradient is that of `slopes`.

    held_out: the terms that each check finds, in order; the first is that of the start.
    """

    slopes = {"reconstruction": 3.0, "value": -0.5, "flips": 100.0}

    def __init__(self, held_out: Sequence[Mapping[str, float]], batches: int = 17):
        self.numbers = [torch.zeros(1, requires_grad=True) for _ in range(2)]
        self.held_out = list(held_out)
        self.inputs = [{}] * batches
        self.layer = SimpleNamespace(index=3)
        self.at: list[float] = []  # the first number at each check
        self.drawn: list[list[int]] = []
        self.rows: list[list[int]] = []

    # the block

    def losses(self, rows: list[int], stored: Mapping[str, Tensor]) -> dict[str, float]:
        assert stored == {"stored": self.numbers[0]}
        self.rows.append(rows)
        self.at.append(float(self.numbers[0].detach()))
        return dict(self.held_out.pop(0))

    def terms(self, rows: list[int], overrides: Mapping[str, Tensor]) -> dict[str, Tensor]:
        assert overrides == {"rounded": self.numbers[0]}
        self.drawn.append(rows)
        return {k: slope * sum(self.numbers) for k, slope in self.slopes.items()}  # type: ignore[misc]

    # the tuned tensors

    def groups(self, factor: float) -> list[dict[str, Any]]:
        rates = (0.5, 2.0)
        return [{"params": [v], "lr": r * factor} for v, r in zip(self.numbers, rates, strict=True)]

    def stored(self) -> dict[str, Tensor]:
        return {"stored": self.numbers[0]}

    def rounded(self) -> dict[str, Tensor]:
        return {"rounded": self.numbers[0]}

    def state(self) -> list[Tensor]:
        return [v.detach().clone() for v in self.numbers]

    def restore(self, state: list[Tensor]) -> None:
        for v, s in zip(self.numbers, state, strict=True):
            v.data.copy_(s)


def tuning(line: Line, **options: Any) -> _Run:
    settings = {"steps": 6, "reconstruction": 2.0, "value": 5.0} | options
    return _Run(AlignRouting(**settings), line, line, Context())  # type: ignore[arg-type]


def terms(*losses: tuple[float, float, float]) -> list[dict[str, float]]:
    return [dict(zip(Line.slopes, each, strict=True)) for each in losses]


def test_the_best_of_the_checks_stays_and_flips_do_not_count() -> None:
    """Terms count relative to the start: 2 + 5, 1 + 2.5, 1 + 5, 2 + 2.5."""
    found = terms((4, 10, 0.1), (2, 5, 0.9), (2, 10, 0.0), (4, 5, 0.0))
    line = Line(found)
    before, after = tuning(line).train()
    assert (before, after) == (found[0], found[1])
    assert len(set(line.at)) == 4 and float(line.numbers[0].detach()) == line.at[1]
    assert line.rows == [[7, 15]] * 4
    better = terms((4, 10, 0), (4, 5, 0), (4, 4, 0), (2, 10, 0))  # 7, 4.5, 4, 6
    assert tuning(Line(better)).train()[1] == better[2]


def test_an_equal_loss_is_not_better_than_the_start() -> None:
    line = Line(terms(*[(1, 1, 0)] * 4))
    before, after = tuning(line).train()
    assert before == after and float(line.numbers[0].detach()) == line.at[0] == 0.0
    start = terms((0, 0, 0), (1e-13, 0, 0), (0, 1e-13, 0), (0, 0, 0))
    assert tuning(Line(start)).train() == (start[0], start[0])  # no term is divided by zero


@pytest.mark.parametrize(
    ("steps", "at"), [(6, [2, 4, 6]), (10, [3, 6, 9, 10]), (2, [1, 2]), (1, [1]), (3, [1, 2, 3])]
)
def test_there_is_a_check_after_each_third_and_one_at_the_end(steps: int, at: list[int]) -> None:
    line, found = Line(terms(*[(1, 1, 0)] * (len(at) + 1))), []
    real = line.losses

    def count(*args: Any) -> dict[str, float]:
        found.append(len(line.drawn))
        return real(*args)

    line.losses = count  # type: ignore[method-assign]
    tuning(line, steps=steps).train()
    assert found == [0, *at] and line.held_out == []


def test_rates_fall_to_zero_and_gradients_are_those_of_the_relative_loss(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    line = Line(terms((4, 10, 0.1), *[(9, 9, 0)] * 3))
    seen: list[list[float]] = []
    step = torch.optim.Adam.step

    def noting(self: torch.optim.Adam, *args: Any) -> Any:
        seen.append([g["lr"] for g in self.param_groups])
        assert [g["betas"] for g in self.param_groups] == [(0.9, 0.95)] * 2
        want = 3.0 * 2 / 4 - 0.5 * 5 / 10
        assert [float(v.grad) for v in line.numbers] == pytest.approx([want] * 2)  # type: ignore[arg-type]
        return step(self, *args)

    monkeypatch.setattr(torch.optim.Adam, "step", noting)
    tuning(line, lr=10.0).train()
    assert seen == [pytest.approx([5 * (1 - i / 6), 20 * (1 - i / 6)]) for i in range(6)]


@pytest.mark.parametrize(("count", "batches"), [(1, 17), (3, 17), (99, 4)])
def test_each_step_draws_batches_that_are_not_held_out(count: int, batches: int) -> None:
    drawn = []
    for _ in range(2):
        line = Line(terms(*[(1, 1, 0)] * 5), batches)
        tuning(line, steps=200, batches=count).train()
        drawn.append(line.drawn)
    train, _ = split(batches)
    assert drawn[0] == drawn[1] and len(drawn[0]) == 200
    assert {len(rows) for rows in drawn[0]} == {min(count, len(train))}
    assert {row for rows in drawn[0] for row in rows} == set(train)


def test_tuning_tells_the_held_out_terms_of_what_it_stores(
    tiny: Tiny, batches: list[Tensor]
) -> None:
    """`before` is of the layer as coded, `after` of the layer as it is stored."""
    found: list[dict[str, float]] = []

    def run_layer(self: Pass, layer: Layer, ctx: Context) -> bool:
        if layer.moe and layer.index == 1:
            s = ctx.data["sensitivity"]
            block = Block(layer, ("value", "boundary"), s, head=True)
            found.append(block.losses(split(len(batches))[1], {}))
        return False

    looks = [derive(LayerPass, f"look{i}", run_layer=run_layer, own_round=True) for i in range(2)]
    *before, tune = resolved(
        "vq{bits=3,rounds=1},affine,fold,vsraq{steps=6,lr=3,order=0,batches=2}"
    )
    assert tune.name == "vsraq"
    ctx = Context()
    program = tiny("MM")
    reports = run_passes(program, [*before, looks[0], tune, looks[1]], ctx, batches)
    first, last = program.moe_layers()
    for name in ("gate_up", "down"):
        told = ctx.audit[f"{first.path}.{name}"]["tuned"]
        assert told["before"] == pytest.approx(found[0], rel=1e-5)
        assert told["after"] == pytest.approx(found[1], rel=1e-5)
    assert found[0] != found[1] and found[0].keys() == {
        "reconstruction",
        "value",
        "boundary",
        "flips",
    }
    told = ctx.audit[f"{last.path}.down"]["tuned"]
    assert told["before"].keys() == {"reconstruction"}  # no router, and no head of a vocabulary
    assert [r.changed for r in reports if r.text.startswith("vsraq")] == [True]
