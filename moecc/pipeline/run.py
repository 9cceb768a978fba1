"""From `--passes vsraq,kbvq{bits=2}` to a run: read, find, order, run, verify, report.

1. parse   text -> passes; a pass is a file of `moecc.passes`, an entry point of group `moecc.passes`, or a path to a file
2. resolve composites are expanded, a missing provider is put in front of who needs it (and said), the order comes from the facts:
           providers before users, ties as typed
3. run     consecutive layer passes go through the model together, layer by layer; after each pass the graph is verified
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from moecc.errors import MoeccError, reason
from moecc.ir.program import Program
from moecc.pipeline.bits import expert_weights, stored_bits
from moecc.pipeline.order import groups
from moecc.pipeline.passes import Context, Layer, LayerPass, Pass
from moecc.pipeline.stream import Stream

# ---- 3. run


@dataclass
class PassReport:
    """What one pass did, over all layers."""

    text: str
    key: str = ""  # its place in the ledger: two passes may have the same text
    changed: bool = False
    seconds: float = 0.0
    nodes: int = 0
    bits: float = 0.0  # bits per weight over the routed experts, as they stood after this pass
    error: float | None = None  # mean relative output error of the projections coded so far

    def line(self) -> str:
        error = "" if self.error is None else f", error {self.error:.4f}"
        state = "" if self.changed else ", nothing changed"
        return f"{self.text}: {self.nodes} nodes, {self.bits:.3f} bits/weight{error}{state}, {self.seconds:.1f} s"


@dataclass
class Hooks:
    """What the caller wants to see or keep of a run; each may be left out."""

    after_pass: Callable[[PassReport, Program], None] = lambda report, program: None
    after_layer: Callable[[int, Program, Context], None] = lambda stage, program, ctx: None
    restore_layer: Callable[[int, Program, Context], bool] = lambda stage, program, ctx: False
    dump: Callable[[str, Program, int | None], None] = lambda name, program, stage: (
        None
    )  # stage None: the whole


def run_passes(
    program: Program,
    passes: Sequence[Pass],
    ctx: Context,
    batches: Sequence[Tensor] = (),
    hooks: Hooks | None = None,
) -> list[PassReport]:
    """Run resolved passes over `program` in place; what each did. `batches`: calibration token ids, i64 [1 or more, S] each."""
    hooks, result = hooks or Hooks(), []
    reference = program.copy()  # the float model for all passes, whatever ran before
    ctx.reference, ctx.batches = reference, batches
    if not batches and (needy := next((p for p in passes if p.needs_data), None)) is not None:
        raise MoeccError(f"{needy.name} needs calibration text; give --calib FILE")
    for p in passes:
        p.check(program)
    done: list[Pass] = []
    for group in groups(passes):
        try:
            if isinstance(group[0], LayerPass):
                layer_passes = [p for p in group if isinstance(p, LayerPass)]
                reports = _run_layers(program, reference, layer_passes, ctx, batches, hooks, done)
            else:
                reports = [_run_model(program, group[0], ctx, done)]
        finally:
            program.module.recompile()
        for p, report in zip(group, reports, strict=True):
            program.facts = (program.facts - p.spoils) | p.provides
            _finish(report, ctx)
            hooks.after_pass(report, program)
            done.append(p)
            if p.makes_reference:
                ctx.reference = reference = program.copy()
        hooks.dump(
            f"{len(done):02d}-after-{Path(str(group[-1]).split('{')[0]).stem}", program, None
        )
        result += reports
    return result


def _report(p: Pass, position: int) -> PassReport:
    return PassReport(str(p), f"{position} {p}")


def _run_model(program: Program, p: Pass, ctx: Context, done: list[Pass]) -> PassReport:
    report = _report(p, len(done))
    start = time.perf_counter()
    with _named(p, done, None):
        report.changed = _whether_changed(p.run(program, ctx))
        program.verify()
        ctx.ledger[report.key] = {
            str(s): _entry(program, s, report.changed, ctx) for s in range(program.layers)
        }
    report.seconds = time.perf_counter() - start
    return report


def _whether_changed(returned: Any) -> bool:
    if not isinstance(returned, bool):
        raise MoeccError(
            f"it returned {returned!r}; return True or False, whether it changed the program"
        )
    return returned


def _run_layers(
    program: Program, reference: Program, passes: list[LayerPass], ctx: Context, batches: Sequence[Tensor], hooks: Hooks,
    done: list[Pass],
) -> list[PassReport]:  # fmt: skip
    reports = [_report(p, len(done) + i) for i, p in enumerate(passes)]
    stream, target = Stream(program, batches), Stream(reference, batches)
    last_experts = max((m.layer for m in program.moe_layers()), default=0)
    for stage in ctx.progress(range(program.layers), "layers"):
        head = (
            last_experts < stage == program.layers - 1
        )  # nobody needs the logits of all calibration text at once
        if not head:
            target.advance()
        if 0 < stage and not hooks.restore_layer(stage, program, ctx):
            layer = Layer(stage, program, reference, stream, target)
            for i, (p, report) in enumerate(zip(passes, reports, strict=True)):
                start = time.perf_counter()
                with _named(p, [*done, *passes[:i]], stage):
                    changed = _whether_changed(p.run_layer(layer, ctx))
                    program.verify()
                    ctx.ledger.setdefault(report.key, {})[str(stage)] = _entry(
                        program, stage, changed, ctx
                    )
                report.seconds += time.perf_counter() - start
                before = sum(q.name == p.name for q in [*done, *passes[:i]])
                hooks.dump(
                    f"layer{stage:03d}-{p.name}{f'-{before + 1}' if before else ''}", program, stage
                )
            program.module.recompile()
            hooks.after_layer(stage, program, ctx)
        if not head:
            try:
                stream.advance()
            except MoeccError as e:  # the float model went through it
                ran = ", ".join(p.name for p in [*done, *passes])
                raise MoeccError(f"layer {stage - 1} no longer runs behind {ran}: {e}") from e
    return reports


class _named:
    """Adds pass, layer and what ran before to whatever goes wrong inside."""

    def __init__(self, p: Pass, done: Sequence[Pass], stage: int | None):
        self.p, self.done, self.stage = p, done, stage

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: Any
    ) -> None:
        if error is None or isinstance(error, KeyboardInterrupt):
            return
        where = "" if self.stage is None else f" in layer {self.stage - 1}"
        after = f" (after {', '.join(p.name for p in self.done)})" if self.done else ""
        why = (
            str(error)
            if isinstance(error, MoeccError)
            else f"{type(error).__name__}: {reason(error)}"
        )
        raise MoeccError(f"{self.p} failed{where}{after}: {why}") from error


def _entry(program: Program, stage: int, changed: bool, ctx: Context) -> dict[str, Any]:
    """The ledger's line of one pass in one layer; kept in the journal, so that a resumed run reports the same."""
    found = [m for m in program.moe_layers() if m.layer == stage]
    paths = [f"{m.path}.{p}" for m in found for p in ("gate_up", "down")]
    return {
        "changed": changed, "nodes": sum(n.op == "call_function" for n in program.graph.nodes),
        "stored": sum(stored_bits(program, m) for m in found), "weights": sum(expert_weights(m) for m in found),
        "errors": [ctx.audit[p]["error"] for p in paths if "error" in ctx.audit.get(p, {})],
    }  # fmt: skip


def _finish(report: PassReport, ctx: Context) -> None:
    """The report's figures from the ledger."""
    entries = list(ctx.ledger.get(report.key, {}).values())
    report.changed = any(e["changed"] for e in entries)
    report.nodes = entries[-1]["nodes"] if entries else 0
    weights = sum(e["weights"] for e in entries)
    report.bits = sum(e["stored"] for e in entries) / weights if weights else 0.0
    errors = [error for e in entries for error in e["errors"]]
    report.error = sum(errors) / len(errors) if errors else None
