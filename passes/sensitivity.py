"""What an error in a layer's output does to the model: the metric that coding and tuning work under.

  1. On calibration text, for the float model: gradients g of what is to be kept, with respect to the experts' outputs and to what
     leaves each layer. Their mean outer product S = E[g g^T] turns a small error d into d^T S d:
       kl       g of -log p(y), y drawn from the model itself: S is the Fisher information, d^T S d / 2 the divergence
                KL(float || changed) of the next token (second order; Martens, arXiv 1412.1193, 9.2). A model without a head
                gives its last hidden state instead: g of z . h, z standard normal, d^T S d the squared change of h
       routing  g of sum_r z . sqrt(q) s, all routers r behind, s their scores in standard deviations, z standard normal, q the
                nearness of a score to the top-k boundary: d^T S d is how far the scores that decide are moved (VSRAQ's
                sensitivity, arXiv 2606.05688, to second order)
  2. kl is measured on even calibration batches and routing on odd ones, up to `tokens` tokens of each; routing is scaled to
     weigh `routing` times what kl does over all layers that have a router behind them.

Layer by layer, forward and backward, as `_tune.whole` does. Memory: one layer, the activations between all layers for the batches that
go through together, and while a kind is measured two S [D, D] per layer, one for the experts and one for what leaves the layer;
a kind that is measured is kept on disk. Where the weights don't stay in memory, batches go together, and a layer is read once for
all of them.
Not measured: routers whose scores the trace does not show, and routers that choose all experts; the audit's notes name them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from moecc.checkpoint.memory import free_memory
from moecc.ir.program import Program
from moecc.options import option
from moecc.passes._tune.block import output_logits
from moecc.passes._tune.routing import boundary_nearness, selection_scores, standardized
from moecc.passes._tune.whole import Values, Whole
from moecc.pipeline.estimate import Estimate
from moecc.pipeline.passes import Context, Kept, Pass
from moecc.pipeline.stream import StageWeights, first_tokens

SHARPNESS = 4.0  # 1 / (standard deviations from the top-k boundary at which a score counts 1/e)


@dataclass(frozen=True, kw_only=True)
class MeasureSensitivity(Pass):
    name: ClassVar[str] = "sensitivity"
    after: ClassVar[frozenset[str]] = frozenset({"lora"})
    provides: ClassVar[frozenset[str]] = frozenset({"sensitivity"})
    needs_data: ClassVar[bool] = True
    kl: float = option(1.0, help="weight of the model's output; 0: not measured", low=0, high=1e4)
    routing: float = option(
        1.0,
        help="weight of the routers behind, relative to the output's; 0: not measured",
        low=0,
        high=1e4,
    )
    tokens: int = option(
        8192, help="calibration tokens for each of both, at most", low=1, high=1 << 30
    )

    def estimate(self, found: Estimate) -> None:
        return None

    def run(self, program: Program, ctx: Context) -> bool:
        assert ctx.reference is not None
        gradients = Gradients(ctx.reference, ctx)
        kinds = [k for k in ("kl", "routing") if getattr(self, k)]
        means: dict[str, Mapping[str, Tensor]] = {}
        for i, kind in enumerate(kinds):
            batches = first_tokens(ctx.batches[i :: len(kinds)] or ctx.batches, self.tokens)
            means[kind] = ctx.once(
                f"sensitivity {kind}", partial(gradients.measure, kind, batches)
            ).tensors
        ctx.data["sensitivity"] = Combined(
            means.get("kl", {}), means.get("routing", {}), self.kl, self.routing
        )
        return False


class Combined(Mapping[str, Tensor]):
    """Step 2's sum, by path of an MoE layer and by name of a value between layers; added up when it is asked for."""

    def __init__(
        self,
        kl: Mapping[str, Tensor],
        routing: Mapping[str, Tensor],
        kl_weight: float,
        routing_weight: float,
    ):
        self.kl, self.routing, self.kl_weight = kl, routing, kl_weight
        both = sorted(kl.keys() & routing.keys())
        sizes = [sum(float(m[n].trace()) for n in both) for m in (kl, routing)]
        self.factor = routing_weight * (
            sizes[0] / sizes[1] * kl_weight if both and sizes[1] > 0 else 1.0
        )

    def __iter__(self) -> Iterator[str]:
        return iter([*self.kl, *(n for n in self.routing if n not in self.kl)])

    def __len__(self) -> int:
        return len(self.kl.keys() | self.routing.keys())

    def __contains__(self, name: object) -> bool:
        return name in self.kl or name in self.routing

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.kl:
            return self.routing[name] * self.factor
        found = self.kl[name] * self.kl_weight
        return found.add_(self.routing[name], alpha=self.factor) if name in self.routing else found


