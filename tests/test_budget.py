"""`budget`: its plan against every possible plan, and pipelines that follow it."""

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
from moecc.pipeline.fate import Fate
from moecc.pipeline.order import resolve
from moecc.pipeline.parse import parse_passes
from moecc.pipeline.passes import Context
from moecc.pipeline.run import run_passes

BATCHES = [
    torch.randint(0, 16, (2, 6), generator=torch.Generator().manual_seed(i)) for i in range(8)
]


def drawn(seed: int) -> dict[str, list[Planned]]:
    """Draw offers of four projections: more bits lower the error, and so does a mean."""
    draw = random.Random(seed)
    offers: dict[str, list[Planned]] = {}
    for name in "abcd":
        size, cost, left = draw.choice((100, 200)), 10 ** draw.uniform(-2, 1), draw.uniform(0.3, 1)
        offers[name] = []
        for (bits, error), mean in itertools.product(((2, 1.0), (3, 0.23), (4, 0.075)), (0, 2)):
            stored = size * bits + (size * mean) // 8
            error = cost * error * (left if mean else 1)
            offers[name].append(Planned(bits, "expert", mean, 0, error, stored))
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
        every = itertools.product(*offers.values())
        allowed = (p for p in every if sum(o.stored for o in p) <= budget)
        best = min(sum(o.cost for o in p) for p in allowed)
        assert sum(o.cost for o in plan.values()) == pytest.approx(best)


def test_a_budget_below_the_least_has_no_plan() -> None:
    offers = drawn(0)
    least = sum(min(o.stored for o in found) for found in offers.values())
    assert spend(offers, least - 1) is None


def compiled(
    text: str, kinds: str = "MM", batches: list[torch.Tensor] = BATCHES
) -> tuple[Program, Context]:
    """Run passes over a tiny program; see `tiny_program` for the letters of `kinds`."""
    program, ctx = tiny_program(kinds), Context()
    passes, _ = resolve(parse_passes(text)[0])
    run_passes(program, passes, ctx, batches)
    return program, ctx


