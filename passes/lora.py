"""Merges a PEFT LoRA adapter into the float weights it adapts, routed experts included, before anything is coded.

`_tune.peft` reads the adapter. Every tensor of it must find its weight, or nothing is merged. A merged weight is computed whenever it
is read, in float32, and rounded to the type that the checkpoint stores it in. Passes behind it take the merged model for the float
one.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from moecc.ir.program import Program
from moecc.options import option
from moecc.passes._tune.peft import Adapter, adapter_files, merge_into, require_fitting
from moecc.pipeline.estimate import Estimate
from moecc.pipeline.passes import Context, Pass


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

    def run(self, program: Program, ctx: Context) -> bool:
        adapter = Adapter.read(self.name, self.path)
        updates = adapter.updates(program)
        for weight, update in updates.items():
            merge_into(program, weight, update)
            ctx.record(weight, lora=str(update))
        return bool(updates)
