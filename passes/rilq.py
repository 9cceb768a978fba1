"""RILQ: all layers together make up for the rest of the error.  arXiv 2412.01129.

  1. Every float matrix that each token meets in a decoder layer (attention, shared expert; no
     router, no gate: `_tune.linears`) gets an adapter W + B A of `rank` rows, with B zero at first.
     `merge` folds the adapters in afterwards, so they cost no bits.
  2. The experts' adapters are their stored tensors: coefficients in the shared basis, the basis,
     codebooks, scales and biases are trained in their stored form (`_tune.tuned`), so that merging
     them is exact and free. Codes stay.
  3. Train all of them by Adam on a loss of the whole model (`_tune.model_loss`):
         hidden * |h - h_float|^2 / |h_float|^2 of the last hidden state (the paper's model loss)
       + lm * -log p(next token of the calibration text) (the paper's language-model loss; by
         default it has no weight)
       + kl * KL(float model || program) of the next token (ours: keep the model, not the text)
       + routing * misalignment of every router's scores (`_tune.routing`: value and boundary; ours:
         no gain may be bought with flips)
     hidden, kl and routing are relative to their values before training. A model without a head has
     no lm and no kl. One layer's graph is in memory at a time (`_tune.whole`).
  4. Hold out an eighth of the calibration batches, and check their loss ten times
     (`_tune.training`). Keep the state with the least held-out loss, the start included. Stop once
     `patience` checks in a row bring no better state; by default never, because the best state
     comes late, as rates fall to zero (behind `vsraq`, on the example, the first better one came at
     the ninth of ten checks). An interrupted run goes on from its last check.

Shapes: W [N, K], A [rank, K], B [N, rank]. Cost in bits per weight: none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from moecc.errors import MoeccError
from moecc.ir.program import Program
from moecc.options import option
from moecc.passes._code.machinery import coding_by
from moecc.passes._tune.block import output_logits
from moecc.passes._tune.experts import graph_bytes
from moecc.passes._tune.model_loss import ModelLoss
from moecc.passes._tune.trained import Trained
from moecc.passes._tune.training import Training
from moecc.pipeline.estimate import Estimate
from moecc.pipeline.passes import Context, Pass
from moecc.pipeline.work import DECODE, Scope, Work

# copies of what is trained: its units, gradients, Adam's two, the best state and the present one
_TRAINED = 7


@dataclass(frozen=True, kw_only=True)
class ModelLossAdapters(Pass):
    name: ClassVar[str] = "rilq"
    requires: ClassVar[frozenset[str]] = frozenset({"folded"})
    after: ClassVar[frozenset[str]] = frozenset({"routing"})
    provides: ClassVar[frozenset[str]] = frozenset({"adapters"})
    leads_to: ClassVar[frozenset[str]] = frozenset({"merged"})
    needs_data: ClassVar[bool] = True
    rank: int = option(
        16, help="rows of each adapter; 0: none, only the experts' own tensors", low=0, high=4096
    )
    experts: bool = option(True, help="train the experts' stored tensors too")
    steps: int = option(300, help="optimizer steps at most", low=1, high=100_000)
    batches: int = option(1, help="calibration batches per step", low=1, high=4096)
    lr: float = option(1.0, help="factor on all learning rates", low=1e-4, high=100)
    hidden: float = option(1.0, help="weight of the last hidden state", low=0, high=1e4)
    kl: float = option(
        1.0, help="weight of the divergence from the float model's next token", low=0, high=1e4
    )
    lm: float = option(0.0, help="weight of the calibration text's own next token", low=0, high=1e4)
    routing: float = option(1.0, help="weight of all routers' alignment", low=0, high=1e4)
    patience: int = option(
        10,
        help="stop after this many of the 10 checks in a row without a better held-out loss; "
        "10: never",
        low=1,
        high=10,
    )

    def estimate(self, found: Estimate) -> None:
        return None

    def work(self, scope: Scope) -> Work:
        held_out = max(scope.tokens / 8, scope.row)
        rows = self.steps * self.batches + 11 * held_out / scope.row
        done = Work(here=(4 * self.steps * self.batches * scope.row) * scope.forward)
        done.here += 12 * held_out * scope.forward  # the float model's, once
        done.here += rows * scope.weights * DECODE
        done.memory = self._memory(scope)
        return done

    def _memory(self, scope: Scope) -> float:
        """Bytes of the float model's targets, of what is trained, and of one layer's graph."""
        scores = sum(layer.experts for layer in scope.layers)  # of a token
        targets = scope.tokens * (scope.hidden + scores)
        between = scope.row * scope.hidden * len(scope.layers)
        tuned = sum(layer.experts * (layer.rows + layer.hidden) for layer in scope.layers)
        adapters = self.rank * 8 * scope.hidden * len(scope.layers)  # of four matrices in each
        trained = _TRAINED * (tuned * self.experts + adapters)
        return 4 * (targets + between + trained) + graph_bytes(scope, scope.row, head=True)

    def machinery(self, device: torch.device) -> str:
        return coding_by(device)

    def run(self, program: Program, ctx: Context) -> bool:
        if not (self.hidden or self.kl or self.lm):
            raise MoeccError("rilq: hidden, kl and lm are all 0; give one of them a weight")
        has_head = output_logits(program) is not None
        if not has_head:
            if not self.hidden:
                raise MoeccError(
                    "rilq: the model gives no logits, so kl and lm can't be measured; "
                    "give hidden a weight"
                )
            ctx.notes.append(
                "rilq: the model gives no logits of its vocabulary; "
                "kl and lm are left out of the loss"
            )
        trained = Trained(program, ctx, rank=self.rank, experts=self.experts, lr=self.lr)
        if not trained.parameters:
            return False
        weights = {"hidden": self.hidden, "kl": self.kl, "lm": self.lm, "routing": self.routing}
        loss = ModelLoss(program, trained, ctx, weights, has_head=has_head)
        training = Training(loss, ctx, self.steps, self.batches, self.patience)
        before, after = training.run()
        for moe in program.moe_layers():
            for projection in moe.projections:
                ctx.record(projection.path, rilq={"before": before, "after": after})
        return trained.store(better=after["loss"] < before["loss"])
