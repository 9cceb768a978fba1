"""Pipelines run over small programs, with an eye on what each pass changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from moecc.ir.program import Program
from moecc.pipeline.order import resolve
from moecc.pipeline.parse import parse_passes
from moecc.pipeline.passes import Context
from moecc.pipeline.run import Hooks, PassReport, run_passes
from moecc.pipeline.stream import run_program

Tiny = Callable[[str], Program]


ROOT = Path(__file__).parents[1]


MY_PASS = str(ROOT / "examples" / "my_pass.py")


TOKENS = [
    torch.randint(0, 64, (1, 24), generator=torch.Generator().manual_seed(i)) for i in range(8)
]


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


# ---- properties


def expert_errors(run: Run) -> dict[str, list[float]]:
    return {
        path: row["expert_error"] for path, row in run.ctx.audit.items() if "expert_error" in row
    }
