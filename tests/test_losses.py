"""The losses of tuning and of adapters, against both models run whole."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pipelines import TOKENS, Tiny, compiled, derive, resolved
from torch import Tensor

from moecc.ir.graph import run_nodes
from moecc.ir.program import Program, output_node
from moecc.passes._tune import divergence as of_tuning
from moecc.passes._tune.block import Block, output_logits
from moecc.passes._tune.model_loss import ModelLoss
from moecc.passes._tune.routing import (
    boundary_loss,
    flips,
    order_loss,
    selection_scores,
    standardized,
    value_loss,
)
from moecc.passes._tune.trained import Trained
from moecc.pipeline.passes import Context, Layer, LayerPass, Pass
from moecc.pipeline.run import run_passes
from moecc.pipeline.stream import StageWeights

pytestmark = pytest.mark.usefixtures("traced_once")
CODED = "vq{rounds=1,codebook=layer}"


@torch.no_grad()
def values_of(program: Program, ids: Tensor) -> dict[str, Any]:
    """Run a whole program and return the value of every node."""
    nodes = [n for n in program.graph.nodes if n.op == "call_function"]
    values: dict[str, Any] = {program.user_inputs[0].name: ids}
    for _ in run_nodes(nodes, values, StageWeights(program), keep={n.name for n in nodes}):
        pass
    return values


def rows_of(value: Tensor) -> Tensor:
    return value.flatten(0, -2).double()


def divergence(teacher: Tensor, student: Tensor) -> float:
    """Return the mean of KL(teacher || student) over places, from logits."""
    p, q = rows_of(teacher).softmax(-1).tolist(), rows_of(student).softmax(-1).tolist()
    pairs = [(x, y) for a, b in zip(p, q, strict=True) for x, y in zip(a, b, strict=True)]
    return sum(x * math.log(x / y) for x, y in pairs) / len(p)


@pytest.mark.parametrize("at_once", [1, 100, 1 << 18])
def test_a_divergence_taken_in_parts_has_the_gradient_of_its_formula(
    at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 7 tokens by 40 logits: one by one, two at a time, all together."""
    monkeypatch.setattr(of_tuning, "_AT_ONCE", at_once)
    drawn = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(7, 40, generator=drawn).double() for _ in range(2))
    student.requires_grad_()
    found = 2 * of_tuning.divergence(student, teacher)
    p, q = teacher.softmax(-1), student.softmax(-1)
    want = 2 * (p * (p / q).log()).sum(-1).mean()
    assert float(found) == pytest.approx(2 * divergence(teacher, student.detach()), rel=1e-9)
    got = torch.autograd.grad(found, student)[0]
    torch.testing.assert_close(got, torch.autograd.grad(want, student)[0], rtol=1e-9, atol=1e-12)


def residual(program: Program, stage: int) -> str:
    """Return the name of the hidden state that leaves a stage of `traced`."""
    late = [n for n in program.graph.nodes if n.op == "call_function" and n.meta["layer"] > stage]
    read = {i for n in late for i in n.all_input_nodes if i.op == "call_function"}
    found = [n for n in read if n.meta["layer"] == stage and n.meta["val"].shape[-1] == 32]
    assert len(found) == 1
    return str(found[0].name)


def blocks(
    program: Program, sensitivity: dict[str, Tensor], batches: list[Tensor], rows: list[int]
) -> tuple[Program, dict[int, dict[str, float]]]:
    """Code a program; return it, and the terms of `rows` by stage, before any tuning."""
    program, found = program.copy(), {}

    def run_layer(self: Pass, layer: Layer, ctx: Context) -> bool:
        if layer.moe:
            block = Block(layer, ("value", "order", "boundary"), sensitivity, head=True)
            found[layer.index] = block.losses(rows, {})
        return False

    measure = derive(LayerPass, "measure", run_layer=run_layer, own_round=True)
    run_passes(program, [*resolved(CODED), measure], Context(), batches)
    return program, found


def cost(error: Tensor, sensitivity: Tensor | None) -> float:
    """Return d^T S d per direction, mean over tokens; S with a twentieth of its mean diagonal."""
    d, size = rows_of(error), error.shape[-1]
    if sensitivity is None:
        return float(d.square().sum() / (len(d) * size))
    s = sensitivity.double() + 0.05 * float(sensitivity.diagonal().mean()) * torch.eye(size)
    return sum(float(row @ s @ row) for row in d) / (len(d) * size)


@pytest.mark.parametrize("weighted", [False, True])
def test_the_terms_of_tuning_are_those_of_both_models_run_whole(
    traced: Program, weighted: bool
) -> None:
    batches, rows = TOKENS[:3], [0, 2]
    names = [residual(traced, stage) for stage in (1, 2)]
    g = torch.randn(40, 32, generator=torch.Generator().manual_seed(3)) * torch.arange(32)
    sensitivity = {name: g.T @ g for name in names} if weighted else {}
    program, found = blocks(traced, sensitivity, batches, rows)
    ours, theirs = ([values_of(p, ids) for ids in batches] for p in (program, traced))

    assert found[1].keys() == {"reconstruction", "value", "order", "boundary", "flips"}
    assert found[2].keys() == {"reconstruction", "head"}
    for stage, name in zip((1, 2), names, strict=True):
        s = sensitivity.get(name)
        spread = [cost(v[name] - v[name].mean(), s) for v in theirs]
        errors = [cost(ours[r][name] - theirs[r][name], s) for r in rows]
        want = (sum(errors) / 2) / (sum(spread) / 3)
        assert found[stage]["reconstruction"] == pytest.approx(want, rel=1e-4)

    router = program.moe_layers()[1]
    assert router.logits is not None
    pairs = [
        standardized(*(v[router.logits.name].flatten(0, -2) for v in (ours[r], theirs[r])))
        for r in rows
    ]
    losses = {"value": value_loss, "order": order_loss, "boundary": boundary_loss, "flips": flips}
    for name, loss in losses.items():
        want = sum(float(loss(s, t, router.top_k)) for s, t in pairs) / 2
        assert found[1][name] == pytest.approx(want, rel=1e-4), name
    output = output_node(program).name
    head = sum(divergence(theirs[r][output], ours[r][output]) for r in rows) / 2
    assert found[2]["head"] == pytest.approx(head, rel=1e-4) and head > 1e-4


