"""Second moments of what enters an MoE layer's two projections: the metric that coding and the basis work under.

Shapes: E experts, D hidden, F intermediate, T routed tokens of one expert.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from moecc.ir.gates import apply_gate
from moecc.ir.moe import MoE
from moecc.pipeline.passes import Layer

MIN_TOKENS = 64
_PER_EXPERT_BYTES = 2 << 30
SHRINKAGE = (
    16.0  # tokens' worth of the layer's average mixed into each expert's moment of gate_up's input
)


@dataclass
class Moments:
    """What calibration learned of one MoE layer. Moments are means over tokens, not sums."""

    tokens: Tensor  # [E] routed tokens
    mass: Tensor  # [E] sum of their weights over all tokens: how much of the layer an expert is
    gate_up: Tensor  # [E, D, D], or [1, D, D] where one per expert does not fit
    down: Tensor  # [E, F, F]
    starved: dict[int, int]  # expert -> tokens sent to it on purpose
    # projection -> [E, N, N] or [1, N, N]: what an error in its output costs; without an entry all channels count alike
    output: dict[str, Tensor]
    notes: list[str] = field(default_factory=list)  # what could not be measured as it should be

    def of(self, projection: str) -> Tensor:
        """[E, K, K] of `gate_up` or `down` (a view where experts share one)."""
        moment = self.gate_up if projection == "gate_up" else self.down
        return moment.expand(len(self.tokens), -1, -1)

    def output_of(self, projection: str) -> Tensor | None:
        """[E, N, N] of `gate_up` or `down` (a view where experts share one), None where errors of all channels count alike."""
        found = self.output.get(projection)
        return None if found is None else found.expand(len(self.tokens), -1, -1)


@dataclass
class Routed:
    """Calibration tokens of one MoE layer: inputs x [T, D], chosen experts [T, k], their weights [T, k], router logits [T, E].

    A slot of weight 0 is no choice: longcat_flash's identity experts are traced as expert 0 with that weight.
    """

    x: Tensor
    index: Tensor
    weight: Tensor
    logits: Tensor | None

    def rows(self, expert: int) -> Tensor:
        return ((self.index == expert) & (self.weight != 0)).any(-1).nonzero().squeeze(-1)

    def weight_of(self, expert: int, rows: Tensor) -> Tensor:
        """Routing weight [n] of `expert` on `rows`, 0 where it was not chosen."""
        return (self.weight[rows] * (self.index[rows] == expert)).sum(-1)


def routed_tokens(layer: Layer, moe: MoE) -> Routed:
    """Tap the inputs of an experts node over all calibration batches."""
    nodes = [moe.node.args[0], moe.node.args[1], moe.node.args[2]] + (
        [moe.logits] if moe.logits is not None else []
    )
    names = [n.name for n in nodes if isinstance(n, fx.Node)]
    values = layer.tap(names)
    joined = [torch.cat([v.flatten(0, -2) for v in values[n]]) for n in names]
    logits = (
        joined[3].float() if len(joined) > 3 and joined[3].shape[0] == joined[0].shape[0] else None
    )
    return Routed(joined[0].float(), joined[1], joined[2].float(), logits)


def measure(
    layer: Layer,
    moe: MoE,
    routed: Routed,
    cost: Tensor | None,
    min_tokens: int = MIN_TOKENS,
    *,
    squared: bool = True,
) -> Moments:
    """The moments of both projections. `cost` [D, D]: the layer's sensitivity; squared=False: every token counts alike."""
    gate_up, down = (layer.weight(p) for p in moe.projections)
    bias = layer.weight(moe.gate_up, "bias")
    assert gate_up is not None and down is not None
    experts, rows_of_gate_up, hidden = gate_up.shape
    per_expert = 4 * experts * hidden * hidden <= _PER_EXPERT_BYTES
    output, notes = _output(moe, cost, 4 * experts * rows_of_gate_up**2 <= _PER_EXPERT_BYTES)
    average = mean_outer(routed.x)
    inputs = gate_up.new_empty(experts, hidden, hidden) if per_expert else average.unsqueeze(0)
    reaching = gate_up.new_empty(experts, *[down.shape[2]] * 2)
    if "gate_up" in output:
        output["gate_up"] = gate_up.new_empty(experts, *[rows_of_gate_up] * 2)
    tokens, mass, starved = [], [], {}
    for e in range(experts):
        rows = routed.rows(e)
        weight = routed.weight_of(e, rows).square() if squared else None
        tokens.append(len(rows))
        mass.append(float(len(rows) if weight is None else weight.sum()) / len(routed.x))
        if per_expert:
            own = mean_outer(routed.x[rows], weight)
            share = SHRINKAGE / (len(rows) + SHRINKAGE)
            inputs[e] = own * (1 - share) + average * share
        if len(rows) < min(min_tokens, len(routed.x)):
            rows, weight = _sent(routed, e, min_tokens), None
            starved[e] = len(rows)
        reached = gate_up[e], None if bias is None else bias[e]
        reaching[e] = mean_outer(hidden_units(moe, routed.x[rows], *reached), weight)
        if "gate_up" in output:
            behind = (down[e].T @ output["down"][0] @ down[e]).repeat(2, 2)[
                :rows_of_gate_up, :rows_of_gate_up
            ]
            output["gate_up"][e] = behind * mean_outer(
                gate_slopes(moe, routed.x[rows], *reached), weight
            )
    for e, sent in starved.items():
        notes.append(
            f"{moe.path} expert {e}: {tokens[e]} routed tokens; calibrated on {sent} sent to it on purpose"
        )
    return Moments(
        torch.tensor(tokens), torch.tensor(mass), inputs, reaching, starved, output, notes
    )


