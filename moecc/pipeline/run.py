"""Run resolved passes; consecutive layer passes go through the model together, layer by layer.

After each pass, the graph is verified, and a program that no artifact could hold is refused
(`moecc.pipeline.storable`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from moecc.checkpoint.memory import release
from moecc.errors import Mendable, MoeccError, fault, naming
from moecc.ir.program import Program
from moecc.pipeline import storable
from moecc.pipeline.bits import per_weight, stored_bits
from moecc.pipeline.order import groups
from moecc.pipeline.pace import Pace
from moecc.pipeline.passes import Context, Layer, LayerPass, Pass
from moecc.pipeline.stream import Stream
from moecc.types import Json, Say


@dataclass
class PassReport:
    """The result of one pass, over all layers."""

    text: str
    key: str = ""  # of the ledger: two passes may have the same text
    changed: bool = False
    seconds: float = 0.0
    nodes: int = 0
    bits: float = 0.0  # bits per weight of the routed experts after this pass
    # Relative output error on the calibration tokens, mean over the projections coded so far. Codes
    # fit these tokens, so it falls with fewer of them and is no measure of quality.
    in_sample_error: float | None = None

    def line(self) -> str:
        """Return the line that users see."""
        found = self.in_sample_error
        error = "" if found is None else f", in-sample error {found:.4f}"
        state = "" if self.changed else ", nothing changed"
        size = f"{self.nodes} nodes, {self.bits:.3f} bits/weight"
        return f"{self.text}: {size}{error}{state}, {self.seconds:.1f} s"


def _no_dump(name: str, program: Program, stage: int | None) -> None:
    return None


@dataclass
class Hooks:
    """What a caller wants to see or keep of a run; each hook may be left out."""

    before_group: Callable[[int], None] = lambda position: None  # of passes that run together
    after_pass: Callable[[PassReport, Program], None] = lambda report, program: None
    after_layer: Callable[[int, Program, Context], None] = lambda stage, program, ctx: None
    restore_layer: Callable[[int, Program, Context], bool] = lambda stage, program, ctx: False
    dump: Callable[[str, Program, int | None], None] = _no_dump  # stage None: the whole program
    say: Say = lambda line: None  # takes a line per layer that is done


def run_passes(
    program: Program,
    passes: Sequence[Pass],
    ctx: Context,
    batches: Sequence[Tensor] = (),
    hooks: Hooks | None = None,
) -> list[PassReport]:
    """Run resolved passes over `program` in place, and return a report of each.

    batches: calibration token ids, i64 [B, S] each, B >= 1. Raise MoeccError, with the pass, the
    layer and the earlier passes, if a pass fails.
    """
    ctx.traced = ctx.reference = program.copy()
    ctx.batches = [ids.to(program.device) for ids in batches]
    if not batches and (needy := next((p for p in passes if p.needs_data), None)) is not None:
        raise MoeccError(f"{needy.name} needs calibration text; give --calib FILE")
    for p in passes:
        with naming(p):
            p.check(program)
    run, reports = _Run(program, ctx, hooks or Hooks()), []
    found = groups(passes)
    for position, group in enumerate(found):
        run.hooks.before_group(position)
        run.next = found[position + 1][0].name if position + 1 < len(found) else ""
        reports += run.group(group)
    return reports


@dataclass
class _Run:
    """A run: its program and context, and the passes that are done."""

    program: Program
    ctx: Context
    hooks: Hooks
    done: list[Pass] = field(default_factory=list)
    next: str = ""  # the pass behind the group that runs

    def group(self, group: Sequence[Pass]) -> list[PassReport]:
        """Run a group of passes: layer passes, or one pass over the whole model."""
        try:
            if isinstance(group[0], LayerPass):
                reports = self.layers([p for p in group if isinstance(p, LayerPass)])
            else:
                reports = [self.model(group[0])]
        finally:
            self.program.module.recompile()
        for p, report in zip(group, reports, strict=True):
            self.program.facts = (self.program.facts - p.spoils) | p.provides
            _finish(report, self.ctx)
            self.hooks.after_pass(report, self.program)
            self.done.append(p)
            if p.makes_reference:
                self.ctx.reference = self.program.copy()
        name = Path(str(group[-1]).split("{")[0]).stem
        self.hooks.dump(f"{len(self.done):02d}-after-{name}", self.program, None)
        return reports

    def model(self, p: Pass) -> PassReport:
        """Run a pass over the whole model."""
        report, start = self.report(p, len(self.done)), time.perf_counter()
        with _naming(p, self.done, None):
            report.changed = _whether_changed(p.run(self.program, self.ctx))
            _require_text(self.ctx.notes)
            self.program.verify()
            self.require_storable([p])
            stages = range(self.program.layers)
            self.ctx.ledger[report.key] = {str(s): self.entry(s, report.changed) for s in stages}
        report.seconds = time.perf_counter() - start
        return report

    def layers(self, passes: Sequence[LayerPass]) -> list[PassReport]:
        """Run layer passes together: all of them on one layer, then on the next."""
        program, ctx = self.program, self.ctx
        assert ctx.reference is not None
        reports = [self.report(p, len(self.done) + i) for i, p in enumerate(passes)]
        stream = Stream(program, ctx.batches, ctx.workers)
        target = Stream(ctx.reference, ctx.batches, ctx.workers)
        with_experts = sorted({m.layer for m in program.moe_layers()})
        last_experts = max(with_experts, default=0)
        tokens = sum(batch.numel() for batch in ctx.batches)
        until = f" until {self.next}" if self.next else ""
        pace = Pace(with_experts, tokens, until, self.hooks.say, program.device)
        for stage in ctx.progress(range(program.layers), "layers"):
            # no pass needs the logits of all calibration text at once
            head = last_experts < stage == program.layers - 1
            pace.begin()
            done = 0 < stage and not self.hooks.restore_layer(stage, program, ctx)
            layer = Layer(stage, program, ctx.reference, stream, target)
            if done:
                self.layer(layer, passes, reports)
                layer.data.clear()  # it may hold all tokens
                release()
                program.module.recompile()
                self.hooks.after_layer(stage, program, ctx)
            if not head:
                self.advance(layer, passes)
            if done:
                pace.layer(stage, ctx.ledger[reports[-1].key][str(stage)]["errors"])
        return reports

    def layer(
        self, layer: Layer, passes: Sequence[LayerPass], reports: Sequence[PassReport]
    ) -> None:
        """Run layer passes on one layer."""
        stage = layer.index
        for i, (p, report) in enumerate(zip(passes, reports, strict=True)):
            before, start = [*self.done, *passes[:i]], time.perf_counter()
            with _naming(p, before, stage):
                changed = _whether_changed(p.run_layer(layer, self.ctx))
                _require_text(self.ctx.notes)
                self.program.verify()
                self.require_storable(passes[: i + 1], stage)
                entries = self.ctx.ledger.setdefault(report.key, {})
                entries[str(stage)] = self.entry(stage, changed)
            report.seconds += time.perf_counter() - start
            times = sum(q.name == p.name for q in before)
            again = f"-{times + 1}" if times else ""
            self.hooks.dump(f"layer{stage:03d}-{p.name}{again}", self.program, stage)

    def advance(self, layer: Layer, passes: Sequence[LayerPass]) -> None:
        """Take the activations through a finished layer.

        Raise the float model's own error if it does not get through either.
        """
        try:
            layer.inputs.advance()
        except MoeccError as e:
            _ = layer.targets
            ran = ", ".join(p.name for p in [*self.done, *passes])
            raise MoeccError(f"layer {layer.index - 1} no longer runs behind {ran}: {e}") from e

    def require_storable(self, running: Sequence[Pass], stage: int | None = None) -> None:
        """Raise MoeccError if no artifact could hold the program.

        Tensors are checked only if no pass that ran waits for a later one (`leads_to`).
        """
        assert self.ctx.traced is not None
        storable.require_nodes(self.program, self.ctx.traced, stage)
        ran = [*self.done, *running]
        provided = [set().union(*(q.provides for q in ran[i:])) for i in range(len(ran))]
        if all(p.leads_to <= given for p, given in zip(ran, provided, strict=True)):
            storable.require_tensors(self.program, self.ctx.traced)

    def report(self, p: Pass, position: int) -> PassReport:
        return PassReport(str(p), f"{position} {p}")

    def entry(self, stage: int, changed: bool) -> Json:
        """Return the ledger's line of one pass in one layer.

        The journal keeps it, so that a resumed run reports the same.
        """
        found = [m for m in self.program.moe_layers() if m.layer == stage]
        recorded = [self.ctx.audit.get(p.path, {}) for m in found for p in m.projections]
        return {
            "changed": changed,
            "nodes": sum(n.op == "call_function" for n in self.program.graph.nodes),
            "stored": sum(stored_bits(self.program, m) for m in found),
            "weights": sum(m.weights for m in found),
            "errors": [f["in_sample_error"] for f in recorded if "in_sample_error" in f],
        }


def _whether_changed(returned: object) -> bool:
    if not isinstance(returned, bool):
        advice = "return True or False, whether it changed the program"
        raise MoeccError(f"it returned {returned!r}; {advice}")
    return returned


def _require_text(notes: object) -> None:
    odd = [n for n in notes if not isinstance(n, str)] if isinstance(notes, list) else [notes]
    if odd:
        raise MoeccError(f"it noted {odd[0]!r}; ctx.notes is a list of texts")


@contextmanager
def _naming(p: Pass, done: Sequence[Pass], stage: int | None) -> Iterator[None]:
    """Add the pass, the layer and the earlier passes to any error inside."""
    try:
        yield
    except (Exception, SystemExit) as error:
        where = "" if stage is None else f" in layer {stage - 1}"
        after = f" (after {', '.join(q.name for q in done)})" if done else ""
        told = isinstance(error, MoeccError)
        kind, why = (type(error), str(error)) if told else (Mendable, fault(error, p))
        raise kind(f"{p} failed{where}{after}: {why}") from error


def _finish(report: PassReport, ctx: Context) -> None:
    """Fill in the report's figures from the ledger."""
    entries = list(ctx.ledger.get(report.key, {}).values())
    report.changed = any(e["changed"] for e in entries)
    report.nodes = entries[-1]["nodes"] if entries else 0
    report.bits = per_weight(sum(e["stored"] for e in entries), sum(e["weights"] for e in entries))
    errors = [error for e in entries for error in e["errors"]]
    report.in_sample_error = sum(errors) / len(errors) if errors else None