def test_the_tuning_of_a_head_needs_logits_of_the_text_s_vocabulary(tiny: Tiny) -> None:
    """A model of images and text has its vocabulary in the configuration of its text."""
    program = tiny("M")

    def config(vocabulary: int) -> Any:
        return SimpleNamespace(vocab_size=vocabulary)

    nested = SimpleNamespace(vocab_size=7, get_text_config=lambda: config(16))
    for found, there in ((config(16), True), (config(17), False), (nested, True), (None, False)):
        program.config = found
        assert output_logits(program) is (output_node(program) if there else None)


def test_the_loss_of_adapters_is_that_of_both_models_run_whole(traced: Program) -> None:
    """Of eight batches, the last one is held out."""
    before = compiled(traced, f"{CODED},affine,fold").program
    weights = {"hidden": 0.5, "kl": 2.0, "lm": 0.25, "routing": 3.0}
    options = ",".join(f"{k}={v}" for k, v in weights.items())
    run = compiled(traced, f"{CODED},affine,fold,rilq{{steps=1,rank=2,{options}}}")
    told = run.ctx.audit[f"{traced.moe_layers()[0].path}.down"]["rilq"]
    ids = TOKENS[7]
    ours, theirs = values_of(before, ids), values_of(traced, ids)

    hidden, output = residual(traced, 2), output_node(traced).name
    moved = (rows_of(ours[hidden]) - rows_of(theirs[hidden])).square().sum()
    logits = rows_of(ours[output]).log_softmax(-1)
    text = [-float(logits[i, token]) for i, token in enumerate(ids[0, 1:].tolist())]
    routers = [m.logits for m in traced.moe_layers() if m.logits is not None]
    pairs = [standardized(*(v[n.name].flatten(0, -2) for v in (ours, theirs))) for n in routers]
    want = {
        "hidden": float(moved / rows_of(theirs[hidden]).square().sum()),
        "kl": divergence(theirs[output], ours[output]),
        "lm": sum(text) / len(text),
        "routing": sum(float(value_loss(s, t, 2) + boundary_loss(s, t, 2)) for s, t in pairs) / 2,
    }
    start = {"hidden": 1.0, "kl": 1.0, "routing": 1.0, "lm": want["lm"]}
    want["loss"] = sum(weights[k] * v for k, v in start.items())
    assert told["before"] == pytest.approx(want, rel=1e-3)
    after = {k: v / want[k] for k, v in told["after"].items()} | {"lm": told["after"]["lm"]}
    loss = sum(weights[k] * after[k] for k in weights)
    assert told["after"]["loss"] == pytest.approx(loss, rel=1e-3)


def test_the_gradient_of_adapters_is_that_of_the_loss_of_the_whole_graph(
    tiny: Tiny, batches: list[Tensor]
) -> None:
    reference = tiny("MM")
    run = compiled(reference, f"{CODED},affine,fold", batches=batches)
    program, ctx = run.program, Context(reference=reference, batches=batches)
    trained = Trained(program, ctx, rank=0, experts=True, lr=1.0)
    weights = {"hidden": 0.5, "kl": 2.0, "lm": 0.0, "routing": 3.0}
    loss = ModelLoss(program, trained, ctx, weights, has_head=True)
    start = {"hidden": 0.1, "kl": 0.2, "routing": 0.3}
    loss.start_at(start)
    row, share = 2, 0.25
    for _ in range(2):  # gradients add up
        loss.backward(row, share)

    theirs = values_of(reference, batches[row])
    nodes = [n for n in program.graph.nodes if n.op == "call_function"]
    routers = [selection_scores(m).name for m in program.moe_layers()]
    output = output_node(program)
    (last,) = (n.name for n in output.all_input_nodes if n.op == "call_function")
    with torch.enable_grad():
        overrides = trained.values(trained.placeholders)
        shared = StageWeights.sharing(StageWeights(program), overrides)
        ours: dict[str, Any] = {program.user_inputs[0].name: batches[row]}
        for _ in run_nodes(nodes, ours, shared, keep={n.name for n in nodes}):
            pass
        p, q = (v[output.name].log_softmax(-1) for v in (theirs, ours))
        pairs = [standardized(ours[n], theirs[n]) for n in routers]
        terms = {
            "hidden": (ours[last] - theirs[last]).square().sum() / theirs[last].square().sum(),
            "kl": (p.exp() * (p - q)).sum(-1).mean(),
            "routing": sum(value_loss(s, t, 2) + boundary_loss(s, t, 2) for s, t in pairs) / 2,
        }
        whole = sum(weights[k] / start[k] * terms[k] for k in start)
        grads = torch.autograd.grad(2 * share * whole, trained.parameters)
    moved = [p.grad for p in trained.parameters]
    for got, want in zip(moved, grads, strict=True):
        assert got is not None and bool(want.any())
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4 * float(want.abs().max()))
