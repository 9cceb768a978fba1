"""Calibration: what each expert's projections see, measured on the tokens that are really routed to them.

  1. The calibration text runs through this layer behind the compressed earlier ones.
  2. gate_up of expert e gets C_e = mean of w^2 x x^T over the tokens routed to it, w its routing weight, mixed with the layer's
     average worth `SHRINKAGE` tokens; one C for the layer where one per expert would not fit in memory.
  3. down of expert e gets the same of its hidden units h = gate(gate_up_e x).
  4. An expert that saw fewer than `min_tokens` tokens is starved: its hidden units are its own, so no average over experts can
     stand in. It gets the tokens that its router scored highest sent to it on purpose, and is named in the audit.

Shapes: E experts, D hidden, F intermediate; C_e [D, D], down's [F, F]. float32, one layer at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moecc.base import Context, Layer, LayerPass, option
from moecc.ir import MoE
from moecc.ops import EXPERTS
from moecc.passes._moments import SHRINKAGE, Moments, Routed, hidden_units, mean_outer, routed_tokens

_PER_EXPERT_BYTES = 2 << 30


@dataclass(frozen=True, kw_only=True)
class MeasureMoments(LayerPass):
    name: ClassVar[str] = "moments"
    after: ClassVar[frozenset[str]] = frozenset({"lora"})
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
        gate_up, bias = layer.weight(moe, "gate_up"), layer.weight(moe, "gate_up_bias")
        assert gate_up is not None
        experts, _, hidden = gate_up.shape
        per_expert = 4 * experts * hidden * hidden <= _PER_EXPERT_BYTES
        average = mean_outer(routed.x)
        first, second, tokens, starved = [], [], [], {}
        for e in range(experts):
            rows = routed.rows(e)
            tokens.append(len(rows))
            if per_expert:
                own = mean_outer(routed.x[rows], self.cost(routed, e, rows))
                share = SHRINKAGE / (len(rows) + SHRINKAGE)
                first.append(own * (1 - share) + average * share)
            weight = self.cost(routed, e, rows)
            if len(rows) < min(self.min_tokens, len(routed.x)):
                rows, weight = self.send(routed, e), None
                starved[e] = len(rows)
            h = hidden_units(moe, routed.x[rows], gate_up[e], None if bias is None else bias[e])
            second.append(mean_outer(h, weight))
        for e, sent in starved.items():
            ctx.notes.append(
                f"{moe.path} expert {e}: {tokens[e]} routed tokens; calibrated on {sent} sent to it on purpose"
            )
        inputs = torch.stack(first) if per_expert else average.unsqueeze(0)
        return Moments(torch.tensor(tokens), inputs, torch.stack(second), starved)

    def cost(self, routed: Routed, expert: int, rows: Tensor) -> Tensor | None:
        return None if self.routing == "one" else routed.weight_of(expert, rows).square()

    def send(self, routed: Routed, expert: int) -> Tensor:
        """The `min_tokens` tokens that the router would soonest have sent here; evenly spaced ones where it has no logits."""
        count = min(self.min_tokens, len(routed.x))
        if routed.logits is None or routed.logits.shape[1] <= expert:
            return torch.linspace(0, len(routed.x) - 1, count).long()
        return routed.logits[:, expert].topk(count).indices
