"""Folds the affine correction into the format: slope into scale, offset into bias.

  1. scale_e * slope_e becomes the new scale, bias_e + offset_e the new bias.
  2. Slope and offset are gone, and with them every weight that nothing reads any more.

Exact up to the rounding of these two tensors to 16 bits. Cost in bits per weight: none for slopes,
16/K for an offset if there was no bias.

Shapes: E experts, N rows, K columns; all four tensors are [E, N].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from moecc.ir.moe import Projection
from moecc.ir.ops import VQ_EXPERTS
from moecc.passes._code.half import compact
from moecc.pipeline.estimate import Estimate
from moecc.pipeline.passes import Context, Layer, LayerPass
from moecc.pipeline.work import Scope, Work


@dataclass(frozen=True, kw_only=True)
class FoldAffine(LayerPass):
    name: ClassVar[str] = "fold"
    requires: ClassVar[frozenset[str]] = frozenset({"affine"})
    provides: ClassVar[frozenset[str]] = frozenset({"folded"})

    def estimate(self, found: Estimate) -> None:
        return None

    def work(self, scope: Scope) -> Work:
        return Work()

    def run_layer(self, layer: Layer, ctx: Context) -> bool:
        found = [m for m in layer.moe if m.node.target is VQ_EXPERTS]
        return any([self.fold(layer, p) for moe in found for p in moe.projections])

    def fold(self, layer: Layer, projection: Projection) -> bool:
        """Fold one projection's correction; return whether it had one."""
        changed: dict[str, fx.Node | None] = {}
        for target, extra in (("scale", "slope"), ("bias", "offset")):
            value = layer.weight(projection, extra)
            if value is None:
                continue
            old = layer.weight(projection, target)
            if extra == "slope":
                assert old is not None
                value = old * value
            elif old is not None:
                value = old + value
            stored = layer.program.add(f"{projection.path}.{target}", compact(value))
            changed |= {target: stored, extra: None}
        projection.set_operands(changed)
        layer.program.drop_unused()
        return bool(changed)
