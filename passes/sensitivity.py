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

Layer by layer, forward and backward, as `_whole` does; the experts' own weights aren't touched. Memory: one layer, the
activations between all layers for the batches that go through together, and S [D, D] per layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from moecc.base import Context, Pass, option
from moecc.ir import Program, run_nodes
from moecc.passes._block import output_logits
from moecc.passes._routing import boundary_nearness, selection_scores, standardized
from moecc.passes._whole import Values, Whole
from moecc.stream import free_memory

SHARPNESS = 4.0  # 1 / (standard deviations from the top-k boundary at which a score counts 1/e)


@dataclass(frozen=True, kw_only=True)
class MeasureSensitivity(Pass):
    name: ClassVar[str] = "sensitivity"
    after: ClassVar[frozenset[str]] = frozenset({"lora"})
    provides: ClassVar[frozenset[str]] = frozenset({"sensitivity"})
    needs_data: ClassVar[bool] = True
    kl: float = option(1.0, help="weight of the model's output; 0: not measured", low=0, high=1e4)
    routing: float = option(
        1.0, help="weight of the routers behind, relative to the output's; 0: not measured", low=0, high=1e4
    )
    tokens: int = option(8192, help="calibration tokens for each of both, at most", low=1, high=1 << 30)

    def run(self, program: Program, ctx: Context) -> bool:
        assert ctx.reference is not None
        found = {k: Gradients(ctx.reference, k, ctx) for k in ("kl", "routing") if getattr(self, k)}
        for i, (kind, gradients) in enumerate(found.items()):
            gradients.measure(self.chosen(list(ctx.batches), i, len(found)), f"sensitivity {kind}")
        ctx.sensitivity = combined({k: g.means() for k, g in found.items()}, {"kl": self.kl, "routing": self.routing})
        return False

    def chosen(self, batches: list[Tensor], turn: int, of: int) -> list[Tensor]:
        """Every `of`-th batch, up to `tokens` tokens (one batch at least)."""
        taken = batches[turn::of] or batches
        return taken[: max(1, self.tokens // taken[0].numel())]


def combined(means: dict[str, dict[str, Tensor]], weights: dict[str, float]) -> dict[str, Tensor]:
    """Step 2's sum, by path of an MoE layer and by name of a value between layers."""
    kl, routing = means.get("kl", {}), means.get("routing", {})
    factor = weights["routing"]
    if kl and routing:
        both = kl.keys() & routing.keys()
        size = {k: sum(float(m[n].trace()) for n in both) for k, m in means.items()}
        factor *= weights["kl"] * size["kl"] / max(size["routing"], 1e-30)
    found = {n: weights["kl"] * s for n, s in kl.items()}
    for n, s in routing.items():
        found[n] = found[n] + factor * s if n in found else factor * s
    return found


class Gradients:
    """Outer products of one kind of gradient, summed over tokens, by path of an MoE layer and by name of a value between layers."""

    def __init__(self, program: Program, kind: str, ctx: Context):
        self.kind, self.ctx = kind, ctx
        self.experts = {m.node.name: m.path for m in program.moe_layers()}
        self.routers = {selection_scores(m).name: m.top_k for m in program.moe_layers() if m.logits is not None}
        self.whole = Whole(program, set(self.experts), watch=self.routers)
        self.has_head = output_logits(program) is not None
        self.generator = torch.Generator().manual_seed(ctx.seed_for("sensitivity", kind))
        self.sums: dict[str, Tensor] = {}
        self.tokens: dict[str, int] = {}

    def means(self) -> dict[str, Tensor]:
        return {k: s / self.tokens[k] for k, s in self.sums.items()}

    def measure(self, batches: list[Tensor], label: str) -> None:
        for group in self.ctx.progress(list(self._groups(batches)), label):
            self._backward(group)

    def _groups(self, batches: list[Tensor]) -> Iterator[list[Tensor]]:
        """Batches one by one; where the weights are read anew each time, as many together as memory holds activations of."""
        step = 1
        if not self.whole.keep:
            alive = {n.name: n.meta["val"] for s in self.whole.stages for n in s}
            width = sum(
                alive[k].shape[-1] for names in self.whole.alive for k in names if k in alive and alive[k].ndim > 2
            )
            step = max(1, free_memory() // 4 // max(1, 4 * width * batches[0].numel()))
        for i in range(0, len(batches), step):
            yield batches[i : i + step]

    def _backward(self, batches: list[Tensor]) -> None:
        """Add the gradients of some batches; a layer's weights are read once for all of them on either way."""
        whole, last = self.whole, self.whole.program.layers - 1
        kept: list[list[Values]] = [[{whole.input: ids} for ids in batches]]
        with torch.no_grad():
            for stage in range(last):
                weights = whole.weights(stage)
                kept.append([self._run(stage, values, weights)[0] for values in kept[-1]])
        after: list[dict[str, Tensor]] = [{} for _ in batches]  # gradients of what is alive after the stage
        for stage in reversed(range(last + 1)):
            weights = whole.weights(stage)
            after = [self._pull(stage, v, weights, g) for v, g in zip(kept.pop(), after, strict=True)]

    def _pull(self, stage: int, values: Values, weights: Any, after: dict[str, Tensor]) -> dict[str, Tensor]:
        """The gradients of what enters a stage, from those of what leaves it and the losses inside; both are summed up."""
        for name, grad in after.items():
            self._add(name, grad)
        leaves = self.whole.leaves(values)
        entering = {k: v for k, v in leaves.items() if isinstance(v, Tensor) and v.requires_grad}
        with torch.enable_grad():
            found, probes = self._run(stage, leaves, weights)
            ends = [found[k] for k in after]
            losses = [x for x in self._losses(stage, found) if x.requires_grad]
        inputs = {**entering, **probes}
        if not inputs or not (ends or losses):
            return {}
        grads = torch.autograd.grad(
            [*ends, *losses], list(inputs.values()), [*after.values(), *map(torch.ones_like, losses)], allow_unused=True
        )
        reached = {k: g for k, g in zip(inputs, grads, strict=True) if g is not None}
        for name in probes.keys() & reached.keys():
            self._add(self.experts[name], reached[name])
        return {k: g for k, g in reached.items() if k in entering}

    def _run(self, stage: int, values: Values, weights: Any) -> tuple[Values, dict[str, Tensor]]:
        """What is alive after a stage or watched inside; and zeros added to the experts' outputs, to take gradients of."""
        here, probes = dict(values), {}
        wanted = self.whole.alive[stage] | self.whole.watched[stage]
        for node, value in run_nodes(self.whole.stages[stage], here, weights, keep=wanted):
            if node.name in self.experts and torch.is_grad_enabled():
                probes[node.name] = torch.zeros_like(value).requires_grad_()
                here[node.name] = value + probes[node.name]
        return {k: v for k, v in here.items() if k in wanted}, probes

    def _losses(self, stage: int, values: Values) -> Iterator[Tensor]:
        if self.kind == "routing":
            for name in sorted(self.whole.watched[stage]):
                if values[name].requires_grad:
                    yield self._decisions(values[name].flatten(0, -2).float(), self.routers[name])
        elif stage == self.whole.program.layers - 1:
            yield self._output(values[self.whole.output].flatten(0, -2).float())

    def _output(self, output: Tensor) -> Tensor:
        """kl's loss, summed over tokens."""
        if not self.has_head:
            return (output * self._noise(output)).sum()
        drawn = torch.multinomial(output.detach().softmax(-1), 1, generator=self.generator).squeeze(-1)
        return F.cross_entropy(output, drawn, reduction="sum")

    def _decisions(self, scores: Tensor, top_k: int) -> Tensor:
        """One router's part of routing's loss, summed over tokens."""
        s, t = standardized(scores, scores.detach())
        return (self._noise(s) * boundary_nearness(t, top_k, SHARPNESS).sqrt() * s).sum()

    def _noise(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=self.generator, dtype=like.dtype)

    def _add(self, key: str, gradient: Tensor) -> None:
        g = gradient.flatten(0, -2).float()
        self.sums[key] = self.sums.get(key, torch.zeros(())) + g.T @ g
        self.tokens[key] = self.tokens.get(key, 0) + len(g)
