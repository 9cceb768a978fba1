"""Second moments of the inputs of an MoE layer's two projections: the metric of coding and basis.

Shapes: E experts, D hidden, F intermediate, N rows of gate_up, T tokens, k experts per token, n
tokens routed to one expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from moecc.errors import MoeccError, counted
from moecc.ir.gates import apply_gate
from moecc.ir.moe import MoE, Projection
from moecc.pipeline.passes import Layer

MIN_TOKENS = 64  # an expert with fewer routed tokens is starved
_MOST = 1e36  # that a sum of costs may reach: float32 holds 3e38
_PER_EXPERT_BYTES = 2 << 30  # that one matrix per expert may take, all experts together
# Weight, in tokens, of the layer's average in each expert's moment of gate_up's input.
SHRINKAGE = 16.0


@dataclass
class Moments:
    """What calibration learned of one MoE layer. Moments are means over tokens, not sums."""

    tokens: Tensor  # [E] routed tokens
    mass: Tensor  # [E] sum of their weights, over all tokens: how much of the layer an expert is
    gate_up: Tensor  # [E, D, D], or [1, D, D] if one per expert does not fit in memory
    down: Tensor  # [E, F, F]
    starved: dict[int, int]  # expert -> tokens sent to it on purpose
    # projection -> costs of errors in its output, [E, N, N] or [1, N, N] ([.., D, D] for down);
    # without an entry all channels count alike
    output: dict[str, Tensor]
    notes: list[str] = field(default_factory=list)  # remarks on anything left out

    def of(self, projection: str) -> Tensor:
        """The moments [E, K, K] of `gate_up` or `down`; a view if experts share one."""
        moment = self.gate_up if projection == "gate_up" else self.down
        return moment.expand(len(self.tokens), -1, -1)

    def output_of(self, projection: str) -> Tensor | None:
        """The costs [E, N, N] of errors in the output of `gate_up` or `down`.

        A view if experts share one, None if all channels count alike.
        """
        found = self.output.get(projection)
        return None if found is None else found.expand(len(self.tokens), -1, -1)


@dataclass
class Routed:
    """Calibration tokens of one MoE layer.

    A slot of weight 0 is no choice: longcat_flash's identity experts are traced as expert 0 with
    that weight.
    """

    x: Tensor  # [T, D] inputs
    index: Tensor  # [T, k] chosen experts
    weight: Tensor  # [T, k] their weights
    logits: Tensor | None  # [T, E] of the router

    def rows(self, expert: int) -> Tensor:
        """The tokens that chose `expert`, [n]."""
        return ((self.index == expert) & (self.weight != 0)).any(-1).nonzero().squeeze(-1)

    def weight_of(self, expert: int, rows: Tensor) -> Tensor:
        """Routing weights [n] of `expert` on `rows`, 0 for a token that did not choose it."""
        return (self.weight[rows] * (self.index[rows] == expert)).sum(-1)


def routed_tokens(layer: Layer, moe: MoE) -> Routed:
    """Tap the inputs of an experts node over all calibration batches."""
    nodes = [n for n in (*moe.node.args[:3], moe.logits) if isinstance(n, fx.Node)]
    values = layer.tap([n.name for n in nodes])
    joined = [torch.cat([v.flatten(0, -2) for v in values[n.name]]) for n in nodes]
    logits = joined[3].float() if len(joined) > 3 and len(joined[3]) == len(joined[0]) else None
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
    """Measure the moments of both projections of a layer's experts, which must be dense.

    cost: the layer's sensitivity, [D, D]. squared: weight tokens by their squared routing weight;
    False: every token counts alike. Raise MoeccError if costs under the moments could leave the
    range of float32.
    """
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
            slopes = mean_outer(gate_slopes(moe, routed.x[rows], *reached), weight)
            output["gate_up"][e] = _behind(down[e], output["down"][0], rows_of_gate_up) * slopes
    if starved:
        notes.append(f"{moe.path}: {_starvation(tokens, starved, min_tokens)}")
    counts = torch.tensor(tokens), torch.tensor(mass)
    found = Moments(*counts, inputs, reaching, starved, output, notes)
    for projection, weights in zip(moe.projections, (gate_up, down), strict=True):
        _require_range(projection, weights, found)
    return found


def _starvation(tokens: Sequence[int], starved: dict[int, int], least: int) -> str:
    """One remark for a layer, whose starved experts may be hundreds; the audit has each of them."""
    worst = min(starved, key=lambda e: tokens[e])
    who = f"{len(starved)} of {counted(len(tokens), 'expert')}"
    seen = f"fewer than {counted(least, 'routed token')}, expert {worst} only {tokens[worst]}"
    return f"{who} got {seen}; calibrated on {starved[worst]} sent to each on purpose"


def _require_range(projection: Projection, weight: Tensor, moments: Moments) -> None:
    """Raise MoeccError unless float32 holds tr(S) |W|^2 tr(H) of every expert.

    The cost of no error that passes meet is larger.
    """
    traces = [
        m.diagonal(dim1=-2, dim2=-1).sum(-1, dtype=torch.float64)
        for m in (moments.of(projection.name), moments.output_of(projection.name))
        if m is not None
    ]
    norms = torch.linalg.vector_norm(weight, dim=(-2, -1), dtype=torch.float64)
    most = float(torch.stack([norms.square(), *traces]).clamp(min=1).prod(0).max())
    if not most < _MOST:
        raise MoeccError(
            f"{projection.path}: squared errors of its output may reach {most:.0e} on the "
            "calibration text, more than float32 can add up; check the weights of this layer, "
            "and of those before it"
        )


def _output(
    moe: MoE, cost: Tensor | None, gate_up_fits: bool
) -> tuple[dict[str, Tensor], list[str]]:
    """The costs of errors in down's output [1, D, D], and remarks on what is missing.

    There is an entry for gate_up, still empty, if that is to be measured.
    """
    if cost is None:
        return {}, []
    if moe.operand("post_norm") is not None:
        why = "a norm stands between them and sensitivity"
        return {}, [f"{moe.path}: errors of all channels count alike; {why}"]
    if gate_up_fits:
        return {"down": cost.unsqueeze(0), "gate_up": cost.new_zeros(())}, []
    why = "their costs would not fit in memory"
    note = f"{moe.gate_up.path}: errors of all rows count alike; {why}"
    return {"down": cost.unsqueeze(0)}, [note]


def _behind(down: Tensor, cost: Tensor, rows: int) -> Tensor:
    """The costs of errors in one expert's hidden units, for the rows that make them: [rows, rows].

    Gate and up rows move the same hidden units, so the costs [F, F] repeat for both.
    """
    return (down.T @ cost @ down).repeat(2, 2)[:rows, :rows]


def _sent(routed: Routed, expert: int, count: int) -> Tensor:
    """The tokens that the router scored highest here; evenly spaced ones without its logits."""
    count = min(count, len(routed.x))
    if routed.logits is None or routed.logits.shape[1] <= expert:
        return torch.linspace(0, len(routed.x) - 1, count).long()
    return routed.logits[:, expert].topk(count).indices


def hidden_units(moe: MoE, x: Tensor, gate_up: Tensor, bias: Tensor | None) -> Tensor:
    """Inputs [n, D] through one expert's first projection [N, D] and gate: [n, F]."""
    rows = torch.nn.functional.linear(x, gate_up, bias)
    a = moe.attributes
    return apply_gate(rows, a["act"], a["gate"], a["alpha"], a["limit"])


def gate_slopes(moe: MoE, x: Tensor, gate_up: Tensor, bias: Tensor | None) -> Tensor:
    """The derivative of each hidden unit by the rows of gate_up that make it: [n, D] -> [n, N]."""
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
    if len(x) and total > 0:
        return (x * weight.unsqueeze(-1)).T @ x / total
    return x.new_zeros(x.shape[1], x.shape[1])