class Gradients:
    """Mean outer products of gradients over tokens, by path of an MoE layer and by name of a value between layers."""

    def __init__(self, program: Program, ctx: Context):
        self.ctx = ctx
        found = program.moe_layers()
        self.experts = {m.node.name: m.path for m in found}
        self.first = min((m.layer for m in found), default=0)
        self.routers: dict[str, int] = {}
        for moe in found:
            if moe.logits is None:
                ctx.notes.append(
                    f"{moe.path}: the trace shows no scores of its router; sensitivity leaves it out"
                )
                continue
            scores = selection_scores(moe)
            if (
                moe.top_k < scores.meta["val"].shape[-1]
            ):  # a router that takes all has nothing to decide
                self.routers[scores.name] = moe.top_k
        self.layers = {
            n.name: n.meta["layer"] for n in program.graph.nodes if n.op == "call_function"
        }
        self.whole = Whole(program, set(self.experts), watch=self.routers)
        self.has_head = output_logits(program) is not None
        if not self.has_head:
            ctx.notes.append(
                "the model gives no logits of its vocabulary; sensitivity is that of its last hidden state"
            )

    def measure(self, kind: str, batches: list[Tensor]) -> Kept:
        """S of one kind, by path and name."""
        self.kind = kind
        self.sums: dict[str, Tensor] = {}
        self.tokens: dict[str, int] = {}
        last = self.whole.program.layers - 1
        self.top = (
            max((self.layers[r] for r in self.routers), default=0) if kind == "routing" else last
        )
        if self.top >= self.first:
            step = self._together(batches[0])
            starts = self.ctx.progress(range(0, len(batches), step), f"sensitivity {kind}")
            for i in starts:
                self._backward(i, batches[i : i + step])
        return Kept({k: s.div_(self.tokens[k]) for k, s in self.sums.items()})

    def _together(self, batch: Tensor) -> int:
        """Batches at a time: one, or where the weights are read anew each time as many as memory holds activations of."""
        if self.whole.keep:
            return 1
        kept = self.whole.forward(batch, lambda wanted: {})
        size = sum(
            v.numel() * v.element_size()
            for values in kept
            for v in values.values()
            if isinstance(v, Tensor)
        )
        return max(1, free_memory() // 4 // max(1, size))

    def _backward(self, start: int, batches: list[Tensor]) -> None:
        """Add the gradients of batches start, start + 1, ...; a layer's weights are read once for all of them on either way."""
        kept: list[list[Values]] = [[{self.whole.input: ids} for ids in batches]]
        with torch.no_grad():
            for stage in range(self.top):
                weights = self.whole.weights(stage)
                kept.append([self.whole.run_with(weights, stage, values) for values in kept[-1]])
        after: list[dict[str, Tensor]] = [
            {} for _ in batches
        ]  # gradients of what is alive after the stage
        for stage in range(self.top, self.first - 1, -1):
            weights, entering = self.whole.weights(stage), kept.pop()
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
        """The gradients of what enters a stage, from those of what leaves it and the losses inside; both are summed up."""
        for name, grad in after.items():
            if (
                self.layers[name] == stage
            ):  # else it only passes by, and this is its gradient in part
                self._add(name, grad)
        leaves = self.whole.leaves(values)
        entering = {k: v for k, v in leaves.items() if isinstance(v, Tensor) and v.requires_grad}
        probes: dict[str, Tensor] = {}  # zeros added to the experts' outputs, to take gradients of

        def probed(name: str, value: Any) -> Any:
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
                    yield self._decisions(
                        values[name].flatten(0, -2).float(),
                        self.routers[name],
                        self._draw(batch, name),
                    )
        elif stage == self.top:
            yield self._output(
                values[self.whole.output].flatten(0, -2).float(), self._draw(batch, "output")
            )

    def _draw(self, batch: int, name: str) -> torch.Generator:
        """Random numbers that do not depend on which batches go through together."""
        return torch.Generator().manual_seed(
            self.ctx.seed_for("sensitivity", self.kind, batch, name)
        )

    def _output(self, output: Tensor, draw: torch.Generator) -> Tensor:
        """kl's loss, summed over tokens."""
        if not self.has_head:
            return (output * torch.randn(output.shape, generator=draw)).sum()
        labels = torch.multinomial(output.detach().softmax(-1), 1, generator=draw).squeeze(-1)
        return F.cross_entropy(output, labels, reduction="sum")

    def _decisions(self, scores: Tensor, top_k: int, draw: torch.Generator) -> Tensor:
        """One router's part of routing's loss, summed over tokens."""
        s, t = standardized(scores, scores.detach())
        return (
            torch.randn(s.shape, generator=draw) * boundary_nearness(t, top_k, SHARPNESS).sqrt() * s
        ).sum()

    def _add(self, key: str, gradient: Tensor) -> None:
        g = gradient.flatten(0, -2).float()
        outer = g.T @ g
        self.sums[key] = self.sums[key].add_(outer) if key in self.sums else outer
        self.tokens[key] = self.tokens.get(key, 0) + len(g)
