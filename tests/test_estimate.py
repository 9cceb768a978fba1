"""The bits that a pipeline would store: every pass changes the estimate, and the bounds add up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from checkpoints import fails

from moecc.pipeline.estimate import Estimate, Matrix, Outlook


@dataclass
class Step:
    """A pass whose estimate is any function."""

    change: Callable[[Estimate], object]

    def estimate(self, found: Estimate) -> None:
        self.change(found)

    def __str__(self) -> str:
        return "step"


def two() -> Estimate:
    """Return experts of 2 * 3 * 4 = 24 and 2 * 4 * 5 = 40 weights, and 21 others."""
    up = Outlook("up", 2, 3, 4, True, low=100.0, high=110.0, top_k=1, groups=1)
    down = Outlook("down", 2, 4, 5, False, low=200.0, high=220.0, top_k=1, groups=1)
    others = {"head": Matrix((4, 5), "head", 320.0), "scalar": Matrix((), "other", 32.0)}
    return Estimate([up, down], others)


def test_weights_and_bits_are_sums_over_projections_and_matrices() -> None:
    found = two()
    assert [p.weights for p in found.projections] == [24, 40] and found.weights == 64
    assert [m.weights for m in found.others.values()] == [20, 1]
    assert found.experts == (300.0, 330.0) and found.rest == 352.0 and found.coded == 0.0
    found.projections[1].coded = True
    assert found.coded == 200.0
    found.projections[0].on_top = 5.0
    assert found.experts == (300.0, 335.0)


def test_bits_are_added_to_both_bounds() -> None:
    up = two().projections[0]
    up.add(1.0)
    assert (up.low, up.high) == (101.0, 111.0)
    up.add(2.0, 30.0)
    assert (up.low, up.high) == (103.0, 141.0)
    up.add(4.0, 0.0)
    assert (up.low, up.high) == (107.0, 141.0)


def test_every_pass_changes_the_estimate_in_turn() -> None:
    def double(found: Estimate) -> None:
        found.projections[0].low *= 2

    def more(found: Estimate) -> None:
        found.projections[0].low += 1

    found = two()
    assert found.run([Step(double), Step(more)]) is found
    assert found.projections[0].low == 201.0
    fails(lambda: two().run([Step(lambda found: found.others["none"])]), "step failed", "none")


def test_a_limit_holds_for_coded_experts_and_must_suffice_for_them() -> None:
    def limited(bits: float, *coded: bool) -> Estimate:
        found = two()
        found.most = ("budget", bits)
        for projection, yes in zip(found.projections, coded, strict=False):
            projection.coded = yes
        return found.run([])

    assert limited(3.0).experts == (300.0, 330.0)  # nothing is coded
    assert limited(5.0, False, True).experts == (300.0, 320.0)
    assert limited(300 / 64, True, True).experts == (300.0, 300.0)
    fails(lambda: limited(4.6, True), "budget: too few bits", "the least is 4.688")
    found = two()
    found.projections[0].coded = True
    assert found.run([]).experts == (300.0, 330.0)  # no limit
    found.most, found.projections[1].on_top = ("budget", 5.0), 7.0
    assert found.run([]).experts == (300.0, 327.0)  # what may come on top is outside of it
