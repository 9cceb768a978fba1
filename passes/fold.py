"""Folds the affine correction into the format: slope into scale, offset into bias; drops what is dead then.

Exact up to the rounding of those two tensors to 16 bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from moecc.base import Context, Layer, LayerPass
from moecc.ir import MoE
from moecc.ops import VQ_EXPERTS
from moecc.passes._store import compact


@dataclass(frozen=True, kw_only=True)
class FoldAffine(LayerPass):
    name: ClassVar[str] = "fold"
    requires: ClassVar[frozenset[str]] = frozenset({"affine"})
    provides: ClassVar[frozenset[str]] = frozenset({"folded"})

    def run_layer(self, layer: Layer, ctx: Context) -> bool:
        found = [m for m in layer.moe if m.node.target is VQ_EXPERTS]
        return any([self.fold(layer, moe, p) for moe in found for p in ("gate_up", "down")])

    def fold(self, layer: Layer, moe: MoE, projection: str) -> bool:
        names = [a.name for a in VQ_EXPERTS._schema.arguments if not a.kwarg_only]
        args = list(moe.node.args)
        changed = False
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
            args[names.index(f"{projection}_{target}")] = layer.program.add(
                f"{moe.path}.{projection}.{target}", compact(value)
            )
            args[names.index(f"{projection}_{extra}")] = None
            changed = True
        moe.node.args = tuple(args)
        layer.program.drop_unused()
        return changed
