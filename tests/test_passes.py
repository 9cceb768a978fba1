"""One contract for every pass, and what each does to a small graph. A new pass is tested here as soon as it can be found."""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import make
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moecc.errors import MoeccError
from moecc.frontend.trace import trace
from moecc.ir import vq4
from moecc.ir.graph import run_nodes
from moecc.ir.moe import MoE, operand_names
from moecc.ir.ops import KLT_EXPERTS, VQ_EXPERTS
from moecc.ir.program import Program, output_node, stage_nodes
from moecc.ir.tensors import digest
from moecc.passes._code.half import compact
from moecc.passes._code.moments import measure, routed_tokens
from moecc.passes._tune.low_rank import attached
from moecc.passes._tune.routing import selection_scores
from moecc.passes._tune.tuned import Tuned
from moecc.passes._tune.whole import Whole
from moecc.passes.affine import shift
from moecc.passes.rilq import Trained
from moecc.passes.sensitivity import Gradients
from moecc.pipeline.order import require_whole, resolve
from moecc.pipeline.parse import find_pass, parse_passes, pass_names
from moecc.pipeline.passes import Composite, Context, Layer
from moecc.pipeline.run import Hooks, PassReport, run_passes
from moecc.pipeline.stream import StageWeights, Stream, first_tokens, run_program

pytestmark = pytest.mark.usefixtures("traced_once")

Tiny = Callable[[str], Program]
ROOT = Path(__file__).parents[1]
MY_PASS = str(ROOT / "examples" / "my_pass.py")
TOKENS = [
    torch.randint(0, 64, (1, 24), generator=torch.Generator().manual_seed(i)) for i in range(8)
]
# Options under which a pass is run here; a pass that is not listed runs with its defaults. Small, and for each pass of ours one
# that changes the tiny model and one that leaves it as it is.
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
    "absorb": [],  # need an adapter: tests/test_lora.py
    "merge": ["rilq{steps=12,rank=2,lr=10},merge"],
    "kbvq": ["kbvq", "kbvq{bits=4,rank=4,mean=2,offset=on}"],
    "dense": ["dense{group=16}", "dense{group=16,bits=4}", "dense{group=128}"],
    MY_PASS: [f"affine{{offset=on}},{MY_PASS}{{below=100}}", f"{MY_PASS}{{below=0}}"],
}
CASES = [text for name in [*pass_names(), MY_PASS] for text in OPTIONS.get(name, [name])]


@pytest.fixture(scope="module")
def traced() -> Program:
    """qwen2_moe with two MoE layers of random weights; tests take copies."""
    return trace(make("qwen2_moe"))


@dataclass
class Run:
    """A finished run, and for each pass in turn whether the text of the graph differed after it."""

    program: Program
    ctx: Context
    reports: list[PassReport]
    differed: dict[str, bool] = field(default_factory=dict)
    texts: dict[str, str] = field(
        default_factory=dict
    )  # by "layer001-vq" and the like, "before" the first

    def output(self) -> Tensor:
        return torch.cat(run_program(self.program, TOKENS))


def compiled(
    program: Program,
    text: str,
    *,
    seed: int = 0,
    batches: list[Tensor] | None = None,
    facts: tuple[str, ...] = (),
) -> Run:
    """`text` run over a copy of `program`, with an eye on what each pass changed."""
    program = program.copy()
    passes, _ = resolve(parse_passes(text)[0], facts)
    found = Run(
        program, Context(seed=seed), [], {p.name: False for p in passes}, {"before": program.text()}
    )
    last = found.texts["before"]

    def look(name: str, after: str) -> None:
        nonlocal last
        found.differed[name] |= after != last
        last = after

    def dump(label: str, now: Program, stage: int | None) -> None:
        if stage is not None:
            found.texts[label] = now.text()
            look(label.split("-", 1)[1], found.texts[label])

    def after_pass(report: PassReport, now: Program) -> None:
        p = next(p for p in passes if str(p) == report.text)
        if f"layer001-{p.name}" not in found.texts:  # a model pass
            look(p.name, now.text())

    hooks = Hooks(dump=dump, after_pass=after_pass)
    found.reports = run_passes(
        program, passes, found.ctx, TOKENS if batches is None else batches, hooks
    )
    return found


# ---- the contract


