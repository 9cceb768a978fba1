"""Running passes: rounds over the layers, hooks, reports, and errors that name pass and layer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from pipelines import Tiny, derive, idle, resolved
from torch import Tensor
from torch._ops import OpOverload

from moecc.commands.compile import compile_model
from moecc.commands.inspect import inspect_model
from moecc.errors import MoeccError
from moecc.ir import ops
from moecc.ir.program import Program
from moecc.options import option
from moecc.pipeline.bits import experts_bits
from moecc.pipeline.order import resolve
from moecc.pipeline.parse import find_pass
from moecc.pipeline.passes import Context, Layer, LayerPass, Pass
from moecc.pipeline.run import Hooks, PassReport, run_passes


@dataclass(frozen=True, kw_only=True)
class Touch(LayerPass):
    """Notes each layer it sees; in stage `fail_in` it fails as `how` says."""

    name: ClassVar[str] = "touch"
    fail_in: int = option(-1, help="stage", low=-1, high=100)
    how: str = option(
        "raise", help="what goes wrong", choices=("raise", "moecc", "break", "interrupt", "exit")
    )

    def run_layer(self, layer: Layer, ctx: Context) -> bool:
        inputs, targets = layer.inputs.stage, layer.targets.stage
        ctx.notes.append(f"{layer.index}: inputs before {inputs}, targets before {targets}")
        if layer.index == self.fail_in:
            if self.how == "raise":
                raise RuntimeError("boom")
            if self.how == "moecc":
                raise MoeccError("it does not fit")
            if self.how == "interrupt":
                raise KeyboardInterrupt
            if self.how == "exit":
                raise SystemExit(0)
            next(n for n in layer.program.graph.nodes if n.name == "tanh").meta.pop("layer")
        return False


OWN = """from collections import ChainMap
from dataclasses import dataclass
from moecc.pipeline.passes import Pass

@dataclass(frozen=True, kw_only=True)
class Own(Pass):
    name = "own"

    def run(self, program, ctx):
        return False

    def METHOD(self, *args):
        ChainMap()["nothing"]