def _output(
    moe: MoE, cost: Tensor | None, gate_up_fits: bool
) -> tuple[dict[str, Tensor], list[str]]:
    """What errors of down cost [1, D, D], with an entry for gate_up where it is to be measured; and what is left out."""
    if cost is None:
        return {}, []
    if moe.operand("post_norm") is not None:
        return {}, [
            f"{moe.path}: errors of all channels count alike; a norm stands between them and sensitivity"
        ]
    if gate_up_fits:
        return {"down": cost.unsqueeze(0), "gate_up": cost.new_zeros(())}, []
    note = (
        f"{moe.path}.gate_up: errors of all rows count alike; their costs would not fit in memory"
    )
    return {"down": cost.unsqueeze(0)}, [note]


def _sent(routed: Routed, expert: int, count: int) -> Tensor:
    """The tokens that the router would soonest have sent here; evenly spaced ones where it has no logits."""
    count = min(count, len(routed.x))
    if routed.logits is None or routed.logits.shape[1] <= expert:
        return torch.linspace(0, len(routed.x) - 1, count).long()
    return routed.logits[:, expert].topk(count).indices


def hidden_units(moe: MoE, x: Tensor, gate_up: Tensor, bias: Tensor | None) -> Tensor:
    """[n, D] through one expert's first projection [N, D] and gate: [n, F]."""
    rows = torch.nn.functional.linear(x, gate_up, bias)
    a = moe.attributes
    return apply_gate(rows, a["act"], a["gate"], a["alpha"], a["limit"])


def gate_slopes(moe: MoE, x: Tensor, gate_up: Tensor, bias: Tensor | None) -> Tensor:
    """By how much each row of one expert's first projection moves the hidden unit that it is a part of: [n, D] -> [n, N]."""
    with torch.enable_grad():
        rows = torch.nn.functional.linear(x, gate_up, bias).detach().requires_grad_()
        a = moe.attributes
        hidden = apply_gate(rows, a["act"], a["gate"], a["alpha"], a["limit"])
        return torch.autograd.grad(hidden.sum(), rows)[0]


def mean_outer(x: Tensor, weight: Tensor | None = None) -> Tensor:
    """sum_t weight_t x_t x_t^T / sum_t weight_t: [n, K] -> [K, K], zero without tokens."""
    if weight is None:
        weight = x.new_ones(len(x))
    total = weight.sum()
    return (
        (x * weight.unsqueeze(-1)).T @ x / total
        if len(x) and total > 0
        else x.new_zeros(x.shape[1], x.shape[1])
    )