@pytest.fixture(scope="module", params=CASES)
def text_and_run(request: pytest.FixtureRequest, traced: Program) -> tuple[str, Run]:
    return request.param, compiled(traced, request.param, seed=7)


def test_a_pass_says_honestly_whether_it_changed_anything_and_leaves_a_legal_graph(
    traced: Program, text_and_run: tuple[str, Run]
) -> None:
    run = text_and_run[1]
    run.program.verify()
    said = dict(zip(run.differed, (r.changed for r in run.reports), strict=True))
    assert said == run.differed
    out = run.output()
    assert out.shape == torch.cat(run_program(traced, TOKENS)).shape and bool(
        torch.isfinite(out).all()
    )


def test_the_same_seed_gives_the_same_bytes(traced: Program, text_and_run: tuple[str, Run]) -> None:
    text, first = text_and_run
    again = compiled(traced, text, seed=7)
    assert first.program.text() == again.program.text()
    assert first.ctx.audit == again.ctx.audit and first.ctx.notes == again.ctx.notes


def test_passes_leave_the_program_they_copied_from_alone(traced: Program) -> None:
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


def out_of_range(f: Any) -> Iterator[Any]:
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
def test_facts_are_declared(name: str) -> None:
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
        if name not in ("dense", "rilq", "merge"):  # which work on what every token goes through
            assert not any(run.differed.values()) and not any(r.changed for r in run.reports), name


# ---- properties


def expert_errors(run: Run) -> dict[str, list[float]]:
    return {
        path: row["expert_error"] for path, row in run.ctx.audit.items() if "expert_error" in row
    }


def test_error_falls_as_bits_rise(traced: Program) -> None:
    runs = [
        compiled(traced, f"klt{{rank=2}},vq{{bits={b},codebook=layer}},affine,fold")
        for b in (2, 3, 4)
    ]
    for path in expert_errors(runs[0]):
        errors = [sum(expert_errors(r)[path]) for r in runs]
        assert errors[0] > errors[1] > errors[2] > 0, path
    want = torch.cat(run_program(traced, TOKENS))
    moved = [float((r.output() - want).square().mean()) for r in runs]
    assert moved[0] > moved[1] > moved[2]
    bits = [r.reports[-1].bits for r in runs]
    assert bits[1] > bits[0] and bits[2] > bits[0]


def permuted(model: Any, order: list[int]) -> Any:
    """The same model with its experts in another order: weights and router rows."""
    model = copy.deepcopy(model)
    for layer in model.model.layers:
        for p in (
            layer.mlp.experts.gate_up_proj,
            layer.mlp.experts.down_proj,
            layer.mlp.gate.weight,
        ):
            p.data = p.data[order].clone()
    return model


def test_permuting_experts_permutes_results() -> None:
    """Exactly, but for what depends on the order of sums and on the draw that k-means starts from."""
    order = [2, 0, 3, 1]
    model = make("qwen2_moe")
    programs = [trace(model), trace(permuted(model, order))]
    want = torch.cat(run_program(programs[0], TOKENS))
    torch.testing.assert_close(
        torch.cat(run_program(programs[1], TOKENS)), want, rtol=1e-4, atol=1e-4
    )

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
        assert second.ctx.audit[path]["tokens"] == [tokens[e] for e in order] or path.startswith(
            "model.layers.1"
        )
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
    named = [
        n
        for n in run.ctx.notes
        if n.startswith(f"{path} expert 3: 0 routed tokens; calibrated on ")
    ]
    assert len(named) == 1 and named[0].endswith(" sent to it on purpose")
    row = run.ctx.audit[f"{path}.gate_up"]
    assert row["tokens"][3] == 0 and "3" in {str(e) for e in row["starved"]}
    for projection in ("gate_up", "down"):
        assert all(
            math.isfinite(e) and e < 0.5
            for e in run.ctx.audit[f"{path}.{projection}"]["expert_error"]
        )
    assert bool(torch.isfinite(run.output()).all())


