"""Folds the affine correction into the format: slope into scale, offset into bias; drops what is dead then.

Exact up to the rounding of those two tensors to 16 bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from moecc.ir.moe import MoE
from moecc.ir.ops import VQ_EXPERTS
from moecc.passes._code.half import compact
from moecc.pipeline.passes import Context, Layer, LayerPass


@dataclass(frozen=True, kw_only=True)
class FoldAffine(LayerPass):
    name: ClassVar[str] = "fold"
    requires: ClassVar[frozenset[str]] = frozenset({"affine"})
    provides: ClassVar[frozenset[str]] = frozenset({"folded"})

    def run_layer(self, layer: Layer, ctx: Context) -> bool:
        found = [m for m in layer.moe if m.node.target is VQ_EXPERTS]
        return any([self.fold(layer, moe, p) for moe in found for p in ("gate_up", "down")])

    def fold(self, layer: Layer, moe: MoE, projection: str) -> bool:
        changed: dict[str, fx.Node | None] = {}
        for target, extra in (("scale", "slope"), ("bias", "offset")):
            value = layer.weight(moe, f"{projection}_{extra}")
            if value is None:
                continue
            old = layer.weight(moe, f"{projection}_{target}")
            if extra == "slope":
                assert old is not None
                value = old * value
            elif old is not None:
                value = old + value
            stored = layer.program.add(f"{moe.path}.{projection}.{target}", compact(value))
            changed |= {f"{projection}_{target}": stored, f"{projection}_{extra}": None}
        moe.set_operands(changed)
        layer.program.drop_unused()
        return bool(changed)
