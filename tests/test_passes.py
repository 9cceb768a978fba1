"""One contract for all passes. These tests find a new pass by themselves."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import Field, fields

import pytest
import torch
from families import make
from pipelines import MY_PASS, TOKENS, Run, Tiny, compiled, expert_errors
from torch import Tensor

from moecc.errors import MoeccError
from moecc.frontend.trace import trace
from moecc.ir.program import Program
from moecc.pipeline.parse import find_pass, pass_names
from moecc.pipeline.passes import Composite
from moecc.pipeline.stream import run_program
from moecc.types import FamilyModule

pytestmark = pytest.mark.usefixtures("traced_once")


# The pipelines in which each pass is tested; a pass that is not listed runs with its defaults. They
# are small. For most passes, one changes the tiny model and the other leaves it as it is.
OPTIONS: dict[str, list[str]] = {
    "budget": [
        "budget{bits=6,codebook=layer}",
        "budget{bits=6,codebook=layer,mean=off},klt,vq{codebook=layer}",
    ],
    "klt": ["klt{rank=2,mean=3}", "klt{rank=0}"],
    "vq": ["vq{bits=3,codebook=layer}", "vq{rounds=1,feedback=false}"],
    "sensitivity": ["sensitivity", "sensitivity{kl=0,routing=0}"],
    "affine": ["affine{offset=on}", "affine{offset=off}"],
    "vsraq": ["vsraq{steps=4}", "vsraq{steps=1,lr=0.0001}"],
    "rilq": ["rilq{steps=4,rank=2}", "rilq{steps=1,lr=0.0001,experts=false,patience=1}"],
    "lora": [],
    "absorb": [],  # both need an adapter: tests/test_lora.py
    "merge": ["rilq{steps=12,rank=2,lr=10},merge"],
    "kbvq": ["kbvq", "kbvq{bits=4,rank=4,mean=2,offset=on}"],
    "dense": ["dense{group=16}", "dense{group=16,bits=4}", "dense{group=128}"],
    MY_PASS: [f"affine{{offset=on}},{MY_PASS}{{below=100}}", f"{MY_PASS}{{below=0}}"],
}


CASES = [text for name in [*pass_names(), MY_PASS] for text in OPTIONS.get(name, [name])]


# ---- the contract


@pytest.fixture(scope="module", params=CASES)
def text_and_run(request: pytest.FixtureRequest, traced: Program) -> tuple[str, Run]:
    return request.param, compiled(traced, request.param, seed=7)


def test_a_pass_reports_whether_it_changed_anything_and_leaves_a_legal_graph(
    traced: Program, text_and_run: tuple[str, Run]
) -> None:
    run = text_and_run[1]
    run.program.verify()
    said = dict(zip(run.differed, (r.changed for r in run.reports), strict=True))
    assert said == run.differed
    out = run.output()
    assert out.shape == torch.cat(run_program(traced, TOKENS)).shape
    assert bool(torch.isfinite(out).all())


def test_the_same_seed_gives_the_same_bytes(traced: Program, text_and_run: tuple[str, Run]) -> None:
    text, first = text_and_run
    again = compiled(traced, text, seed=7)
    assert first.program.text() == again.program.text()
    assert first.ctx.audit == again.ctx.audit and first.ctx.notes == again.ctx.notes


def test_passes_do_not_change_the_program_that_was_copied(traced: Program) -> None:
    before = traced.text()
    compiled(traced, "kbvq,vsraq{steps=2},dense{group=16}")
    assert traced.text() == before


@pytest.mark.parametrize("name", pass_names())
def test_options_out_of_range_are_refused(name: str) -> None:
    cls = find_pass(name)
    for f in fields(cls):
        for wrong in out_of_range(f):
            with pytest.raises(MoeccError, match=f"{name}: {f.name}=.* is out of range; it takes "):
                cls(**{f.name: wrong})


def out_of_range(f: Field[object]) -> Iterator[object]:
    """Yield values of an option that its bounds or choices exclude."""
    low, high, choices = (f.metadata.get(k) for k in ("low", "high", "choices"))
    if low is not None:
        yield low - 1
    if high is not None:
        yield high + 1
    if choices:
        yield "nonsense"
        if low is None and not isinstance(choices[0], str):
            yield max(choices) + 1


@pytest.mark.parametrize("name", pass_names())
def test_facts_are_declared_as_sets_of_names(name: str) -> None:
    cls = find_pass(name)
    for attribute in ("requires", "after", "provides", "spoils"):
        facts = getattr(cls, attribute)
        assert isinstance(facts, frozenset) and all(isinstance(f, str) for f in facts)
    assert not cls.provides & cls.requires
    if issubclass(cls, Composite):
        parts = cls().expand()
        assert cls.provides == frozenset().union(*(p.provides for p in parts))


def test_a_model_without_experts_is_left_alone(tiny: Tiny, batches: list[Tensor]) -> None:
    program = tiny("DD")
    for name in (n for n in pass_names() if OPTIONS.get(n) != []):
        run = compiled(program, OPTIONS.get(name, [name])[0], batches=batches)
        if name not in ("dense", "rilq", "merge"):  # these work outside the experts too
            assert not any(run.differed.values()) and not any(r.changed for r in run.reports), name


def test_error_falls_as_bits_rise(traced: Program) -> None:
    runs = [
        compiled(traced, f"klt{{rank=2}},vq{{bits={b},codebook=layer}},affine,fold")
        for b in (2, 3, 4)
    ]
    for path in expert_errors(runs[0]):
        errors = [sum(expert_errors(run)[path]) for run in runs]
        assert errors[0] > errors[1] > errors[2] > 0, path
    want = torch.cat(run_program(traced, TOKENS))
    moved = [float((r.output() - want).square().mean()) for r in runs]
    assert moved[0] > moved[1] > moved[2]
    bits = [r.reports[-1].bits for r in runs]
    assert bits[1] > bits[0] and bits[2] > bits[0]


def permuted(model: FamilyModule, order: list[int]) -> FamilyModule:
    """Copy a model and put its experts in another order: weights and router rows."""
    model = copy.deepcopy(model)
    for layer in model.model.layers:
        experts = layer.mlp.experts
        for p in (experts.gate_up_proj, experts.down_proj, layer.mlp.gate.weight):
            p.data = p.data[order].clone()
    return model


def test_permuting_experts_permutes_results() -> None:
    """The order of sums and the random start of k-means still make small differences."""
    order = [2, 0, 3, 1]
    model = make("qwen2_moe")
    programs = [trace(model), trace(permuted(model, order))]
    want = torch.cat(run_program(programs[0], TOKENS))
    got = torch.cat(run_program(programs[1], TOKENS))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)

    first, second = (compiled(p, "klt{rank=3}") for p in programs)
    torch.testing.assert_close(second.output(), first.output(), rtol=1e-3, atol=1e-3)
    for moe in first.program.moe_layers():
        for projection in ("gate_up", "down"):
            for name, near in (("remainder", 2e-3), ("coef_scale", 1e-3)):
                key = f"{moe.path}.{projection}.{name}"
                a, b = first.program.read(key).float(), second.program.read(key).float()
                torch.testing.assert_close(b, a[order], rtol=1e-2, atol=near)

    text = "klt{rank=3},vq{bits=3,codebook=layer},affine,fold"
    first, second = (compiled(p, text) for p in programs)
    for path, errors in expert_errors(first).items():
        tokens = first.ctx.audit[path]["tokens"]
        # the second layer's router sees the differences of the first
        same = second.ctx.audit[path]["tokens"] == [tokens[e] for e in order]
        assert same or path.startswith("model.layers.1")
        for got, e in zip(expert_errors(second)[path], order, strict=True):
            assert got == pytest.approx(errors[e], rel=0.5)


@pytest.fixture(scope="module")
def starved() -> Program:
    """gpt_oss whose router never chooses expert 3 of the first layer."""
    model = make("gpt_oss")
    with torch.no_grad():
        model.model.layers[0].mlp.router.bias[3] = -1e4
    return trace(model)


@pytest.mark.parametrize(
    "text", ["kbvq{rank=2,offset=on},vsraq{steps=2}", "vq{bits=3}", "moments{min_tokens=1},vq"]
)
def test_an_expert_with_no_routed_token_works_and_is_named(starved: Program, text: str) -> None:
    run = compiled(starved, text)
    path = starved.moe_layers()[0].path
    named = [note for note in run.ctx.notes if note.startswith(f"{path}: ")]
    assert len(named) == 1 and named[0].endswith(" sent to each on purpose")
    assert ", expert 3 only 0; calibrated on " in named[0]
    row = run.ctx.audit[f"{path}.gate_up"]
    assert row["tokens"][3] == 0 and "3" in {str(e) for e in row["starved"]}
    for projection in ("gate_up", "down"):
        errors = run.ctx.audit[f"{path}.{projection}"]["expert_in_sample_error"]
        assert all(math.isfinite(e) and e < 0.5 for e in errors)
    assert bool(torch.isfinite(run.output()).all())


def test_calibration_sees_compressed_earlier_layers(traced: Program) -> None:
    """The codes of the second layer depend on those of the first."""
    runs = [compiled(traced, f"vq{{bits={b},codebook=layer}}") for b in (2, 4)]
    names = [
        {n for n in run.program.tensors if "layers.1" in n and n.endswith("gate_up.scale")}
        for run in runs
    ]
    assert names[0] == names[1] and len(names[0]) == 1
    alone = compiled(traced, "vq{bits=2,codebook=layer}", batches=TOKENS[:2])
    assert alone.program.text() != runs[0].program.text()


def test_tuning_lowers_the_held_out_loss_or_leaves_all_as_it_was(traced: Program) -> None:
    run = compiled(traced, "vq{codebook=layer},vsraq{steps=40}")
    terms = run.ctx.audit["model.layers.0.mlp.experts.gate_up"]["tuned"]
    options = find_pass("vsraq")()
    kinds = [k for k in ("reconstruction", "value", "order", "boundary") if k in terms["before"]]
    ratio = {k: terms["after"][k] / max(terms["before"][k], 1e-12) for k in kinds}
    assert sum(getattr(options, k) * (ratio[k] - 1) for k in kinds) <= 1e-9


def test_a_linear_of_zeros_has_no_error() -> None:
    model = make("qwen2_moe")
    name = "model.layers.0.self_attn.q_proj"
    model.get_submodule(name).weight.data.zero_()
    assert compiled(trace(model), "dense{group=16}").ctx.audit[f"{name}.weight"]["error"] == 0