def test_calibration_sees_compressed_earlier_layers(traced: Program) -> None:
    """The second layer's codes depend on what the first was coded to."""
    runs = [compiled(traced, f"vq{{bits={b},codebook=layer}}") for b in (2, 4)]
    texts = [
        {
            k: v
            for k, v in r.program.tensors.items()
            if "layers.1" in k and k.endswith("gate_up.scale")
        }
        for r in runs
    ]
    assert texts[0].keys() == texts[1].keys() and len(texts[0]) == 1
    alone = compiled(traced, "vq{bits=2,codebook=layer}", batches=TOKENS[:2])
    assert alone.program.text() != runs[0].program.text()


@pytest.mark.parametrize("rank", ["40", "1024"])
def test_a_rank_beyond_the_dimensions_is_an_error(traced: Program, rank: str) -> None:
    with pytest.raises(
        MoeccError, match=rf"klt\{{rank={rank}\}} failed in layer 0 .*more than .* dimensions"
    ):
        compiled(traced, f"klt{{rank={rank}}}")


@pytest.mark.parametrize("options", ["rank=4", "rank=0,mean=2", "rank=4,mean=3"])
def test_klt_changes_the_program_by_rounding_only(traced: Program, options: str) -> None:
    run = compiled(traced, f"klt{{{options}}}")
    assert [m.node.target for m in run.program.moe_layers()] == [KLT_EXPERTS] * 2
    torch.testing.assert_close(
        run.output(), torch.cat(run_program(traced, TOKENS)), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize(("mean", "bits"), [("off", 0), (2, 2), (3, 3), (4, 4)])
def test_basis_and_mean_are_there_as_told(
    tiny: Tiny, batches: list[Tensor], rank: int, mean: int | str, bits: int
) -> None:
    run = compiled(tiny("M"), f"klt{{rank={rank},mean={mean}}},vq{{rounds=1}}", batches=batches)
    (moe,) = run.program.moe_layers()
    for projection in moe.projections:
        there = {n for n in vq4.SHARED if projection.operand(n) is not None}
        want = {"basis", "coef", "coef_scale"} if rank else set()
        want |= {"mean_codes", "mean_codebook", "mean_scale"} if bits else set()
        assert there == want | ({"mean_signs"} if bits == 3 else set())
        assert not bits or projection.bits(vq4.MEAN) == bits
        row = run.ctx.audit[projection.path]
        assert (row["rank"], row["mean"]) == (rank, f"{bits} bit" if bits else "none")


def test_experts_of_one_parent_get_a_mean_where_it_is_worth_its_bits(
    tiny: Tiny, batches: list[Tensor]
) -> None:
    """And what is left of them is coded the better for it."""
    alike, off, independent, few = (
        compiled(tiny(kind), f"{klt},vq{{rounds=1,codebook=layer}}", batches=batches).ctx.audit
        for kind, klt in (("S", "klt"), ("S", "klt{mean=off}"), ("I", "klt"), ("F", "klt"))
    )
    for path in ("layers.0.gate_up", "layers.0.down"):
        assert alike[path]["mean"] in ("2 bit", "3 bit", "4 bit")
        assert [audit[path]["mean"] for audit in (off, independent, few)] == ["none"] * 3
        assert alike[path]["error"] < off[path]["error"] / 5


def test_a_mean_s_codebook_and_scale_are_trained_and_stored_as_the_format_has_them(
    tiny: Tiny, batches: list[Tensor]
) -> None:
    program = compiled(
        tiny("M"), "klt{rank=2,mean=3},vq{rounds=1},affine,fold", batches=batches
    ).program
    (moe,) = program.moe_layers()
    tuned = Tuned(program, [moe])
    assert set(tuned.kinds.values()) >= {
        "codebook",
        "scale",
        "basis",
        "coef",
        "mean_codebook",
        "mean_scale",
    }
    mean = {k: kind for k, kind in tuned.kinds.items() if kind.startswith(vq4.MEAN)}
    assert [tuned.bits[k] for k in tuned.kinds] == [3 if k in mean else 2 for k in tuned.kinds]

    before, weights = tuned.stored(), StageWeights(program)
    with torch.enable_grad():
        shared = StageWeights.sharing(weights, tuned.rounded())
        values: dict[str, Any] = {program.user_inputs[0].name: batches[0]}
        for _ in run_nodes(
            [n for n in program.graph.nodes if n.op == "call_function"], values, shared
        ):
            pass
        values[output_node(program).name].square().mean().backward()
    optimizer = torch.optim.Adam(tuned.groups(10.0))
    assert all(p.grad is not None and bool(p.grad.any()) for p in tuned.parameters.values())
    optimizer.step()
    after = tuned.stored()
    for k, kind in mean.items():
        assert not torch.equal(after[k], before[k])
        assert after[k].dtype == (torch.int8 if kind == "mean_codebook" else torch.float16)
        assert (
            kind != "mean_codebook" or int(after[k].min()) >= 0
        )  # as three bits' symmetric codebooks are
    assert tuned.store() and all(torch.equal(program.read(tuned.names[k]), after[k]) for k in mean)
    program.verify()


def tensors_of(program: Program, moe: MoE) -> dict[str, Any]:
    """The operands of an experts node behind the routing, by name; None where one is absent."""
    nodes = {name: moe.operand(name) for name in operand_names(moe.node)[3:]}
    return {name: None if node is None else program.value(node) for name, node in nodes.items()}


@pytest.mark.parametrize(
    ("family", "before"), [("qwen2_moe", ""), ("qwen2_moe", "klt{rank=2,mean=2},"), ("gpt_oss", "")]
)
def test_fold_is_exact_up_to_rounding(family: str, before: str) -> None:
    """Of one compiled program: compiled anew with fold, the second layer is coded for what the rounded first one gives."""
    start = compiled(trace(make(family)), f"{before}vq{{bits=3}},affine{{offset=on}}").program
    folded = compiled(start, "fold", facts=("affine",)).program
    assert "slope" not in folded.text() and "offset" not in folded.text()
    seen: dict[str, list[Tensor]] = {}
    run_program(start, TOKENS, lambda node, value, _: seen.setdefault(node.name, []).append(value))
    unit = 2**-11  # rounding to float16 moves a number by no more of its size
    for old, new in zip(start.moe_layers(), folded.moe_layers(), strict=True):
        was, now = tensors_of(start, old), tensors_of(folded, new)
        corrections = [n for n in was if n.endswith(("slope", "offset"))]
        assert all(was[n] is not None and now[n] is None for n in corrections)
        exact = {n: t for n, t in was.items() if n not in corrections}
        for p in ("gate_up", "down"):
            own = 0 if was[f"{p}_bias"] is None else was[f"{p}_bias"]
            exact |= {f"{p}_scale": was[f"{p}_scale"].double() * was[f"{p}_slope"]}
            exact |= {f"{p}_bias": was[f"{p}_offset"].double() + own}
            assert now[f"{p}_scale"].dtype == now[f"{p}_bias"].dtype == torch.float16
        for name, want in exact.items():
            assert (now[name] is None) == (want is None), name
            if want is not None:  # double: one of the four above
                within = (
                    dict(rtol=unit, atol=2**-25)
                    if want.dtype == torch.float64
                    else dict(rtol=0, atol=0)
                )
                torch.testing.assert_close(now[name].to(want.dtype), want, **within)

        # every token, with the inputs and the experts that it has in `start`
        routed = [torch.cat(seen[n.name]) for n in old.node.args[:3]]
        kinds = [was, now, *({**was, n: None} for n in corrections)]
        wanted, got, *without = [VQ_EXPERTS(*routed, *t.values(), **old.attributes) for t in kinds]
        moved, *lost = [
            float(((y - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max()) for y in (got, *without)
        ]
        assert (
            moved < 3 * unit < min(lost) / 2
        )  # gate, up and down are rounded; `lost`: had fold dropped a tensor


@pytest.mark.parametrize("before", ["", "klt{rank=0,mean=2},"])
def test_the_correction_takes_the_shift_of_the_mean_and_brings_the_variance_nearer(
    traced: Program, before: str
) -> None:
    more = list(torch.randint(0, 64, (8, 2, 64), generator=torch.Generator().manual_seed(0)))
    run = compiled(traced, f"{before}vq{{feedback=false}},affine{{offset=on}}", batches=more)
    for moe in traced.moe_layers():
        for projection in ("gate_up", "down"):
            moved = run.ctx.audit[f"{moe.path}.{projection}"]["output_shift"]
            assert moved["mean"][1] < moved["mean"][0] / 4 and abs(moved["variance"][0] - 1) < 0.2
    assert shift([], []) == {"mean": [0.0, 0.0], "variance": [0.0, 0.0]}


def test_tuning_lowers_the_held_out_loss_or_leaves_all_as_it_was(traced: Program) -> None:
    run = compiled(traced, "vq{codebook=layer},vsraq{steps=40}")
    terms = run.ctx.audit["model.layers.0.mlp.experts.gate_up"]["tuned"]
    options: Any = find_pass("vsraq")()
    kinds = [k for k in ("reconstruction", "value", "order", "boundary") if k in terms["before"]]
    ratio = {k: terms["after"][k] / max(terms["before"][k], 1e-12) for k in kinds}
    assert sum(getattr(options, k) * (ratio[k] - 1) for k in kinds) <= 1e-9


def test_sensitivity_is_that_of_the_whole_graph(traced: Program) -> None:
    ids = torch.randint(0, 64, (4, 32), generator=torch.Generator().manual_seed(0))
    layered = Gradients(traced, Context()).measure("kl", [ids]).tensors
    values: dict[str, Any] = {traced.user_inputs[0].name: ids}
    paths, probes = {m.node.name: m.path for m in traced.moe_layers()}, {}
    with torch.enable_grad():
        nodes = [n for n in traced.graph.nodes if n.op == "call_function"]
        for node, value in run_nodes(nodes, values, StageWeights(traced)):
            if node.name in paths:
                probes[paths[node.name]] = torch.zeros_like(value).requires_grad_()
                values[node.name] = value + probes[paths[node.name]]
        logits = values[output_node(traced).name].flatten(0, 1)
        drawn = torch.Generator().manual_seed(Context().seed_for("sensitivity", "kl", 0, "output"))
        labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=drawn).squeeze(-1)
        grads = torch.autograd.grad(
            F.cross_entropy(logits, labels, reduction="sum"), list(probes.values())
        )
    for path, g in zip(probes, grads, strict=True):
        torch.testing.assert_close(layered[path], g.T @ g / len(g), rtol=1e-3, atol=1e-9)


def test_sensitivity_foretells_the_divergence(traced: Program) -> None:
    """Behind the last experts, where no router can change its mind."""
    ids = torch.randint(0, 64, (16, 32), generator=torch.Generator().manual_seed(0))
    run = compiled(traced, "sensitivity{routing=0}", batches=list(ids.split(1)))
    assert not run.differed["sensitivity"]
    moe, logits = traced.moe_layers()[-1], []
    for noise in (0.0, 0.002):
        values: dict[str, Any] = {traced.user_inputs[0].name: ids}
        nodes = [n for n in traced.graph.nodes if n.op == "call_function"]
        for node, value in run_nodes(nodes, values, StageWeights(traced)):
            if node is moe.node:
                generator = torch.Generator().manual_seed(1)
                values[node.name] = value + noise * torch.randn(value.shape, generator=generator)
        logits.append(values[output_node(traced).name].double().log_softmax(-1))
    divergence = (
        float((logits[0].exp() * (logits[0] - logits[1]).square()).sum(-1).mean()) / 2
    )  # to second order
    assert divergence == pytest.approx(
        0.002**2 * float(run.ctx.data["sensitivity"][moe.path].trace()) / 2, rel=0.1
    )


class Peak(TorchDispatchMode):
    """The most bytes that tensors made while it is on take at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[int, int] = {}  # storage -> tensors on it
        self.now = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, Tensor):
                self.count(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes(), 1)
                weakref.finalize(
                    t, self.count, t.untyped_storage().data_ptr(), t.untyped_storage().nbytes(), -1
                )
        return result

    def count(self, storage: int, nbytes: int, more: int) -> None:
        before = self.held.get(storage, 0)
        self.held[storage] = before + more
        self.now += nbytes * ((before + more > 0) - (before > 0))
        self.most = max(self.most, self.now)


def test_moments_are_in_memory_once(tiny: Tiny, batches: list[Tensor]) -> None:
    program = tiny("I")
    stream = Stream(program, batches)
    stream.advance()
    layer = Layer(1, program, program, stream, stream)
    (moe,) = layer.moe
    routed = routed_tokens(layer, moe)
    with Peak() as peak:
        found = measure(layer, moe, routed, torch.eye(16))
    weights = (layer.weight(moe, p) for p in ("gate_up", "down"))
    size = sum(
        t.nbytes
        for t in (found.gate_up, found.down, found.output["gate_up"], *weights)
        if t is not None
    )
    assert size <= peak.most < 1.1 * size


def test_values_that_are_watched_come_in_the_graph_s_order(traced: Program) -> None:
    """Their losses are added in it: a set's would depend on PYTHONHASHSEED, and with it the last bits."""
    names = {n.name for n in traced.graph.nodes if n.op == "call_function"}
    in_order = [[n.name for n in stage_nodes(traced, i)] for i in range(traced.layers)]
    assert Whole(traced, set(), watch=names).watched == in_order


def test_tokens_are_counted_in_whole_batches() -> None:
    for tokens, count in ((1, 1), (47, 1), (48, 2), (10**6, 8)):
        assert [id(b) for b in first_tokens(TOKENS, tokens)] == [id(b) for b in TOKENS[:count]]


@pytest.mark.parametrize("memory", [0, 1 << 40])
def test_sensitivity_is_the_same_where_weights_do_not_stay_in_memory(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, memory: int, batches: list[Tensor]
) -> None:
    program = tiny("MMM")
    want = {k: Gradients(program, Context()).measure(k, batches).tensors for k in ("kl", "routing")}
    monkeypatch.setattr("moecc.passes._tune.whole.fits_in_memory", lambda program: False)
    monkeypatch.setattr(
        "moecc.passes.sensitivity.free_memory", lambda: memory
    )  # batches one by one, and all together
    got = {k: Gradients(program, Context()).measure(k, batches).tensors for k in want}
    for kind, found in want.items():
        assert found.keys() == got[kind].keys() and found
        assert all(torch.equal(s, got[kind][n]) for n, s in found.items())


def test_sensitivity_of_routing_is_that_of_the_routers_behind(traced: Program) -> None:
    run = compiled(traced, "sensitivity{kl=0}")
    first, last = (m.path for m in traced.moe_layers())
    assert first in run.ctx.data["sensitivity"] and last not in run.ctx.data["sensitivity"]
    both = compiled(traced, "sensitivity")
    assert (
        float(both.ctx.data["sensitivity"][first].trace())
        > float(both.ctx.data["sensitivity"][last].trace())
        > 0
    )


def test_without_sensitivity_all_output_channels_count_alike(traced: Program) -> None:
    off, plain = compiled(traced, "sensitivity{kl=0,routing=0},vq"), compiled(traced, "vq")
    assert off.texts["layer001-vq"] == plain.texts["layer001-vq"]
    run = compiled(traced, "sensitivity,vq")
    assert run.texts["layer001-vq"] != plain.texts["layer001-vq"]
    path = traced.moe_layers()[0].path
    told = [r.ctx.audit[f"{path}.gate_up"]["errors"] for r in (run, plain)]
    assert told == ["weighted by sensitivity", "all channels alike"]


def test_gradients_layer_by_layer_are_those_of_the_whole(traced: Program) -> None:
    program = compiled(traced, "kbvq{rank=2}").program
    trained = Trained(find_pass("rilq")(rank=3), program, Context())  # type: ignore[call-arg, arg-type]
    with torch.no_grad():
        for b in trained.b.values():
            b.normal_(std=0.05)
    routers = {selection_scores(m).name for m in program.moe_layers()}
    whole = Whole(program, trained.placeholders, watch=routers)
    inner = {name: lambda scores: scores.float().sin().sum() for name in routers}
    whole.backward(
        TOKENS[0], trained.values, lambda values, logits: logits.float().square().mean(), inner
    )
    got = [p.grad for p in trained.parameters]

    weights = StageWeights(program)
    values: dict[str, Any] = {program.user_inputs[0].name: TOKENS[0]}
    nodes = [n for n in program.graph.nodes if n.op == "call_function"]
    with torch.enable_grad():
        for _ in run_nodes(
            nodes, values, StageWeights.sharing(weights, trained.values(trained.placeholders))
        ):
            pass
        want = values[whole.output].float().square().mean() + sum(
            values[n].float().sin().sum() for n in routers
        )
        grads = torch.autograd.grad(want, trained.parameters, allow_unused=True)
    assert sum(g is not None for g in got) > 20
    for g, w in zip(got, grads, strict=True):
        assert (g is None) == (w is None)
        if g is not None and w is not None:
            torch.testing.assert_close(g, w, rtol=1e-3, atol=1e-6)


def test_a_linear_of_zeros_has_no_error() -> None:
    model = make("qwen2_moe")
    name = "model.layers.0.self_attn.q_proj"
    model.get_submodule(name).weight.data.zero_()
    assert compiled(trace(model), "dense{group=16}").ctx.audit[f"{name}.weight"]["error"] == 0


def test_rilq_lowers_the_held_out_loss_and_merging_changes_nothing_but_rounding(
    traced: Program,
) -> None:
    more = list(torch.randint(0, 64, (16, 4, 64), generator=torch.Generator().manual_seed(0)))
    run = compiled(
        traced, "vq{codebook=layer},affine,fold,rilq{steps=20,rank=4,lr=3}", batches=more
    )
    told = run.ctx.audit["model.layers.0.mlp.experts.down"]["rilq"]
    assert told["after"]["loss"] < told["before"]["loss"] and run.differed["rilq"]
    adapted = attached(run.program)
    names = [a.weight for a in adapted]
    assert any("self_attn.q_proj" in n for n in names) and any(
        "shared_expert.down_proj" in n for n in names
    )
    assert not any("mlp.gate." in n or "shared_expert_gate" in n or "lm_head" in n for n in names)
    assert run.ctx.audit["model.layers.0.mlp.gate.weight"]["adapter"] == "none: router"
    with pytest.raises(MoeccError, match="rilq leaves what can't be stored before 'merged'"):
        require_whole(resolve(parse_passes("rilq")[0])[0])

    before, program = run.output(), run.program
    run_passes(program, [find_pass("merge")()], run.ctx)
    assert (
        not attached(program)
        and "lora" not in program.text()
        and not any("lora" in n for n in program.tensors)
    )
    torch.testing.assert_close(
        torch.cat(run_program(program, TOKENS)), before, rtol=1e-4, atol=1e-5
    )
    assert all(run.ctx.audit[n]["rounding"] < 1e-12 for n in names)  # the checkpoint is float32


def test_rilq_of_a_model_without_a_head_has_its_hidden_state_and_its_routers() -> None:
    bare = trace(make("qwen2_moe").model)
    more = list(torch.randint(0, 64, (16, 2, 64), generator=torch.Generator().manual_seed(0)))
    run = compiled(
        bare, "vq{rounds=1,codebook=layer},affine,fold,rilq{steps=20,rank=2,lr=3}", batches=more
    )
    told = run.ctx.audit[f"{bare.moe_layers()[0].path}.down"]["rilq"]
    assert told["before"].keys() == {"loss", "hidden", "routing"} and told["before"][
        "loss"
    ] == pytest.approx(2)
    assert told["after"]["loss"] < 2
    note = "rilq: the model gives no logits of its vocabulary; kl and lm are left out of the loss"
    assert run.ctx.notes.count(note) == 1
    with pytest.raises(
        MoeccError, match="gives no logits, so kl and lm can't be measured; give hidden a weight"
    ):
        compiled(bare, "vq{rounds=1,codebook=layer},affine,fold,rilq{hidden=0}")


def test_rilq_reads_the_text_s_own_next_token_only_where_it_counts(traced: Program) -> None:
    for options, terms in (
        ("", {"hidden", "kl", "routing"}),
        (",lm=1", {"hidden", "kl", "lm", "routing"}),
    ):
        run = compiled(
            traced, f"vq{{rounds=1,codebook=layer}},affine,fold,rilq{{steps=1,rank=2{options}}}"
        )
        assert run.ctx.audit["model.layers.0.mlp.experts.down"]["rilq"]["before"].keys() == {
            "loss",
            *terms,
        }


def test_rilq_without_anything_to_gain_leaves_all_as_it_was(traced: Program) -> None:
    run = compiled(traced, "vq{bits=4},affine,fold,rilq{steps=1,lr=100,rank=2,patience=1},merge")
    assert not run.differed["rilq"] and not run.differed["merge"]
    with pytest.raises(MoeccError, match="patience=11 is out of range"):  # there are ten checks
        parse_passes("rilq{patience=11}")


def test_a_pass_of_one_s_own_takes_biases_out(traced: Program) -> None:
    """examples/my_pass.py, by its path."""
    kept = compiled(traced, f"affine{{offset=on}},{MY_PASS}{{below=0}}")
    gone = compiled(traced, f"affine{{offset=on}},{MY_PASS}{{below=100}}")
    assert (
        list(gone.differed)[-1] == "drop_bias"
        and gone.differed["drop_bias"]
        and not kept.differed["drop_bias"]
    )
    assert "gate_up.bias" in kept.program.text() and "gate_up.bias" not in gone.program.text()
    assert gone.reports[-1].bits < kept.reports[-1].bits
    assert 0 < gone.ctx.audit["model.layers.0.mlp.experts.gate_up"]["bias_share"] < 100


# ---- rounding to 16 bits


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ([1.0, 0.1, 3.0], torch.float16),
        ([0.01, 0.02, 1e-7], torch.float16),  # a tiny one among others loses nothing that counts
        ([0.01, 0.0], torch.float16),
        ([1e5, 1.0], torch.bfloat16),  # beyond float16's range
        ([1e-8, 2e-8], torch.bfloat16),  # below it
    ],
)
def test_sixteen_bits_are_the_type_that_loses_less(values: list[float], dtype: torch.dtype) -> None:
    got = compact(torch.tensor(values))
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), torch.tensor(values), rtol=5e-3, atol=1e-7)


