"""Losses that compare two routers, against loops over tokens and experts in plain Python."""

from __future__ import annotations

import itertools
import math
import operator
from typing import Any

import pytest
import torch
from families import make
from torch import Tensor, fx

from moecc.frontend.trace import trace
from moecc.ir.graph import run_nodes
from moecc.ir.moe import MoE
from moecc.passes._tune.routing import (
    boundary_loss,
    boundary_nearness,
    flips,
    order_loss,
    selection_scores,
    standardized,
    value_loss,
)
from moecc.pipeline.stream import StageWeights

pytestmark = pytest.mark.usefixtures("traced_once")
TOKENS, EXPERTS = 4, 6  # fewer tokens than experts: no axis passes for the other


def scores(seed: int = 0, *, moved: float = 0.7) -> tuple[Tensor, Tensor]:
    """Return a student's and a teacher's scores [T, E]; some gaps are wide, others narrow."""
    g = torch.Generator().manual_seed(seed)
    teacher = torch.randn(TOKENS, EXPERTS, generator=g)
    return teacher + moved * torch.randn(TOKENS, EXPERTS, generator=g), teacher


def ranks(t: list[float]) -> list[int]:
    """Return the experts from the highest score to the lowest."""
    return sorted(range(len(t)), key=lambda e: -t[e])


def hinge(s: list[float], t: list[float], high: int, low: int) -> float:
    """Return how far a gap falls short of the teacher's, or of half a standard deviation."""
    missing = min(t[high] - t[low], 0.5) - (s[high] - s[low])
    return missing**2 if missing > 0 else 0.0


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_the_boundary_loss_is_the_sum_over_chosen_and_rejected_experts(top_k: int) -> None:
    student, teacher = scores()
    total = 0.0
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        order = ranks(t)
        pairs = itertools.product(order[:top_k], order[top_k:])
        total += sum(hinge(s, t, high, low) for high, low in pairs)
    found = boundary_loss(student, teacher, top_k)
    assert float(found) == pytest.approx(total / TOKENS, rel=1e-5) and total > 0


@pytest.mark.parametrize("top_k", [1, 2, 3, 5])
def test_the_order_loss_is_the_sum_over_neighbours_among_the_chosen(top_k: int) -> None:
    student, teacher = scores(2, moved=1.5)
    total = 0.0
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        order = ranks(t)[:top_k]
        total += sum(hinge(s, t, high, low) for high, low in itertools.pairwise(order))
    found = order_loss(student, teacher, top_k)
    assert float(found) == pytest.approx(total / TOKENS, rel=1e-5) and (total > 0) == (top_k > 1)


def nearness(t: list[float], top_k: int, sharpness: float) -> list[float]:
    """Return exp(-sharpness |t - b|) of each score, b midway between the last chosen and next."""
    order = ranks(t)
    b = (t[order[top_k - 1]] + t[order[top_k]]) / 2
    return [math.exp(-sharpness * abs(x - b)) for x in t]


@pytest.mark.parametrize(("top_k", "sharpness"), [(1, 1.0), (2, 4.0), (4, 0.5)])
def test_nearness_falls_with_the_distance_from_the_boundary(top_k: int, sharpness: float) -> None:
    teacher = scores(2)[1]
    want = [nearness(t, top_k, sharpness) for t in teacher.tolist()]
    torch.testing.assert_close(boundary_nearness(teacher, top_k, sharpness), torch.tensor(want))
    sharp = boundary_nearness(teacher, top_k, 1.0)
    assert torch.equal(boundary_nearness(teacher, top_k), sharp)


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_the_value_loss_weighs_each_score_by_its_sensitivity(top_k: int) -> None:
    student, teacher = scores(3)
    total = 0.0
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        p = [math.exp(x) / sum(map(math.exp, t)) for x in t]
        near = nearness(t, top_k, 1.0)
        q = [x * (1 - x) + n for x, n in zip(p, near, strict=True)]
        total += sum(w * (a - b) ** 2 for w, a, b in zip(q, s, t, strict=True)) / sum(q)
    assert float(value_loss(student, teacher, top_k)) == pytest.approx(total / TOKENS, rel=1e-5)


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_flips_are_the_share_of_chosen_experts_that_are_lost(top_k: int) -> None:
    student, teacher = scores(4, moved=1.5)
    chosen = [[set(ranks(row)[:top_k]) for row in side.tolist()] for side in (student, teacher)]
    lost = sum(len(t - s) for s, t in zip(*chosen, strict=True))
    assert float(flips(student, teacher, top_k)) == pytest.approx(lost / (TOKENS * top_k))
    assert lost and float(flips(teacher, teacher, top_k)) == 0


