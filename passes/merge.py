"""Folds trained adapters into the weights that they adapt, so that a compiled model has none.

  1. Compute W + B A once and round it to the type that the checkpoint stores W in.
  2. Let the program's placeholder stand for that plain weight again; A and B are gone.

Exact up to the rounding in step 1; the audit has its size. The experts' own tensors need no
merging, because `rilq` trains them in their stored form. Cost in bits per weight: none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from moecc.ir.program import Program
from moecc.passes._tune.low_rank import attached, merge
from moecc.pipeline.estimate import Estimate
from moecc.pipeline.passes import Context, Pass
from moecc.pipeline.work import Scope, Work


@dataclass(frozen=True, kw_only=True)
class MergeAdapters(Pass):
    name: ClassVar[str] = "merge"
    requires: ClassVar[frozenset[str]] = frozenset({"adapters"})
    provides: ClassVar[frozenset[str]] = frozenset({"merged"})
    spoils: ClassVar[frozenset[str]] = frozenset({"adapters"})

    def estimate(self, found: Estimate) -> None:
        return None

    def work(self, scope: Scope) -> Work:
        return Work()  # next to nothing

    def run(self, program: Program, ctx: Context) -> bool:
        found = attached(program)
        for adapted in found:
            ctx.record(adapted.weight, adapter="merged", rounding=merge(program, adapted))
        return bool(found)
