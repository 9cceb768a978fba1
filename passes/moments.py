"""Calibration: measure the inputs of each expert's projections on the tokens routed to it.

  1. Run the calibration text through this layer, behind the compressed earlier ones. With
     behind=float, behind the float model's, so that no layer depends on an earlier one.
  2. For gate_up of expert e, C_e = mean of w^2 x x^T over the tokens routed to it, w its routing
     weight. Mix in the layer's average with the weight of 16 tokens.
  3. For down of expert e, the same of its hidden units h = gate(gate_up_e x).
  4. An expert that saw fewer than `min_tokens` tokens is starved. Its hidden units are its own, so
     no average over experts can stand in: send it the tokens that its router scored highest, and
     name it in the audit.
  5. Behind the pass `sensitivity`, errors of a projection's output have costs of their own, with
     S [D, D] for the layer. For down the costs are S itself. For gate_up they are
     J^T W_down^T S W_down J averaged over the expert's tokens, where J is the gate's derivative (a
     Gauss-Newton step). An expert's matrices are made where its weights are coded, so that those of
     one expert are in memory.
  6. Rows are cut into blocks of at most 4096, whose errors count together: every b-th row is in the
     same block, so that a unit's gate row and up row are. Costs between blocks are left out. Work
     and memory then grow with N, not with N^2.

The example's divergence is the same for both kinds of step 1: 0.01287 and 0.01289 at 2 bit, 0.00303
at 3 bit (4 layers). Coded layers are the default because errors add up over more of them.

What a cut costs (the example's 256 rows at 2 bit, 4 layers; its bits are the same):

| passes | one block | 2 | 4 | 8 | one for each unit |
|---|---|---|---|---|---|
| `sensitivity,kbvq` | 0.00856 | 0.00961 | 0.01030 | 0.01096 | 0.01145 |
| `vsraq,kbvq` | 0.00784 | 0.00867 | 0.00919 | 0.00955 | 0.00984 |

Shapes: E experts, D hidden, F intermediate, N rows of a projection, b blocks of them; C_e [D, D],
down's [F, F]. float32, one layer at a time. Cost in bits per weight: none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from moecc.ir.ops import EXPERTS
from moecc.options import option
from moecc.passes._code.moments import MIN_TOKENS, measure, routed_tokens
from moecc.pipeline.estimate import Estimate
from moecc.pipeline.passes import Context, Layer, LayerPass
from moecc.pipeline.work import Scope, Work


@dataclass(frozen=True, kw_only=True)
class MeasureMoments(LayerPass):
    name: ClassVar[str] = "moments"
    after: ClassVar[frozenset[str]] = frozenset({"lora", "sensitivity", "budget"})
    provides: ClassVar[frozenset[str]] = frozenset({"moments"})
    within_layer: ClassVar[frozenset[str]] = frozenset({"moments"})
    needs_data: ClassVar[bool] = True
    min_tokens: int = option(
        MIN_TOKENS, help="an expert with fewer routed tokens is starved", low=1, high=1 << 20
    )
    routing: str = option(
        "squared",
        help="weight of a token: its squared routing weight, or 1",
        choices=("squared", "one"),
    )

    behind: str = option(
        "coded",
        help="the earlier layers that the text goes through: coded ones, or the float model's",
        choices=("coded", "float"),
    )

    def estimate(self, found: Estimate) -> None:
        return None

    def work(self, scope: Scope) -> Work:
        return Work(here=scope.tokens * scope.dense)

    def run_layer(self, layer: Layer, ctx: Context) -> bool:
        costs = ctx.data.get("sensitivity", {})
        for moe in layer.moe:
            if moe.node.target is not EXPERTS:
                continue
            routed = routed_tokens(layer, moe, original=self.behind == "float")
            layer.data["routed", moe.path] = routed
            squared, cost = self.routing == "squared", costs.get(moe.path)
            found = measure(layer, moe, routed, cost, self.min_tokens, squared=squared)
            layer.data["moments", moe.path] = found
            ctx.notes.extend(found.notes)
            for p in moe.projections:
                errors = "weighted by sensitivity" if found.weighted else "all channels alike"
                ctx.record(p.path, errors=errors)
        return False