"""


def failure(program: Program, batches: list[Tensor], *passes: Pass) -> str:
    """Return the message with which a run of these passes fails."""
    with pytest.raises(MoeccError) as found:
        run_passes(program, passes, Context(), batches)
    return str(found.value)


def test_a_failure_names_pass_and_layer_and_the_passes_before_it(
    tiny: Tiny, batches: list[Tensor]
) -> None:
    moments = find_pass("moments")()
    message = failure(tiny("MD"), batches, moments, Touch(fail_in=2))
    where = "touch{fail_in=2} failed in layer 1 (after moments): RuntimeError: boom"
    line = Touch.run_layer.__code__.co_firstlineno + 5
    assert message == f"{where} ({__file__}, line {line})"
    assert failure(tiny("MD"), batches, Touch(fail_in=1, how="moecc")) == (
        "touch{fail_in=1,how=moecc} failed in layer 0: it does not fit"
    )


def test_a_pass_that_exits_fails_and_is_named(tiny: Tiny, batches: list[Tensor]) -> None:
    message = failure(tiny("M"), batches, Touch(fail_in=1, how="exit"))
    said = "touch{fail_in=1,how=exit} failed in layer 0: SystemExit: 0"
    assert message.startswith(f"{said} ({__file__}, line ")

    def leave(self: Pass, program: Program) -> None:
        raise SystemExit

    message = failure(tiny("M"), [], derive(Pass, "left", run=leave, check=leave))
    line = leave.__code__.co_firstlineno + 1
    assert message == f"left failed: SystemExit: SystemExit ({__file__}, line {line})"


def test_a_pass_that_breaks_the_graph_is_named(tiny: Tiny, batches: list[Tensor]) -> None:
    message = failure(tiny("MD"), batches, idle("first"), Touch(fail_in=2, how="break"))
    where = "touch{fail_in=2,how=break} failed in layer 1 (after first)"
    assert message.startswith(f"{where}: node %tanh (aten.tanh) lacks meta")


@pytest.mark.parametrize("returned", [None, "yes", 1])
def test_a_pass_must_return_whether_it_changed_the_program(
    tiny: Tiny, batches: list[Tensor], returned: object
) -> None:
    silent = derive(LayerPass, "silent", run_layer=lambda self, layer, ctx: returned)
    assert failure(tiny("M"), batches, silent) == (
        f"silent failed in layer 0: it returned {returned!r}; "
        "return True or False, whether it changed the program"
    )


ODD = {
    "bytes": (5, "can't record bytes, which moecc counts; take another name"),
    "source_bits": ("many", "can't record source_bits, which moecc counts; take another name"),
    "fate": ("coded", "can't record fate='coded'; give a Fate"),
    "error": ("small", "can't record error='small'; give a number"),
    "in_sample_error": (True, "can't record in_sample_error=True; give a number"),
    "tokens": ([1, -1], "can't record tokens=[1, -1]; give a list of counts"),
    "starved": ({"e": 1}, "can't record starved={'e': 1}; give a dict of counts by expert"),
    "fallback": (["float"], "can't record fallback=['float']; give text"),
    "loss": (
        {"before": 1, "after": {"kl": 2}},
        "can't record loss={'before': 1, 'after': {'kl': 2}}; "
        "give a dict of numbers for both before and after",
    ),
}


@pytest.mark.parametrize(("key", "value", "why"), [(k, *v) for k, v in ODD.items()], ids=ODD.keys())
def test_a_value_that_the_report_cannot_show_is_refused_when_it_is_recorded(
    tiny: Tiny, batches: list[Tensor], key: str, value: object, why: str
) -> None:
    def run_layer(self: Pass, layer: Layer, ctx: Context) -> bool:
        ctx.record("some.weight", **{key: value})
        return False

    message = failure(tiny("M"), batches, derive(LayerPass, "tell", run_layer=run_layer))
    assert message == f"tell failed in layer 0: some.weight: {why}"


@pytest.mark.parametrize("notes", [["fine", 5], "text", None])
def test_a_note_that_is_no_text_is_refused_behind_its_pass(
    tiny: Tiny, batches: list[Tensor], notes: Any
) -> None:
    def run_layer(self: Pass, layer: Layer, ctx: Context) -> bool:
        ctx.notes = notes
        return False

    message = failure(tiny("M"), batches, derive(LayerPass, "tell", run_layer=run_layer))
    odd = notes[1] if isinstance(notes, list) else notes
    assert message == f"tell failed in layer 0: it noted {odd!r}; ctx.notes is a list of texts"


@pytest.mark.parametrize("value", [torch.ones(3), float("nan"), {1: {2}}])
def test_a_recorded_value_must_be_json(tiny: Tiny, batches: list[Tensor], value: object) -> None:
    def run_layer(self: Pass, layer: Layer, ctx: Context) -> bool:
        ctx.record("some.weight", share=value)
        return False

    message = failure(tiny("M"), batches, derive(LayerPass, "tell", run_layer=run_layer))
    assert message.startswith("tell failed in layer 0: some.weight: can't record ['share'] (")
    assert message.endswith("give finite numbers, text, lists or dicts")


@pytest.mark.parametrize(
    ("was", "became"), [("tanh", ops.Q_LINEAR), ("tanh", ops.VQ_EXPERTS), ("experts", ops.Q_LINEAR)]
)
def test_only_linears_and_experts_may_be_coded(
    was: str, became: OpOverload, tiny: Tiny, batches: list[Tensor]
) -> None:
    """Other nodes can't, not even if they read the same."""

    def code(self: Pass, program: Program, ctx: Context) -> bool:
        next(n for n in program.graph.nodes if n.name == was).target = became
        return True

    program = tiny("MD")
    program.verify = lambda: None  # type: ignore[method-assign]
    message = failure(program, batches, derive(Pass, "coder", run=code))
    assert message.startswith(f"coder failed: a pass made %{was} ")


