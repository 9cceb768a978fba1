"""Removes the bias of a compressed projection if it hardly moves the output.

  1. Divide each row's bias by the row's norm, the size of its output for an input of unit variance.
     A row of zeros is all bias: 1, and 0 without one.
  2. Take the root mean square of these shares over all rows and experts. If it is under `below`,
     remove the bias; that saves 16/K bits per weight.

This is a pass of your own in one file. Run it by its path:

    moecc compile MODEL --passes kbvq,./examples/my_pass.py{below=0.02} -o OUT
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from moecc.ir.moe import Projection
from moecc.ir.ops import VQ_EXPERTS
from moecc.ir.relative import relative
from moecc.options import option
from moecc.pipeline.passes import Context, Layer, LayerPass


@dataclass(frozen=True, kw_only=True)
class DropBias(LayerPass):
    name: ClassVar[str] = "drop_bias"
    requires: ClassVar[frozenset[str]] = frozenset({"folded"})
    below: float = option(
        0.01, help="share of the output's spread under which a bias goes", low=0, high=100
    )

    def run_layer(self, layer: Layer, ctx: Context) -> bool:
        compressed = [m for m in layer.moe if m.node.target is VQ_EXPERTS]
        return any([self.drop(layer, p, ctx) for m in compressed for p in m.projections])

    def drop(self, layer: Layer, projection: Projection, ctx: Context) -> bool:
        bias, weight = layer.weight(projection, "bias"), layer.original(projection)
        if bias is None or weight is None:
            return False
        share = float(relative(bias.abs(), weight.norm(dim=-1)).square().mean().sqrt())
        ctx.record(projection.path, bias_share=share)
        if share >= self.below:
            return False
        projection.set_operands({"bias": None})
        layer.program.drop_unused()
        return True
