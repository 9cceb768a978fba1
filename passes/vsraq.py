"""VSRAQ: tune compressed experts until the routers behind choose as before.  arXiv 2606.05688.

  1. Code all layers before the first is tuned, so that codes and bits do not depend on tuning. A
     layer's block runs behind the compressed and tuned earlier layers. Its target is the float
     model's own output of that layer.
  2. Train codebooks and coefficients (rounded on the way, straight-through), row scales, biases and
     bases by Adam on
         reconstruction * error of the block's output, weighted by `sensitivity`
       + value * sensitivity-weighted alignment of the next router's scores
       + order * alignment of the order of its chosen experts
       + boundary * alignment of its top-k boundary
       + head * divergence of the logits, in the last layer with experts: no router is behind it
     (`_tune.routing`, `_tune.block`). Each term is divided by its value before tuning, so that
     weights mean the same on any model; 0 switches a term off.
  3. Hold out an eighth of the calibration batches, at least one. Keep the state with the least
     held-out loss, the start included, so tuning never makes a layer worse on text it did not see.

Cost in bits per weight and at inference: none, because tensors keep their shapes and types.

Not done: codes stay as they are. Choosing some again by the objective's gradient was tried: it took
twice the time and saved a twentieth of the flips.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from moecc.ir.ops import VQ_EXPERTS
from moecc.options import option
from moecc.passes._code.machinery import coding_by
from moecc.passes._tune.block import Block
from moecc.passes._tune.experts import graph_bytes
from moecc.passes._tune.tuned import Tuned, split
from moecc.pipeline.estimate import Estimate
from moecc.pipeline.passes import Context, Layer, LayerPass
from moecc.pipeline.work import DECODE, Scope, Work


@dataclass(frozen=True, kw_only=True)
class AlignRouting(LayerPass):
    name: ClassVar[str] = "vsraq"
    requires: ClassVar[frozenset[str]] = frozenset({"folded", "sensitivity"})
    provides: ClassVar[frozenset[str]] = frozenset({"routing"})
    needs_data: ClassVar[bool] = True
    own_round: ClassVar[bool] = True
    steps: int = option(120, help="optimizer steps per layer", low=1, high=100_000)
    batches: int = option(1, help="calibration batches per step", low=1, high=4096)
    lr: float = option(1.0, help="factor on all learning rates", low=1e-4, high=100)
    reconstruction: float = option(1.0, help="weight of the block's output", low=0, high=1e4)
    value: float = option(2.0, help="weight of router value alignment", low=0, high=1e4)
    order: float = option(0.2, help="weight of expert order alignment", low=0, high=1e4)
    boundary: float = option(0.6, help="weight of top-k boundary alignment", low=0, high=1e4)
    head: float = option(1.0, help="weight of the logits, behind the last experts", low=0, high=1e4)

    def estimate(self, found: Estimate) -> None:
        return None

    def work(self, scope: Scope) -> Work:
        done, step = Work(), self.batches * scope.row
        held_out = max(scope.tokens / 8, scope.row)
        for layer in scope.layers:
            chosen, around = layer.top_k * layer.weights, scope.around
            # both models go through the layer, and both on to the next router
            done.here += scope.tokens * (2 * chosen + 4 * around)
            done.here += (3 * self.steps * step + 4 * held_out) * (chosen + around)
            times = self.steps + 4 * held_out / scope.row
            done.here += times * layer.experts * layer.weights * DECODE
        done.memory = scope.states + graph_bytes(scope, step, head=self.head > 0)
        return done

    def machinery(self, device: torch.device) -> str:
        return coding_by(device)

    def run_layer(self, layer: Layer, ctx: Context) -> bool:
        found = [m for m in layer.moe if m.node.target is VQ_EXPERTS]
        if not found:
            return False
        tuned = Tuned(layer.program, found)
        block = Block(layer, self.routing(), ctx.data["sensitivity"], head=self.head > 0)
        before, after = _Run(self, block, tuned, ctx).train()
        for moe in found:
            for projection in moe.projections:
                ctx.record(projection.path, tuned={"before": before, "after": after})
        return tuned.store()

    def routing(self) -> list[str]:
        """The routing terms that are switched on."""
        return [k for k in ("value", "order", "boundary") if getattr(self, k)]


class _Run:
    """The tuning of one layer."""

    def __init__(self, options: AlignRouting, block: Block, tuned: Tuned, ctx: Context):
        self.options, self.block, self.tuned, self.ctx = options, block, tuned, ctx
        self.rows, self.held_out = split(len(block.inputs))
        self.generator = torch.Generator().manual_seed(ctx.seed_for("vsraq", block.layer.index))
        self.terms = block.losses(self.held_out, tuned.stored())
        self.scale = {
            k: getattr(options, k) / max(v, 1e-12) for k, v in self.terms.items() if k != "flips"
        }
        self.best, self.least = tuned.state(), self.total(self.terms)

    def total(self, terms: dict[str, float]) -> float:
        """The loss; flips are reported, not trained on."""
        return float(sum(self.scale[k] * v for k, v in terms.items() if k != "flips"))

    def train(self) -> tuple[dict[str, float], dict[str, float]]:
        """Steps 2 and 3, with a rate that falls to zero; return held-out terms before and after."""
        before, steps = self.terms, self.options.steps
        optimizer = torch.optim.Adam(self.tuned.groups(self.options.lr), betas=(0.9, 0.95))
        rates = [g["lr"] for g in optimizer.param_groups]
        for step in self.ctx.progress(range(steps), f"vsraq layer {self.block.layer.index - 1}"):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * (1 - step / steps)
            self.backward()
            optimizer.step()
            optimizer.zero_grad()
            if (step + 1) % max(steps // 3, 1) == 0 or step + 1 == steps:
                self.keep_if_better()
        self.tuned.restore(self.best)
        return before, self.terms

    def backward(self) -> None:
        """Add the gradient of the loss on batches drawn at random."""
        count = min(self.options.batches, len(self.rows))
        drawn = torch.randint(len(self.rows), (count,), generator=self.generator).tolist()
        with torch.enable_grad():
            terms = self.block.terms([self.rows[i] for i in drawn], self.tuned.rounded())
            losses = [self.scale[k] * v for k, v in terms.items() if k != "flips"]
            torch.stack(losses).sum().backward()

    def keep_if_better(self) -> None:
        """Note the state if it has the least held-out loss so far."""
        terms = self.block.losses(self.held_out, self.tuned.stored())
        if self.total(terms) < self.least:
            self.best, self.least, self.terms = self.tuned.state(), self.total(terms), terms