def test_a_layer_that_no_longer_runs_names_the_passes_that_ran(
    tiny: Tiny, batches: list[Tensor]
) -> None:
    def run_layer(self: Pass, layer: Layer, ctx: Context) -> bool:
        for moe in layer.moe:  # a tensor on disk is not checked before it is read
            name = layer.program.weights[moe.gate_up.operand().name].name
            layer.program.add(name, layer.weight(moe.gate_up))
            layer.program.tensors.spill(name, lambda: torch.zeros(1))
        return bool(layer.moe)

    broken = derive(LayerPass, "break", run_layer=run_layer)
    message = failure(tiny("MD"), batches, Touch(), broken)
    where = "node %experts (moecc.experts) in stage 1"
    assert message.startswith(f"layer 0 no longer runs behind touch, break: {where} failed: ")


def test_an_interrupt_stays_an_interrupt(tiny: Tiny, batches: list[Tensor]) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_passes(tiny("MD"), [Touch(fail_in=1, how="interrupt")], Context(), batches)


def test_a_model_pass_that_fails_names_no_layer(tiny: Tiny) -> None:
    def run(self: Pass, program: Program, ctx: Context) -> bool:
        raise ValueError("no luck")

    broken = derive(Pass, "broken", run=run)
    line = run.__code__.co_firstlineno + 1
    said = f"broken failed: ValueError: no luck ({__file__}, line {line})"
    assert failure(tiny("M"), [], broken) == said


@pytest.mark.parametrize("method", ["check", "run", "estimate", "files"])
def test_a_fault_in_a_pass_of_ones_own_names_its_file_and_line(
    method: str, model: Path, tmp_path: Path
) -> None:
    """A library's line would not say which line of the pass to look at."""
    file = tmp_path / "own.py"
    file.write_text(OWN.replace("METHOD", method))
    with pytest.raises(MoeccError) as found:
        if method == "estimate":
            inspect_model(str(model), passes=str(file))
        else:
            options: dict[str, Any] = {"rows": 1, "length": 16, "say": lambda line: None}
            compile_model(str(model), str(file), tmp_path / "out", **options)
    assert str(found.value) == f"{file} failed: KeyError: 'nothing' ({file}, line 13)"
    assert not (tmp_path / "out").exists()


def test_a_pass_that_needs_data_asks_for_it(tiny: Tiny) -> None:
    message = failure(tiny("M"), [], find_pass("moments")())
    assert message == "moments needs calibration text; give --calib FILE"


def test_layer_passes_of_one_round_see_inputs_before_and_targets_after_a_layer(
    tiny: Tiny, batches: list[Tensor]
) -> None:
    program, dumps, layers, labels = tiny("MD"), [], [], []

    def progress(items: Any, label: str) -> Any:
        labels.append((label, list(items)))
        return items

    def dump(name: str, dumped: Program, stage: int | None) -> None:
        assert dumped is program
        dumps.append(name)
        assert (stage is None) == ("after" in name) and (stage is None or str(stage) in name)

    ctx = Context(progress=progress)
    hooks = Hooks(dump=dump, after_layer=lambda stage, program, ctx: layers.append(stage))
    run_passes(program, [Touch(), idle("model"), Touch(), Touch()], ctx, batches, hooks)
    assert labels == [("layers", [0, 1, 2, 3])] * 2
    # the last stage is the head; its output for all the text is never held
    once = [f"{i}: inputs before {i}, targets before {min(i + 1, 3)}" for i in (1, 2, 3)]
    assert ctx.notes == once + [line for line in once for _ in range(2)]
    first = [f"layer00{i}-touch" for i in (1, 2, 3)]
    # two passes of one name leave two texts
    second = [f"layer00{i}-touch-{k}" for i in (1, 2, 3) for k in (2, 3)]
    assert dumps == [*first, "01-after-touch", "02-after-model", *second, "04-after-touch"]
    assert layers == [1, 2, 3, 1, 2, 3]


