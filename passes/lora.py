"""Merges a PEFT LoRA adapter into the float model, before anything is coded.

  1. Read the adapter folder (`_tune.peft`). It may adapt routed experts too. Every tensor of it
     must find its weight, or nothing is merged.
  2. A merged weight W + update is computed in float32 whenever it is read, and rounded to the type
     that the checkpoint stores it in.
  3. Later passes take the merged model for the float one.

Cost in bits per weight: none.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from moecc.ir.program import Program
from moecc.options import option
from moecc.passes._tune.peft import Adapter, adapter_files, require_fitting
from moecc.passes._tune.update import merge_into
from moecc.pipeline.estimate import Estimate
from moecc.pipeline.passes import Context, Pass
from moecc.pipeline.work import Scope, Work


@dataclass(frozen=True, kw_only=True)
class MergeLora(Pass):
    name: ClassVar[str] = "lora"
    provides: ClassVar[frozenset[str]] = frozenset({"lora"})
    makes_reference: ClassVar[bool] = True
    path: str = option("", help="folder with adapter_config.json and adapter_model.safetensors")

    def files(self) -> list[Path]:
        return adapter_files(self.name, self.path)

    def check(self, program: Program) -> None:
        require_fitting(self.name, self.path, program)

    def estimate(self, found: Estimate) -> None:
        return None

    def work(self, scope: Scope) -> Work:
        return Work()  # next to nothing

    def run(self, program: Program, ctx: Context) -> bool:
        updates = Adapter.read(self.name, self.path).updates(program)
        for weight, update in updates.items():
            merge_into(program, weight, update)
            ctx.record(weight, lora=str(update))
        return bool(updates)
