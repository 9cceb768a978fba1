"""Second moments of the inputs of an MoE layer's two projections: the metric of coding and basis.

Shapes: E experts, D hidden, F intermediate, N rows of gate_up, T tokens, k experts per token, n
tokens routed to one expert.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor, fx

from moecc.errors import MoeccError, counted
from moecc.ir.gates import apply_gate
from moecc.ir.moe import MoE, Projection
from moecc.pipeline.passes import Layer
from moecc.pipeline.work import BLOCK, blocks
from moecc.types import Json

MIN_TOKENS = 64  # an expert with fewer routed tokens is starved
_MOST = 1e36  # that a sum of costs may reach: float32 holds 3e38
_TOGETHER = 1 << 12  # tokens
_SMALL = 1 << 16  # numbers of a matrix that is kept once it is computed
# Weight, in tokens, of the layer's average in each expert's moment of gate_up's input.
SHRINKAGE = 16.0


@dataclass(frozen=True)
class Common:
    """What all experts of a layer share: the op's attributes and two matrices [D, D]."""

    attributes: Json
    average: Tensor  # the mean of x x^T over all tokens of the layer
    cost: Tensor | None  # S, the layer's sensitivity; None: all channels alike
    block: int = BLOCK  # rows of an expert whose errors count together, at most

    @cached_property
    def blocks(self) -> Tensor | None:
        """The blocks [b, B, B] of S, a view; see `metric`."""
        if self.cost is None:
            return None
        count = blocks(len(self.cost), len(self.cost), self.block)
        apart = self.cost.unflatten(1, (-1, count)).unflatten(0, (-1, count))
        found: Tensor = apart.diagonal(dim1=1, dim2=3).movedim(-1, 0)
        return found


_NOTHING = Common({}, torch.empty(0), None)


@dataclass(frozen=True)
class Seen:
    """Tokens: inputs [n, D] and their weights [n], None if all count alike."""

    x: Tensor
    weight: Tensor | None

    def mean_outer(self, change: Callable[[Tensor], Tensor]) -> Tensor:
        """`mean_outer` of what `change` makes of the inputs, some thousands of them at a time."""
        weight = self.x.new_ones(len(self.x)) if self.weight is None else self.weight
        if len(self.x) <= _TOGETHER:
            return mean_outer(change(self.x), weight)
        total: Tensor | None = None
        for x, w in zip(self.x.split(_TOGETHER), weight.split(_TOGETHER), strict=True):
            outer = mean_outer(change(x), w).mul_(w.sum())
            total = outer if total is None else total.add_(outer)
        assert total is not None
        return total.div_(weight.sum().clamp(min=1e-30))