@dataclass(frozen=True, kw_only=True)
class Late(Touch):
    """Begins when the passes before it have gone through all layers."""

    name: ClassVar[str] = "late"
    own_round: ClassVar[bool] = True


def test_a_round_of_its_own_begins_behind_all_layers(tiny: Tiny, batches: list[Tensor]) -> None:
    dumps: list[str] = []
    hooks = Hooks(dump=lambda name, program, stage: dumps.append(name))
    run_passes(tiny("MD"), [Touch(), Late(), Touch()], Context(), batches, hooks)
    first = [f"layer00{i}-touch" for i in (1, 2, 3)]
    second = [f"layer00{i}-{name}" for i in (1, 2, 3) for name in ("late", "touch-2")]
    assert dumps == [*first, "01-after-touch", *second, "03-after-touch"]


@dataclass(frozen=True, kw_only=True)
class Seen(LayerPass):
    """Notes the op of the layer's experts in the float model that it is given."""

    name: ClassVar[str] = "seen"

    def run_layer(self, layer: Layer, ctx: Context) -> bool:
        ctx.notes += [
            str(m.node.target) for m in layer.reference.moe_layers() if m.layer == layer.index
        ]
        return False


def test_the_float_model_stays_float_behind_a_model_pass(tiny: Tiny, batches: list[Tensor]) -> None:
    ctx = Context()
    run_passes(tiny("M"), [*resolved("vq"), idle("model"), Seen()], ctx, batches)
    assert [note for note in ctx.notes if note.startswith("moecc")] == ["moecc.experts.default"]


def test_a_restored_layer_is_not_run_again(tiny: Tiny, batches: list[Tensor]) -> None:
    program, ctx, asked = tiny("MD"), Context(), []
    nodes = sum(n.op == "call_function" for n in program.graph.nodes)

    def restore(*args: Any) -> bool:
        asked.append(args)
        return args[0] < until

    for until in (2, 4):
        (report,) = run_passes(program, [Touch()], ctx, batches, Hooks(restore_layer=restore))
        assert asked == [(stage, program, ctx) for stage in (1, 2, 3)]
        assert [note[0] for note in ctx.notes] == (["2", "3"] if until == 2 else [])
        assert report.nodes == (nodes if until == 2 else 0) and not report.changed
        for noted in (ctx.notes, ctx.ledger, asked):
            noted.clear()


def test_facts_hold_after_a_run(tiny: Tiny) -> None:
    program = tiny("M")
    run_passes(program, [idle("a", provides="x y"), idle("b", spoils="x", provides="z")], Context())
    assert program.facts == {"y", "z"}


def test_a_report_gives_change_bits_and_error_of_each_pass(
    tiny: Tiny, batches: list[Tensor]
) -> None:
    seen: list[str] = []
    hooks = Hooks(after_pass=lambda report, program: seen.append(report.text))
    passes = resolved("klt{rank=2},vq{codebook=layer}")
    result = run_passes(tiny("MD"), passes, Context(), batches, hooks)
    assert [r.text for r in result] == seen == ["moments", "klt{rank=2}", "vq{codebook=layer}"]
    assert [r.changed for r in result] == [False, True, True]
    lines = [r.line() for r in result]
    assert lines[0].startswith("moments: ")
    assert "nothing changed" in lines[0]
    assert "nothing changed" not in lines[2]
    assert "bits/weight, in-sample error 0." in lines[2]
    assert result[0].bits == 32.0 and len({r.bits for r in result}) == 3  # each pass its own