# ---- golden text


def layer_text(program: Program, text: str, batches: list[Tensor], names: tuple[str, str]) -> str:
    """The graph before and after a pass: after the pass named first, and after the one named second."""
    run = compiled(program, text, batches=batches)
    parts = [run.texts["before"] if n == "before" else run.texts[f"layer001-{n}"] for n in names]
    return f"// before\n{parts[0]}// after {text}\n{parts[1]}"


@pytest.mark.parametrize(
    ("name", "text", "names"),
    [
        ("klt", "moments,klt{rank=2,mean=2}", ("before", "klt")),
        ("vq", "moments,klt{rank=2,mean=2},vq{bits=3,codebook=layer}", ("klt", "vq")),
        ("fold", "moments,vq{codebook=layer},affine{offset=on},fold", ("affine", "fold")),
    ],
)
def test_the_text_before_and_after_a_pass(
    name: str,
    text: str,
    names: tuple[str, str],
    tiny: Tiny,
    batches: list[Tensor],
    golden: Callable[[str, str], None],
) -> None:
    golden(f"{name}.txt", layer_text(tiny("M"), text, batches, names))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("klt", "moments,klt{rank=2}"),
        ("vq", "moments,vq"),
        ("fold", "moments,vq,affine,fold"),
        ("vsraq", "vsraq{steps=2}"),
    ],
)
def test_a_layer_that_does_not_match_keeps_its_text(
    name: str, text: str, tiny: Tiny, batches: list[Tensor]
) -> None:
    run = compiled(tiny("MD"), text, batches=batches)
    before = run.texts[f"layer001-{list(run.differed)[-1]}"]
    assert run.texts[f"layer002-{name}"] == before


