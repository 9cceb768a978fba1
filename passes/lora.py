"""Merges a PEFT LoRA adapter into the float weights it adapts, routed experts included, before anything is coded.

`_peft` reads the adapter. Every tensor of it must find its weight, or nothing is merged. A merged weight is computed whenever it
is read, in float32, and rounded to the type that the checkpoint stores it in. Passes behind it take the merged model for the float
one.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from moecc.base import Context, Pass, option
from moecc.ir import Program
from moecc.passes._peft import Adapter, adapter_files, merge_into, require_fitting


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

    def run(self, program: Program, ctx: Context) -> bool:
        adapter = Adapter.read(self.name, self.path)
        updates = adapter.updates(program)
        for weight, update in updates.items():
            merge_into(program, weight, update)
            ctx.record(weight, lora=str(update))
        return bool(updates)