def count_codes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take scales and codebooks for free: they outweigh the codes of tiny experts."""

    def coded_bits(matrices: int, rows: int, columns: int, bits: int, books: int = 1) -> int:
        return matrices * rows * columns * bits

    for module in ("budget", "_code.sharing"):
        monkeypatch.setattr(f"moecc.passes.{module}.coded_bits", coded_bits)


def test_bits_go_where_errors_cost_and_stay_within_the_budget(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    count_codes_alone(monkeypatch)
    program, ctx = compiled("budget{bits=2.5,mean=off,rank=0},klt,vq")
    weights = {p: (512 if p.endswith("gate_up") else 256) * 4 for p in ctx.data["budget"]}
    spent = sum(w * ctx.data["budget"][p].bits for p, w in weights.items()) / sum(weights.values())
    assert 2.4 < spent <= 2.5
    fates = {p: str(Fate.of_json(v["fate"])) for p, v in ctx.audit.items()}
    assert set(fates.values()) == {"vq4 2 bit", "vq4 3 bit"}
    for p, planned in ctx.data["budget"].items():
        assert fates[p] == f"vq4 {planned.bits} bit"
    placeholders = [n.name for n in program.graph.nodes if n.op == "placeholder"]
    signed = {name.rpartition("_")[0] for name in placeholders if name.endswith("signs")}
    assert len(signed) == sum(planned.bits == 3 for planned in ctx.data["budget"].values())


def test_a_mean_is_planned_where_experts_are_siblings(monkeypatch: pytest.MonkeyPatch) -> None:
    count_codes_alone(monkeypatch)
    _, ctx = compiled("budget{bits=2.2,rank=0},klt,vq", "S")
    assert all(planned.mean for planned in ctx.data["budget"].values())
    assert {v["mean"] for v in ctx.audit.values()} <= {"2 bit", "3 bit", "4 bit"}


def test_too_small_a_budget_is_refused_with_the_least_possible() -> None:
    message = r"bits=2\.5 is too few; with scales and codebooks the least is \d+\.\d{3}"
    with pytest.raises(MoeccError, match=message):
        compiled("budget{bits=2.5}")


def test_a_fraction_of_bits_brings_budget_and_sensitivity_along() -> None:
    passes, remarks = resolve(parse_passes("kbvq", bits=2.5)[0])
    assert ",".join(map(str, passes)) == "sensitivity,budget,moments,klt,vq,affine{offset=off},fold"
    assert remarks == ["budget requires 'sensitivity'; inserted 'sensitivity' before it"]
    assert [str(p) for p in parse_passes("kbvq{bits=3}")[0]] == ["kbvq{bits=3}"]


def test_an_offset_is_refused_with_a_fraction_of_bits() -> None:
    with pytest.raises(MoeccError, match="kbvq: offset=on can't be planned"):
        resolve(parse_passes("kbvq{bits=2.5,offset=on}")[0])


def test_offsets_do_not_exceed_a_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    # every offset seems worth its bits
    monkeypatch.setattr("moecc.passes.affine.gain", lambda *args: 1.0)
    plan = "budget{bits=6,codebook=layer,mean=off,rank=0}"
    planned, ctx = compiled(f"{plan},klt,vq{{codebook=layer}},affine,fold", "I")
    assert experts_bits(planned) <= 6
    assert {row["affine"] for row in ctx.audit.values()} <= {"slope", "none"}
    free, _ = compiled("vq{codebook=layer},affine,fold", "I")
    assert free.moe_layers()[0].operand("down_bias") is not None
    message = "affine: offset=on can't be planned by budget; leave it out"
    with pytest.raises(MoeccError, match=message):
        compiled("budget{bits=6,codebook=layer},kbvq{codebook=layer,offset=on}", "I")


def test_a_small_budget_shares_codebooks_and_a_large_one_does_not() -> None:
    for bits, book in ((10.7, "layer"), (64.0, "expert")):
        offers = {
            "a": [Planned(2, "expert", 0, 0, 1.0, 40), Planned(2, "layer", 0, 0, 1.06, 10)],
            "b": [Planned(2, "layer", 0, 0, 9.0, 10)],
        }
        plan = spend(offers, bits * 2)
        assert plan is not None and plan["a"].codebook == book


def test_bits_go_to_the_layer_whose_output_costs_most(monkeypatch: pytest.MonkeyPatch) -> None:
    count_codes_alone(monkeypatch)
    _, ctx = compiled("budget{bits=2.7,mean=off,rank=0},klt,vq", "MMM")
    bits = [
        sum(it.bits for name, it in ctx.data["budget"].items() if str(i) in name) for i in range(3)
    ]
    costs = {name: float(s.trace()) for name, s in ctx.data["sensitivity"].items()}
    # the first layer costs the most, by far
    assert min(costs) == max(costs, key=lambda name: costs[name])
    assert bits[0] == max(bits) > min(bits)


def test_a_plan_made_on_a_sample_is_carried_out_on_all_experts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("moecc.passes._code.sharing._IN_SAMPLE", 1)
    program, ctx = compiled("budget{bits=6,codebook=layer,mean=2,rank=1},klt,vq", "I")
    assert {(it.mean, it.rank) for it in ctx.data["budget"].values()} == {(2, 1)}
    assert experts_bits(program) == pytest.approx(
        sum(it.stored for it in ctx.data["budget"].values()) / (64 * 24 * 16)
    )
    for p in program.moe_layers()[0].projections:
        held = {part: p.operand(part) for part in ("codes", "coef", "mean_codes", "basis")}
        sizes = {part: len(node.meta["val"]) for part, node in held.items() if node is not None}
        assert sizes == {"codes": 64, "coef": 64, "mean_codes": 1, "basis": 1}
        assert max(ctx.audit[p.path]["expert_in_sample_error"]) < 0.5


@pytest.mark.parametrize("numbers", [1 << 26, 1])
def test_experts_without_tokens_do_not_make_a_layer_cheap(
    numbers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither if a few experts are looked at, none of which may be among those with tokens."""
    monkeypatch.setattr("moecc.passes._code.sharing._IN_SAMPLE", numbers)
    seeds = (torch.Generator().manual_seed(i) for i in (900, 901))
    ids = [torch.randint(0, 16, (1, 6), generator=g) for g in seeds]
    plan = "budget{bits=6,codebook=layer,mean=off,rank=0}"
    _, ctx = compiled(f"{plan},klt,vq{{codebook=layer}}", "IM", ids)
    assert all(planned.cost > 0 for planned in ctx.data["budget"].values())
