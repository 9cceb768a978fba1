"""Pipelines run over small programs; each run records what every pass changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from made import ROOT
from torch import Tensor

from moecc.errors import MoeccError
from moecc.ir.program import Program
from moecc.pipeline.order import resolve
from moecc.pipeline.parse import parse_passes
from moecc.pipeline.passes import Context, Pass
from moecc.pipeline.run import Hooks, PassReport, run_passes
from moecc.pipeline.stream import run_program

Tiny = Callable[[str], Program]


MY_PASS = str(ROOT / "examples" / "my_pass.py")


TOKENS = [
    torch.randint(0, 64, (1, 24), generator=torch.Generator().manual_seed(i)) for i in range(8)
]


# ---- pipeline text and passes of a test's own


def resolved(text: str, *, bits: float | None = None) -> list[Pass]:
    """Return the passes that run for `text`, in order."""
    return resolve(parse_passes(text, bits=bits)[0])[0]


def order(text: str) -> list[str]:
    """Return the names of the passes that run for `text`, in order."""
    return [p.name for p in resolved(text)]


def refusal(text: str, *, bits: float | None = None) -> str:
    """Return the one line with which the pipeline `text` is refused."""
    with pytest.raises(MoeccError) as found:
        resolved(text, bits=bits)
    assert "\n" not in str(found.value)
    return str(found.value)


def derive(base: type[Pass], name: str, **members: object) -> Pass:
    """Return a pass that is `base` with another name and these methods and class variables."""
    cls = type("Derived", (base,), {"name": name, **members})
    return dataclass(frozen=True, kw_only=True)(cls)()


def idle(name: str, **facts: str) -> Pass:
    """Return a model pass that changes nothing; facts: requires, provides, after, spoils."""
    sets = {key: frozenset(value.split()) for key, value in facts.items()}
    return derive(Pass, name, run=lambda self, program, ctx: False, **sets)


# ---- runs


@dataclass
class Run:
    """A finished run.

    differed: by pass, whether the text of the graph differed after it.
    texts: the graph's text by "layer001-vq" and the like, and by "before" ahead of the first pass.
    """

    program: Program
    ctx: Context
    reports: list[PassReport]
    differed: dict[str, bool] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)

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
    """Run the pipeline `text` over a copy of `program` and record what each pass changed.

    facts: what the program has already, so that no pass is inserted for it.
    """
    program = program.copy()
    passes, _ = resolve(parse_passes(text)[0], facts)
    last = program.text()
    unchanged = {p.name: False for p in passes}
    found = Run(program, Context(seed=seed), [], unchanged, {"before": last})

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
        if f"layer001-{p.name}" not in found.texts:  # only a model pass leaves no text of a layer
            look(p.name, now.text())

    hooks = Hooks(dump=dump, after_pass=after_pass)
    rows = TOKENS if batches is None else batches
    found.reports = run_passes(program, passes, found.ctx, rows, hooks)
    return found


# ---- properties


def expert_errors(run: Run) -> dict[str, list[float]]:
    """Return the error of each expert [E], by the path of its projection."""
    audit = run.ctx.audit.items()
    return {
        path: row["expert_in_sample_error"]
        for path, row in audit
        if "expert_in_sample_error" in row
    }