def test_scores_are_divided_by_the_teacher_s_standard_deviation() -> None:
    student, teacher = scores(5)
    student, teacher = 3 * student, 3 * teacher + 2
    flat = teacher.flatten().tolist()
    mean = sum(flat) / len(flat)
    spread = math.sqrt(sum((x - mean) ** 2 for x in flat) / (len(flat) - 1))
    s, t = standardized(student, teacher)
    torch.testing.assert_close(s, student / spread)
    torch.testing.assert_close(t, teacher / spread)


@pytest.mark.parametrize("mask", [-math.inf, -1e30, math.inf])
def test_a_masked_score_is_one_deviation_below_the_lowest(mask: float) -> None:
    student, teacher = scores(6)
    teacher[:, 0], student[:, 0], student[0, 1] = mask, mask, mask
    free = teacher[:, 1:].flatten().tolist()
    mean = sum(free) / len(free)
    spread = math.sqrt(sum((x - mean) ** 2 for x in free) / (len(free) - 1))
    low = min(free) / spread - 1
    s, t = standardized(student, teacher)
    assert t[:, 0].tolist() == pytest.approx([low] * TOKENS)
    assert [*s[:, 0].tolist(), float(s[0, 1])] == pytest.approx([low] * (TOKENS + 1))
    torch.testing.assert_close(t[:, 1:], teacher[:, 1:] / spread)


def test_equal_scores_have_a_spread_of_a_millionth() -> None:
    level = torch.full((TOKENS, EXPERTS), 2.0)
    s, t = standardized(level + 1e-6, level)
    assert torch.equal(t, level / 1e-6)
    assert torch.equal(s, (level + 1e-6) / 1e-6)


# mixtral and qwen2_moe take a softmax, deepseek_v3 adds a bias and masks groups
@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss"])
@torch.no_grad()
def test_the_highest_selection_scores_are_the_experts_that_are_chosen(family: str) -> None:
    program = trace(make(family), dtype=torch.float32)
    ids = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(0))
    nodes = [n for n in program.graph.nodes if n.op == "call_function"]
    values: dict[str, Any] = {program.user_inputs[0].name: ids}
    for _ in run_nodes(nodes, values, StageWeights(program), keep={n.name for n in nodes}):
        pass
    for moe in program.moe_layers():
        chosen, node = moe.node.args[1], selection_scores(moe)
        assert isinstance(chosen, fx.Node)
        best = values[node.name].flatten(0, -2).topk(moe.top_k, -1).indices
        assert torch.equal(best.sort(-1).values, values[chosen.name].sort(-1).values)
        # logits are easier to train than a softmax of them
        assert (node is moe.logits) == (family != "deepseek_v3")


aten = torch.ops.aten


def router(*steps: Any) -> tuple[MoE, fx.Node]:
    """Return a layer whose logits go through `steps`; a top-k stands for itself. And the last."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    logits = last = graph.call_function(aten.linear.default, (x, x))
    for step in (*steps, aten.topk.default):
        scores, last = last, graph.call_function(step, (last, 2))
    chosen = graph.call_function(operator.getitem, (last, 1))
    return MoE(graph.call_function(aten.add.Tensor, (x, chosen)), "experts", 1, logits), scores


@pytest.mark.parametrize(
    "step", [aten.to.dtype, aten._to_copy.default, aten.view.default, aten.reshape.default]
)
def test_logits_are_taken_through_a_softmax_and_what_keeps_its_numbers(step: Any) -> None:
    moe, _ = router(step, aten.softmax.int)
    assert selection_scores(moe) is moe.logits
    moe, _ = router(aten._softmax.default, step)
    assert selection_scores(moe) is moe.logits
    moe, scores = router(aten.softmax.int, step, aten.add.Tensor)
    assert selection_scores(moe) is scores
    moe, scores = router(aten.sigmoid.default, step)
    assert selection_scores(moe) is scores


def test_the_last_of_several_top_ks_decides() -> None:
    moe, _ = router()
    assert selection_scores(moe) is moe.logits
    moe, scores = router(aten.sigmoid.default, aten.topk.default, aten.mul.Tensor)
    assert selection_scores(moe) is scores
    moe, _ = router(aten.sigmoid.default)
    moe.node.args = (moe.node.args[0], moe.logits)  # all experts are chosen: nothing is compared
    assert selection_scores(moe) is moe.logits