def test_the_figures_of_a_report_are_those_of_its_program_and_its_audit(
    tiny: Tiny, batches: list[Tensor]
) -> None:
    program, ctx, found = tiny("MDM"), Context(), []

    def noting(report: PassReport, program: Program) -> None:
        found.append((report.bits, experts_bits(program)))

    reports = run_passes(
        program, [*resolved("vq"), idle("model")], ctx, batches, Hooks(after_pass=noting)
    )
    sides = [f"layers.{i}.{side}" for i in (0, 2) for side in ("gate_up", "down")]
    errors = [ctx.audit[side]["in_sample_error"] for side in sides]
    assert len(set(errors)) == 4
    assert [r.in_sample_error for r in reports] == [None, *[pytest.approx(sum(errors) / 4)] * 2]
    assert found[0][0] == 32 != found[1][0] == found[2][0] == found[2][1]
    nodes = sum(n.op == "call_function" for n in program.graph.nodes)
    assert {r.nodes for r in reports} == {nodes} and all(r.seconds > 0 for r in reports)
    whole = {str(stage) for stage in range(program.layers)}
    assert [set(entries) for entries in ctx.ledger.values()] == [whole - {"0"}] * 2 + [whole]
    assert list(ctx.ledger) == ["0 moments", "1 vq", "2 model"] == [r.key for r in reports]


def test_a_report_is_one_line() -> None:
    report = PassReport("vq{bits=3}", "1 vq{bits=3}", True, 12.34, 7, 3.14159, 0.01234)
    assert report.line() == "vq{bits=3}: 7 nodes, 3.142 bits/weight, in-sample error 0.0123, 12.3 s"
    empty = PassReport("look", nodes=1, bits=2.0)
    assert empty.line() == "look: 1 nodes, 2.000 bits/weight, nothing changed, 0.0 s"


def test_a_pass_that_makes_the_float_model_leaves_it_to_the_next_ones(
    tiny: Tiny, batches: list[Tensor]
) -> None:
    def double(self: Pass, program: Program, ctx: Context) -> bool:
        program.add("head.weight", 2 * program.read("head.weight"))
        return True

    def look(self: Pass, program: Program, ctx: Context) -> bool:
        assert ctx.reference is not None and ctx.traced is not None and ctx.reference is not program
        seen.append([float(p.read("head.weight")[0, 0]) for p in (ctx.traced, ctx.reference)])
        return False

    program, seen = tiny("M"), []
    first = float(program.read("head.weight")[0, 0])
    looking, doubling = derive(Pass, "look", run=look), derive(Pass, "double", run=double)
    making = derive(Pass, "make", run=double, makes_reference=True)
    run_passes(program, [looking, doubling, looking, making, looking], Context(), batches)
    assert seen == [[first, first], [first, first], [first, 4 * first]]


def test_a_pass_that_stands_twice_has_two_reports(tiny: Tiny, batches: list[Tensor]) -> None:
    """Check two layer passes of one round, and two model passes."""
    seen: list[int] = []

    def first_time(self: Pass, layer: Layer, ctx: Context) -> bool:
        seen.append(layer.index)
        return seen.count(layer.index) == 1

    once = derive(LayerPass, "once", run_layer=first_time)
    passes, _ = resolve([idle("model"), once, once, idle("model")])
    reports = run_passes(tiny("MD"), passes, Context(), batches)
    assert [(r.text, r.changed) for r in reports] == [
        ("model", False),
        ("once", True),
        ("once", False),
        ("model", False),
    ]


def test_bits_of_float_experts_are_those_of_the_checkpoint(tiny: Tiny) -> None:
    program = tiny("M")
    assert experts_bits(program) == 32.0
    store = program.store
    store.tensors = {name: t.bfloat16() for name, t in store.tensors.items()}
    assert experts_bits(program) == 16.0


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_bits_of_compressed_experts_count_every_tensor(
    tiny: Tiny, batches: list[Tensor], bits: int
) -> None:
    program = tiny("M")
    passes = resolved(f"klt{{rank=2}},vq{{bits={bits}}},affine{{offset=on}},fold")
    run_passes(program, passes, Context(), batches)
    moe = program.moe_layers()[0]
    held = [
        program.read(program.weights[n.name].name)
        for n in moe.node.all_input_nodes
        if n.name in program.weights
    ]
    stored = sum(8 * t.numel() * t.element_size() for t in held)
    assert experts_bits(program) == stored / (4 * 16 * 16 + 4 * 16 * 8)