def test_digests_tell_tensors_apart() -> None:
    assert digest(torch.zeros(3)) != digest(torch.ones(3)) and len(digest(torch.zeros(3))) == 8


def test_the_author_s_guide_in_python_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    guide = (ROOT / "passes" / "README.md").read_text()
    code = guide[guide.index("## In Python") :].split("```python\n")[1].split("```")[0]
    make("qwen2_moe").save_pretrained(tmp_path)
    for theirs, ours in (
        ('"examples/tinymoe"', repr(str(tmp_path))),
        ("4096, (2, 64)", "64, (2, 8)"),
    ):
        assert theirs in code
        code = code.replace(theirs, ours)
    monkeypatch.chdir(ROOT)
    names: dict[str, Any] = {}
    exec(code, names)
    assert (
        "= moecc.vq_experts(" in (told := capsys.readouterr().out)
        and "\n./examples/my_pass.py: " in told
    )
    torch.testing.assert_close(
        names["module"](input_ids=names["batches"][0])[0], names["logits"][0]
    )


def test_the_author_s_guide_shows_the_example_as_it_is() -> None:
    guide, example = (ROOT / "passes" / "README.md").read_text(), Path(MY_PASS).read_text()
    assert f"```python\n{example[example.index('@dataclass') :]}```" in guide