@dataclass(frozen=True)
class Expert:
    """One expert as calibration saw it; its moments are computed when they are asked for.

    They are means over tokens, not sums, in float32. Matrices are in the type that they are stored
    in.
    """

    common: Common
    path: str
    seen: Seen  # its tokens
    reaching: Seen  # the tokens whose hidden units count: others, if it is starved
    gate_up: Tensor  # [N, D]
    down: Tensor  # [D, F]
    bias: Tensor | None  # of gate_up, [N]
    made: dict[str, Tensor] = field(default_factory=dict)  # what was computed and is small

    def bare(self, projection: str) -> Expert:
        """The same for a worker that is asked about one projection.

        It lacks what all experts share, which workers are sent once (`under` adds it), and down
        where only its place behind gate_up would count.
        """
        needless = projection == "gate_up" and self.common.cost is None
        down = self.down[:0] if needless else self.down
        return replace(self, common=_NOTHING, down=down)

    def under(self, common: Common) -> Expert:
        """The same with what all experts share."""
        return replace(self, common=common)

    def metric(self, projection: str) -> tuple[Tensor, Tensor | None]:
        """`moment` and `output` of `gate_up` or `down`.

        Raise MoeccError unless float32 holds the cost of every error that may be met.
        """
        moment, output = self.moment(projection), self.output(projection)
        self._require_range(projection, moment, output)
        return moment, output

    def moment(self, projection: str) -> Tensor:
        """The second moment [K, K] of the inputs of `gate_up` or `down`."""
        return self._once(projection, self._moment)

    def output(self, projection: str) -> Tensor | None:
        """The costs [b, B, B] of errors in the output of `gate_up` or `down`, in b blocks.

        None if all channels count alike. `metric` says which rows are in a block.
        """
        if self.common.cost is None or projection == "down":
            return self.common.blocks
        return self._once("output", self._costs)

    def weight(self, projection: str) -> Tensor:
        """The matrix [N, K], in float32."""
        return (self.gate_up if projection == "gate_up" else self.down).float()

    def _once(self, key: str, make: Callable[[str], Tensor]) -> Tensor:
        if key in self.made:
            return self.made[key]
        found = make(key)
        if found.numel() <= _SMALL:
            self.made[key] = found
        return found

    def _moment(self, projection: str) -> Tensor:
        if projection == "gate_up":
            share = _shrinkage(len(self.seen.x))
            own = self.seen.mean_outer(lambda x: x)
            return own.mul_(1 - share).add_(self.common.average, alpha=share)
        a, gate_up = self.common.attributes, self.weight("gate_up")
        return self.reaching.mean_outer(lambda x: hidden_units(a, x, gate_up, self.bias))

    def _costs(self, _: str) -> Tensor:
        gate_up, down = self.weight("gate_up"), self.weight("down")
        count = blocks(len(gate_up), down.shape[1], self.common.block)
        found = gate_up.new_empty(count, len(gate_up) // count, len(gate_up) // count)
        for i in range(count):
            bias = None if self.bias is None else self.bias[i::count]
            found[i] = self._block(gate_up[i::count], bias, down[:, i::count])
        return found

    def _block(self, gate_up: Tensor, bias: Tensor | None, down: Tensor) -> Tensor:
        """The costs [B, B] of errors in the rows of some hidden units."""
        assert self.common.cost is not None
        a = self.common.attributes
        slopes = self.reaching.mean_outer(lambda x: gate_slopes(a, x, gate_up, bias))
        return slopes.mul_(_behind(down, self.common.cost, len(gate_up)))

    def _require_range(self, projection: str, moment: Tensor, output: Tensor | None) -> None:
        """Raise MoeccError unless float32 holds tr(S) |W|^2 tr(H); no error's cost is larger."""
        norm = torch.linalg.vector_norm(self.weight(projection), dtype=torch.float64).square()
        traces = [
            m.diagonal(dim1=-2, dim2=-1).sum(dtype=torch.float64)
            for m in (moment, output)
            if m is not None
        ]
        most = float(torch.stack([norm, *traces]).clamp(min=1).prod())
        if not most < _MOST:
            raise MoeccError(
                f"{self.path}.{projection}: squared errors of its output may reach {most:.0e} on "
                "the calibration text, more than float32 can add up; check the weights of this "
                "layer, and of those before it"
            )


@dataclass
class Moments:
    """What calibration learned of one MoE layer."""

    tokens: Tensor  # [E] routed tokens
    mass: Tensor  # [E] sum of their weights, over all tokens: how much of the layer an expert is
    starved: dict[int, int]  # expert -> tokens sent to it on purpose
    common: Common
    expert: Callable[[int], Expert]
    typical: Callable[[], Tensor]  # the mean of all experts' moments of gate_up, [D, D]
    notes: list[str] = field(default_factory=list)  # remarks on anything left out

    @property
    def weighted(self) -> bool:
        """Whether errors of the output have costs of their own."""
        return self.common.cost is not None

    def blocks(self, projection: Projection) -> int:
        """Blocks of rows whose errors count together; 0 if all channels count alike."""
        rows, units = projection.shape[1], projection.moe.sizes[3]
        if not self.weighted:
            return 0
        return blocks(rows, units if projection.input_side else rows, self.common.block)

    def of(self, projection: str, experts: Sequence[int] | None = None) -> Tensor:
        """The moments [n, K, K] of `gate_up` or `down` of some experts, by default of all."""
        chosen = range(len(self.tokens)) if experts is None else experts
        return torch.stack([self.expert(e).moment(projection) for e in chosen])

    def output_of(self, projection: str, experts: Sequence[int] | None = None) -> Tensor | None:
        """The costs [n, b, B, B] of errors in the output of `gate_up` or `down` of some experts.

        None if all channels count alike.
        """
        if not self.weighted:
            return None
        chosen = range(len(self.tokens)) if experts is None else experts
        found = (self.expert(e).output(projection) for e in chosen)
        return stacked([output for output in found if output is not None])


def evenly(count: int, most: int) -> Tensor:
    """Evenly spaced numbers below `count`, not more than `most`."""
    return torch.linspace(0, count - 1, min(count, most)).long()


def stacked(matrices: Sequence[Tensor]) -> Tensor:
    """Stack matrices of experts; a view if they share one."""
    first = matrices[0]
    if all(matrix is first for matrix in matrices):
        return first.expand(len(matrices), *first.shape)
    return torch.stack(list(matrices))


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
        """The tokens that chose `expert`, [n], in order."""
        if expert >= len(self._tokens):
            return self.index.new_empty(0)
        found: Tensor = self._tokens[expert].unique_consecutive()
        return found

    @cached_property
    def _tokens(self) -> tuple[Tensor, ...]:
        """The tokens of each expert's slots, in order."""
        slots = (self.weight != 0).flatten().nonzero().squeeze(-1)
        chosen = self.index.flatten()[slots]
        order = chosen.argsort(stable=True)
        counts: list[int] = torch.bincount(chosen).tolist()
        found: tuple[Tensor, ...] = (slots[order] // self.index.shape[1]).split(counts)
        return found

    def weight_of(self, expert: int, rows: Tensor) -> Tensor:
        """Routing weights [n] of `expert` on `rows`, 0 for a token that did not choose it."""
        return (self.weight[rows] * (self.index[rows] == expert)).sum(-1)


def routed_tokens(layer: Layer, moe: MoE, *, original: bool = False) -> Routed:
    """Tap the inputs of an experts node over all calibration batches.

    original: those in the float model, behind its earlier layers.
    """
    if original:
        moe = next(m for m in layer.reference.moe_layers() if m.path == moe.path)
    nodes = [n for n in (*moe.node.args[:3], moe.logits) if isinstance(n, fx.Node)]
    values = layer.tap([n.name for n in nodes], original=original)
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
    """Measure the inputs of a layer's experts, which must be dense.

    cost: the layer's sensitivity, [D, D]. squared: weight tokens by their squared routing weight;
    False: every token counts alike.
    """
    cost, notes = _usable(moe, cost)
    common = Common(moe.attributes, mean_outer(routed.x), cost)
    tokens, mass, starved = [], [], {}
    seen: list[tuple[Tensor, Tensor | None]] = []
    for e in range(moe.sizes[0]):
        rows = routed.rows(e)
        weight = routed.weight_of(e, rows).square() if squared else None
        seen.append((rows, weight))
        tokens.append(len(rows))
        mass.append(float(len(rows) if weight is None else weight.sum()) / len(routed.x))
        if len(rows) < (least := min(min_tokens, len(routed.x))):
            starved[e] = least
    if starved:
        notes.append(f"{moe.path}: {_starvation(tokens, starved, min_tokens)}")
    weights, made = _FloatExperts(layer, moe), [dict[str, Tensor]() for _ in tokens]

    def expert(e: int) -> Expert:
        rows, weight = seen[e]
        own = reaching = Seen(routed.x[rows], weight)
        if e in starved:
            reaching = Seen(routed.x[_sent(routed, e, min_tokens)], None)
        return Expert(common, moe.path, own, reaching, *weights.read(e), made[e])

    def typical() -> Tensor:
        counts, average = routed.x.new_zeros(len(routed.x)), 0.0
        for rows, weight in seen:
            share = _shrinkage(len(rows))
            own = torch.ones_like(rows, dtype=counts.dtype) if weight is None else weight
            counts[rows] += (1 - share) * own / own.sum().clamp(min=1e-30)
            average += share
        total = Seen(routed.x, counts).mean_outer(lambda x: x).mul_(counts.sum())
        return total.add_(common.average, alpha=average).div_(len(seen))

    device = routed.x.device
    counts = torch.tensor(tokens, device=device), torch.tensor(mass, device=device)
    return Moments(*counts, starved, common, expert, typical, notes)


class _FloatExperts:
    """The float weights of a layer's experts, as they are now, whatever becomes of the program."""

    def __init__(self, layer: Layer, moe: MoE):
        self.program = layer.program.copy()
        same = next(m for m in self.program.moe_layers() if m.path == moe.path)
        self.nodes = [same.operand(name) for name in ("gate_up", "down", "gate_up_bias")]

    def read(self, e: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """gate_up [N, D], down [D, F] and gate_up's bias [N] of one expert."""
        found = [None if n is None else self.program.value(n, [e])[0] for n in self.nodes]
        gate_up, down, bias = found
        assert gate_up is not None and down is not None
        return gate_up, down, None if bias is None else bias.float()


def _starvation(tokens: Sequence[int], starved: dict[int, int], least: int) -> str:
    """One remark for a layer, whose starved experts may be hundreds; the audit has each of them."""
    worst = min(starved, key=lambda e: tokens[e])
    who = f"{len(starved)} of {counted(len(tokens), 'expert')}"
    seen = f"fewer than {counted(least, 'routed token')}, expert {worst} only {tokens[worst]}"
    return f"{who} got {seen}; calibrated on {starved[worst]} sent to each on purpose"


def _usable(moe: MoE, cost: Tensor | None) -> tuple[Tensor | None, list[str]]:
    """The layer's sensitivity if errors of projections can be weighed by it, and remarks."""
    if cost is None or moe.operand("post_norm") is None:
        return cost, []
    why = "a norm stands between them and sensitivity"
    return None, [f"{moe.path}: errors of all channels count alike; {why}"]


def _shrinkage(tokens: int) -> float:
    """The part of the layer's average in the moment of an expert's inputs."""
    return SHRINKAGE / (tokens + SHRINKAGE)


def _behind(down: Tensor, cost: Tensor, rows: int) -> Tensor:
    """The costs of errors in some hidden units, for the rows that make them: [rows, rows].

    down: their columns. Gate and up rows move the same units, so the costs repeat for both.
    """
    return (down.T @ cost @ down).repeat(2, 2)[:rows, :rows]


def _sent(routed: Routed, expert: int, count: int) -> Tensor:
    """The tokens that the router scored highest here; evenly spaced ones without its logits."""
    count = min(count, len(routed.x))
    if routed.logits is None or routed.logits.shape[1] <= expert:
        return torch.linspace(0, len(routed.x) - 1, count).long()
    return routed.logits[:, expert].topk(count).indices


def hidden_units(a: Json, x: Tensor, gate_up: Tensor, bias: Tensor | None) -> Tensor:
    """Inputs [n, D] through one expert's first projection [N, D] and gate: [n, F].

    a: the op's attributes.
    """
    rows = torch.nn.functional.linear(x, gate_up, bias)
    return apply_gate(rows, a["act"], a["gate"], a["alpha"], a["limit"])


def gate_slopes(a: Json, x: Tensor, gate_up: Tensor, bias: Tensor | None) -> Tensor:
    """The derivative of each hidden unit by the rows of gate_up that make it: [n, D] -> [n, N].

    a: the op's attributes.
    """
    with torch.enable_grad():
        rows = torch.nn.functional.linear(x, gate_up, bias).detach().requires_grad_()
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
