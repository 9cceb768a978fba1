"""Folds trained adapters into the weights that they adapt, so that a compiled model has none.

  1. W + B A is computed once and rounded to the type that the checkpoint stores W in.
  2. The program's placeholder stands for that plain weight again; A and B are gone.

Exact up to the rounding in step 1, whose size is in the audit. Experts' own tensors are trained in the form they are stored in
(`rilq`), so there is nothing to merge for them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from moecc.ir.program import Program
from moecc.passes._tune.low_rank import attached, merge
from moecc.pipeline.estimate import Estimate
from moecc.pipeline.passes import Context, Pass


@dataclass(frozen=True, kw_only=True)
class MergeAdapters(Pass):
    name: ClassVar[str] = "merge"
    requires: ClassVar[frozenset[str]] = frozenset({"adapters"})
    provides: ClassVar[frozenset[str]] = frozenset({"merged"})
    spoils: ClassVar[frozenset[str]] = frozenset({"adapters"})

    def estimate(self, found: Estimate) -> None:
        return None

    def run(self, program: Program, ctx: Context) -> bool:
        found = attached(program)
        for adapter in found:
            ctx.record(adapter.weight, adapter="merged", rounding=merge(program, adapter))
        return bool(found)
