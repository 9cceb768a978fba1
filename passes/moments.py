"""Calibration: what each expert's projections see, measured on the tokens that are really routed to them.

  1. The calibration text runs through this layer behind the compressed earlier ones.
  2. gate_up of expert e gets C_e = mean of w^2 x x^T over the tokens routed to it, w its routing weight, mixed with the layer's
     average worth `SHRINKAGE` tokens; one C for the layer where one per expert would not fit in memory.
  3. down of expert e gets the same of its hidden units h = gate(gate_up_e x).
  4. An expert that saw fewer than `min_tokens` tokens is starved: its hidden units are its own, so no average over experts can
     stand in. It gets the tokens that its router scored highest sent to it on purpose, and is named in the audit.

  5. Behind the pass `sensitivity` an error in a projection's output has a cost of its own, S [D, D] for the layer: for down that
     is S itself; for gate_up, J^T W_down^T S W_down J averaged over the expert's tokens, J the gate's derivative (a Gauss-Newton
     step; where one matrix per expert would not fit, all rows count alike, and the audit says so).

Shapes: E experts, D hidden, F intermediate, N rows of gate_up; C_e [D, D], down's [F, F]. float32, one layer at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moecc.base import Context, Layer, LayerPass, option
from moecc.ir import MoE
from moecc.ops import EXPERTS
from moecc.passes._moments import SHRINKAGE, Moments, Routed, gate_slopes, hidden_units, mean_outer, routed_tokens

_PER_EXPERT_BYTES = 2 << 30


@dataclass(frozen=True, kw_only=True)
class MeasureMoments(LayerPass):
    name: ClassVar[str] = "moments"
    after: ClassVar[frozenset[str]] = frozenset({"lora", "sensitivity"})
    provides: ClassVar[frozenset[str]] = frozenset({"moments"})
    needs_data: ClassVar[bool] = True
    min_tokens: int = option(64, help="an expert with fewer routed tokens is starved", low=1, high=1 << 20)
    routing: str = option(
        "squared", help="weight of a token: its routing weight squared, or 1", choices=("squared", "one")
    )

    def run_layer(self, layer: Layer, ctx: Context) -> bool:
        for moe in layer.moe:
            if moe.node.target is EXPERTS:
                layer.data["moments", moe.path] = self.measure(layer, moe, ctx)
        return False

    def measure(self, layer: Layer, moe: MoE, ctx: Context) -> Moments:
        routed = routed_tokens(layer, moe)
        layer.data["routed", moe.path] = routed
        gate_up, bias, down = (layer.weight(moe, n) for n in ("gate_up", "gate_up_bias", "down"))
        assert gate_up is not None and down is not None
        experts, rows_of_gate_up, hidden = gate_up.shape
        per_expert = 4 * experts * hidden * hidden <= _PER_EXPERT_BYTES
        output = self.output(moe, ctx, 4 * experts * rows_of_gate_up**2 <= _PER_EXPERT_BYTES)
        average = mean_outer(routed.x)
        first, second, outward, tokens, starved = [], [], [], [], {}
        for e in range(experts):
            rows = routed.rows(e)
            weight = self.cost(routed, e, rows)
            tokens.append(len(rows))
            if per_expert:
                own = mean_outer(routed.x[rows], weight)
                share = SHRINKAGE / (len(rows) + SHRINKAGE)
                first.append(own * (1 - share) + average * share)
            if len(rows) < min(self.min_tokens, len(routed.x)):
                rows, weight = self.send(routed, e), None
                starved[e] = len(rows)
            reached = gate_up[e], None if bias is None else bias[e]
            second.append(mean_outer(hidden_units(moe, routed.x[rows], *reached), weight))
            if "gate_up" in output:
                behind = (down[e].T @ output["down"][0] @ down[e]).repeat(2, 2)[:rows_of_gate_up, :rows_of_gate_up]
                outward.append(behind * mean_outer(gate_slopes(moe, routed.x[rows], *reached), weight))
        for e, sent in starved.items():
            ctx.notes.append(
                f"{moe.path} expert {e}: {tokens[e]} routed tokens; calibrated on {sent} sent to it on purpose"
            )
        if outward:
            output["gate_up"] = torch.stack(outward)
        inputs = torch.stack(first) if per_expert else average.unsqueeze(0)
        return Moments(torch.tensor(tokens), inputs, torch.stack(second), starved, output)

    def output(self, moe: MoE, ctx: Context, gate_up_fits: bool) -> dict[str, Tensor]:
        """Step 5 for down [1, D, D]; an entry for gate_up where it is to be measured."""
        cost = ctx.sensitivity.get(moe.path)
        found: dict[str, Tensor] = {}
        if cost is not None and moe.operand("post_norm") is not None:
            ctx.notes.append(
                f"{moe.path}: errors of all channels count alike; a norm stands between them and sensitivity"
            )
        elif cost is not None:
            found["down"] = cost.unsqueeze(0)
            if gate_up_fits:
                found["gate_up"] = cost.new_zeros(())
            else:
                ctx.notes.append(
                    f"{moe.path}.gate_up: errors of all rows count alike; their costs would not fit in memory"
                )
        for projection in ("gate_up", "down"):
            weighted = "weighted by sensitivity" if projection in found else "all channels alike"
            ctx.record(f"{moe.path}.{projection}", errors=weighted)
        return found

    def cost(self, routed: Routed, expert: int, rows: Tensor) -> Tensor | None:
        return None if self.routing == "one" else routed.weight_of(expert, rows).square()

    def send(self, routed: Routed, expert: int) -> Tensor:
        """The `min_tokens` tokens that the router would soonest have sent here; evenly spaced ones where it has no logits."""
        count = min(self.min_tokens, len(routed.x))
        if routed.logits is None or routed.logits.shape[1] <= expert:
            return torch.linspace(0, len(routed.x) - 1, count).long()
        return routed.logits[:, expert].topk(count).indices
