"""Mean outer products of gradients with respect to layers' outputs, layer by layer.

This is step 1 of `sensitivity`: S = E[g g^T] [D, D] over tokens, for the outputs of the experts and
for the values between layers.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from moecc.checkpoint.memory import free_memory
from moecc.errors import MoeccError
from moecc.ir.moe import MoE
from moecc.ir.program import Program
from moecc.passes._tune.block import output_logits
from moecc.passes._tune.routing import boundary_nearness, selection_scores, standardized
from moecc.passes._tune.whole import Values, Whole
from moecc.pipeline.passes import Context, Kept
from moecc.pipeline.stream import StageWeights, require_numbers
from moecc.types import Value

SHARPNESS = 4.0  # 1 / (standard deviations from the top-k boundary at which a score counts 1/e)

_MOST = 1e30  # that squares may add up to: products of them must fit into float32 too


class Gradients:
    """Measures S by path of an MoE layer and by name of a value between layers."""

    def __init__(self, program: Program, ctx: Context):
        self.ctx = ctx
        found = program.moe_layers()
        self.experts = {m.node.name: m.path for m in found}
        self.first = min((m.layer for m in found), default=0)
        self.routers = _routers(found, ctx)
        self.layers = {
            n.name: n.meta["layer"] for n in program.graph.nodes if n.op == "call_function"
        }
        self.whole = Whole(program, set(self.experts), watch=self.routers)
        self.has_head = output_logits(program) is not None
        if not self.has_head:
            ctx.notes.append(
                "the model gives no logits of its vocabulary; "
                "sensitivity is that of its last hidden state"
            )

    def measure(self, kind: str, batches: list[Tensor]) -> Kept:
        """S of one kind, kl or routing, on token ids of equally large batches.

        Raise MoeccError if the model's numbers leave the range of float32.
        """
        self.kind = kind
        self.sums: dict[str, Tensor] = {}
        self.tokens: dict[str, int] = {}
        last = self.whole.program.layers - 1
        highest = max((self.layers[r] for r in self.routers), default=0)
        self.top = highest if kind == "routing" else last
        if self.top >= self.first:
            step = self._together(batches[0])
            starts = self.ctx.progress(range(0, len(batches), step), f"sensitivity {kind}")
            for i in starts:
                self._backward(i, batches[i : i + step])
        for name, total in self.sums.items():
            if not float(total.trace()) < _MOST:
                layer = self.layers.get(name)
                where = name if layer is None else f"the output of layer {layer - 1}"
                raise MoeccError(
                    f"{where}: squared gradients of {kind} there reach {float(total.trace()):.0e}, "
                    "more than float32 can add up; check the weights of the layers behind it"
                )
        return Kept({k: s.div_(self.tokens[k]) for k, s in self.sums.items()})

    def _together(self, batch: Tensor) -> int:
        """Batches at a time.

        One, or as many as memory holds activations of if the weights are read anew each time.
        """
        if self.whole.kept is not None:
            return 1
        kept = self.whole.forward(batch, lambda wanted: {})
        tensors = [v for values in kept for v in values.values() if isinstance(v, Tensor)]
        size = sum(v.numel() * v.element_size() for v in tensors)
        return max(1, free_memory() // 4 // max(1, size))

    def _backward(self, start: int, batches: list[Tensor]) -> None:
        """Add the gradients of batches start, start + 1, ...

        A layer's weights are read once for all of them, forward and again backward.
        """
        kept: list[list[Values]] = [[{self.whole.input: ids} for ids in batches]]
        with torch.no_grad():
            for stage in range(self.top):
                weights = self.whole.weights()
                kept.append([self.whole.run_with(weights, stage, values) for values in kept[-1]])
        # gradients of the values that are alive after the stage
        after: list[dict[str, Tensor]] = [{} for _ in batches]
        for stage in range(self.top, self.first - 1, -1):
            weights, entering = self.whole.weights(), kept.pop()
            for i, values in enumerate(entering):
                after[i] = self._pull(stage, start + i, values, weights, after[i])

    def _pull(
        self,
        stage: int,
        batch: int,
        values: Values,
        weights: StageWeights,
        after: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        """Pull gradients `after` a stage, and those of losses inside it, back to its inputs.

        Adds the gradients of the stage's results and of its experts' outputs to the sums.
        """
        for name, grad in after.items():
            if self.layers[name] == stage:  # else the value passes by, and this is only a part
                self._add(name, grad)
        leaves = self.whole.leaves(values)
        entering = {k: v for k, v in leaves.items() if isinstance(v, Tensor) and v.requires_grad}
        probes: dict[str, Tensor] = {}  # zeros added to the experts' outputs, to take gradients of

        def probed(name: str, value: Value) -> Value:
            if name not in self.experts:
                return value
            probes[name] = torch.zeros_like(value).requires_grad_()
            return value + probes[name]

        with torch.enable_grad():
            found = self.whole.run_with(weights, stage, leaves, probed)
            reached = [k for k in after if found[k].requires_grad]
            losses = [x for x in self._losses(stage, batch, found) if x.requires_grad]
        inputs = {**entering, **probes}
        if not inputs or not (reached or losses):
            return {}
        ends = [*(found[k] for k in reached), *losses]
        starts = [*(after[k] for k in reached), *map(torch.ones_like, losses)]
        grads = torch.autograd.grad(ends, list(inputs.values()), starts, allow_unused=True)
        given = {k: g for k, g in zip(inputs, grads, strict=True) if g is not None}
        for name in probes.keys() & given.keys():
            self._add(self.experts[name], given[name])
        return {k: g for k, g in given.items() if k in entering}

    def _losses(self, stage: int, batch: int, values: Values) -> Iterator[Tensor]:
        if self.kind == "routing":
            for name in self.whole.watched[stage]:
                if values[name].requires_grad:
                    scores, draw = values[name].flatten(0, -2).float(), self._draw(batch, name)
                    yield self._decisions(scores, self.routers[name], draw)
        elif stage == self.top:
            output = values[self.whole.output].flatten(0, -2).float()
            require_numbers(output, "what the head gives")
            yield self._output(output, self._draw(batch, "output"))

    def _draw(self, batch: int, name: str) -> torch.Generator:
        """Random numbers that do not depend on which batches go through together."""
        seed = self.ctx.seed_for("sensitivity", self.kind, batch, name)
        return torch.Generator().manual_seed(seed)

    def _output(self, output: Tensor, draw: torch.Generator) -> Tensor:
        """kl's loss, summed over tokens: output [T, vocabulary], or [T, D] without a head."""
        if not self.has_head:
            return (output * torch.randn(output.shape, generator=draw)).sum()
        labels = torch.multinomial(output.detach().softmax(-1), 1, generator=draw).squeeze(-1)
        return F.cross_entropy(output, labels, reduction="sum")

    def _decisions(self, scores: Tensor, top_k: int, draw: torch.Generator) -> Tensor:
        """One router's part of routing's loss, summed over tokens: scores [T, E]."""
        s, t = standardized(scores, scores.detach())
        nearness = boundary_nearness(t, top_k, SHARPNESS)
        return (torch.randn(s.shape, generator=draw) * nearness.sqrt() * s).sum()

    def _add(self, key: str, gradient: Tensor) -> None:
        g = gradient.flatten(0, -2).float()
        outer = g.T @ g
        self.sums[key] = self.sums[key].add_(outer) if key in self.sums else outer
        self.tokens[key] = self.tokens.get(key, 0) + len(g)


def _routers(found: list[MoE], ctx: Context) -> dict[str, int]:
    """Top-k by name of the scores that it looks at, for routers that have something to decide."""
    routers: dict[str, int] = {}
    for moe in found:
        if moe.logits is None:
            why = "the trace shows no scores of its router; sensitivity leaves it out"
            ctx.notes.append(f"{moe.path}: {why}")
            continue
        scores = selection_scores(moe)
        if moe.top_k < scores.meta["val"].shape[-1]:  # else it takes all experts
            routers[scores.name] = moe.top_k
    return routers
