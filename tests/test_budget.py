"""`budget`: the plan against all plans there are, and what a pipeline makes of it."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from conftest import tiny_program

from moecc.errors import MoeccError
from moecc.ir.program import Program
from moecc.passes.budget import Planned, spend
from moecc.pipeline.bits import experts_bits
from moecc.pipeline.order import resolve
from moecc.pipeline.parse import parse_passes
from moecc.pipeline.passes import Context
from moecc.pipeline.run import run_passes

BATCHES = [
    torch.randint(0, 16, (2, 6), generator=torch.Generator().manual_seed(i)) for i in range(8)
]


def drawn(seed: int) -> dict[str, list[Planned]]:
    """Offers of four projections: each bit more makes an error less, and a mean takes bits for less error."""
    draw = random.Random(seed)
    offers = {}
    for name in "abcd":
        size, cost, left = draw.choice((100, 200)), 10 ** draw.uniform(-2, 1), draw.uniform(0.3, 1)
        offers[name] = [
            Planned(bits, "expert", mean, 0, cost * error * (left if mean else 1), size * bits + (size * mean) // 8)
            for bits, error in ((2, 1.0), (3, 0.23), (4, 0.075)) for mean in (0, 2)
        ]  # fmt: skip
    return offers


@pytest.mark.parametrize("seed", range(12))
def test_no_plan_within_the_budget_is_better(seed: int) -> None:
    offers = drawn(seed)
    least, most = (
        sum(end(o.stored for o in found) for found in offers.values()) for end in (min, max)
    )
    for share in (0.0, 0.2, 0.5, 0.8, 1.0):
        budget = least + share * (most - least)
        plan = spend(offers, budget)
        assert plan is not None and sum(o.stored for o in plan.values()) <= budget
        allowed = (
            p for p in itertools.product(*offers.values()) if sum(o.stored for o in p) <= budget
        )
        best = min(sum(o.cost for o in p) for p in allowed)
        assert sum(o.cost for o in plan.values()) == pytest.approx(best)


def test_a_budget_below_the_least_has_no_plan() -> None:
    offers = drawn(0)
    assert spend(offers, sum(min(o.stored for o in found) for found in offers.values()) - 1) is None


def compiled(
    text: str, kinds: str = "MM", batches: list[torch.Tensor] = BATCHES
) -> tuple[Program, Context]:
    program, ctx = tiny_program(kinds), Context()
    passes, _ = resolve(parse_passes(text)[0])
    run_passes(program, passes, ctx, batches)
    return program, ctx


def test_bits_go_where_errors_cost_and_stay_within_the_budget(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module in ("budget", "_code.basis"):
        monkeypatch.setattr(
            f"moecc.passes.{module}.coded_bits",
            lambda matrices, rows, columns, bits, books=1: matrices * rows * columns * bits,
        )
    program, ctx = compiled("budget{bits=2.5,mean=off,rank=0},klt,vq")
    weights = {p: (512 if p.endswith("gate_up") else 256) * 4 for p in ctx.data["budget"]}
    spent = sum(w * ctx.data["budget"][p].bits for p, w in weights.items()) / sum(weights.values())
    assert 2.4 < spent <= 2.5
    assert {v["fate"]["bits"] for v in ctx.audit.values()} == {2, 3}
    for p, planned in ctx.data["budget"].items():
        assert ctx.audit[p]["fate"]["bits"] == planned.bits
    signed = {
        n.name.rpartition("_")[0]
        for n in program.graph.nodes
        if n.op == "placeholder" and n.name.endswith("signs")
    }
    assert len(signed) == sum(planned.bits == 3 for planned in ctx.data["budget"].values())


def test_a_mean_is_planned_where_experts_are_siblings(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("budget", "_code.basis"):
        monkeypatch.setattr(
            f"moecc.passes.{module}.coded_bits",
            lambda matrices, rows, columns, bits, books=1: matrices * rows * columns * bits,
        )
    _, ctx = compiled("budget{bits=2.2,rank=0},klt,vq", "S")
    assert all(planned.mean for planned in ctx.data["budget"].values())
    assert {v["mean"] for v in ctx.audit.values()} <= {"2 bit", "3 bit", "4 bit"}


def test_too_small_a_budget_says_what_the_least_is() -> None:
    with pytest.raises(
        MoeccError, match=r"bits=2\.5 is too few; with scales and codebooks the least is \d+\.\d{3}"
    ):
        compiled("budget{bits=2.5}")


def test_a_fraction_of_bits_plans_them_and_brings_sensitivity_along() -> None:
    passes, remarks = resolve(parse_passes("kbvq", bits=2.5)[0])
    assert ",".join(map(str, passes)) == "sensitivity,budget,moments,klt,vq,affine{offset=off},fold"
    assert remarks == ["budget requires 'sensitivity'; inserted 'sensitivity' before it"]
    assert [str(p) for p in parse_passes("kbvq{bits=3}")[0]] == ["kbvq{bits=3}"]


def test_what_can_t_be_planned_is_refused_with_a_fraction() -> None:
    with pytest.raises(MoeccError, match="kbvq: offset=on can't be planned"):
        resolve(parse_passes("kbvq{bits=2.5,offset=on}")[0])


def test_offsets_do_not_exceed_a_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "moecc.passes.affine.gain", lambda *args: 1.0
    )  # each would be worth its bits
    planned, ctx = compiled(
        "budget{bits=6,codebook=layer,mean=off,rank=0},klt,vq{codebook=layer},affine,fold", "I"
    )
    assert experts_bits(planned) <= 6
    assert {row["affine"] for row in ctx.audit.values()} <= {"slope", "none"}
    free, _ = compiled("vq{codebook=layer},affine,fold", "I")
    assert free.moe_layers()[0].operand("down_bias") is not None
    with pytest.raises(
        MoeccError, match="affine: offset=on can't be planned by budget; leave it out"
    ):
        compiled("budget{bits=6,codebook=layer},kbvq{codebook=layer,offset=on}", "I")


def test_a_small_budget_shares_codebooks_and_a_large_one_does_not() -> None:
    for bits, book in ((10.7, "layer"), (64.0, "expert")):
        offers = {
            "a": [Planned(2, "expert", 0, 0, 1.0, 40), Planned(2, "layer", 0, 0, 1.06, 10)],
            "b": [Planned(2, "layer", 0, 0, 9.0, 10)],
        }
        plan = spend(offers, bits * 2)
        assert plan is not None and plan["a"].codebook == book


def test_bits_of_all_layers_follow_sensitivity_where_the_costs_of_gate_up_do_not_fit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Then errors are relative to the outputs, and what an output costs sets them against those of other layers."""
    monkeypatch.setattr("moecc.passes._code.moments._PER_EXPERT_BYTES", 4000)
    for module in ("budget", "_code.basis"):
        monkeypatch.setattr(
            f"moecc.passes.{module}.coded_bits",
            lambda matrices, rows, columns, bits, books=1: matrices * rows * columns * bits,
        )
    _, ctx = compiled("budget{bits=2.7,mean=off,rank=0},klt,vq", "MMM")
    bits = [
        sum(it.bits for name, it in ctx.data["budget"].items() if str(i) in name) for i in range(3)
    ]
    costs = {
        name: float(s.trace())
        for name, s in ctx.data["sensitivity"].items()
        if f"{name}.down" in ctx.data["budget"]
    }
    assert min(costs) == max(costs, key=lambda name: costs[name])  # the first layer's, by far
    assert bits[0] == max(bits) > min(bits)


def test_experts_that_saw_no_token_do_not_make_a_layer_cheap() -> None:
    ids = [
        torch.randint(0, 16, (1, 6), generator=torch.Generator().manual_seed(i)) for i in (900, 901)
    ]
    _, ctx = compiled(
        "budget{bits=6,codebook=layer,mean=off,rank=0},klt,vq{codebook=layer}", "IM", ids
    )
    assert all(planned.cost > 0 for planned in ctx.data["budget"].values())
