"""The loss of the whole model that `rilq` trains under: hidden, kl, lm and routing.

    hidden   |h - h_float|^2 / |h_float|^2 of the last hidden state
    kl       KL(float model || program) of the next token, in nats per token
    lm       -log p(next token of the calibration text), in nats per token
    routing  mean over routers of the value and the boundary loss of their scores (`routing`)

All but lm are divided by their values before training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from moecc.ir.program import Program
from moecc.ir.relative import relative
from moecc.passes._tune.divergence import divergence
from moecc.passes._tune.routing import boundary_loss, selection_scores, standardized, value_loss
from moecc.passes._tune.trained import Trained
from moecc.passes._tune.tuned import split
from moecc.passes._tune.whole import Values, Whole
from moecc.pipeline.passes import Context
from moecc.pipeline.stream import require_squares

Number = TypeVar("Number", float, Tensor)


class ModelLoss:
    """The loss as a function of the trained tensors, with the float model's values as targets."""

    def __init__(
        self,
        program: Program,
        trained: Trained,
        ctx: Context,
        weights: Mapping[str, float],
        *,
        has_head: bool,
    ):
        """weights: of the four terms by name. has_head: whether the model gives logits."""
        self.weights, self.trained, self.has_head = weights, trained, has_head
        routers = {
            selection_scores(m).name: m.top_k for m in program.moe_layers() if m.logits is not None
        }
        self.routers = routers if weights["routing"] else {}
        self.whole = Whole(program, trained.placeholders, watch=self.routers, spare=ctx.spare)
        self.batches = list(ctx.batches)
        self.rows, self.held_out = split(len(self.batches))
        assert ctx.reference is not None
        self.teacher = Whole(ctx.reference, set(), watch=self.routers, spare=ctx.spare)
        self.targets: dict[int, Values] = {}
        self.scale: dict[str, float] = {}

    def start_at(self, before: Mapping[str, float]) -> None:
        """Make each term but lm 1 where training starts."""
        relative = [k for k in ("hidden", "kl", "routing") if k in before]
        self.scale = {"lm": 1.0, **{k: 1 / max(before[k], 1e-12) for k in relative}}

    def with_loss(self, terms: Mapping[str, float]) -> dict[str, float]:
        """The terms, and the loss that they make."""
        return {**terms, "loss": float(sum(self._weighted(terms)))}

    @torch.no_grad()
    def held_out_terms(self) -> dict[str, float]:
        """The terms on the held-out batches, with tensors as they would be stored."""
        sums: dict[str, float] = {}
        stored = self.trained.stored
        for row in self.held_out:
            kept = self.whole.forward(self.batches[row], stored)
            terms = self._terms(row, kept[-1], self.whole.head(kept[-1], stored))
            inner = {k: v for values in kept for k, v in values.items() if k in self.routers}
            if inner:
                losses = [self._misalignment(row, k, v) for k, v in inner.items()]
                terms["routing"] = torch.stack(losses).sum()
            for k, v in terms.items():
                sums[k] = sums.get(k, 0.0) + float(v) / len(self.held_out)
        return sums

    def backward(self, row: int, share: float) -> None:
        """Add the gradient of one batch's loss, times `share`."""

        def loss(values: Values, logits: Tensor) -> Tensor:
            found = share * sum(self._weighted(self._terms(row, values, logits)))
            assert isinstance(found, Tensor)
            return found

        def of(name: str) -> Callable[[Tensor], Tensor]:
            return lambda scores: (
                share * self._weight("routing") * self._misalignment(row, name, scores)
            )

        inner = {name: of(name) for name in self.routers}
        self.whole.backward(self.batches[row], self.trained.values, loss, inner)

    def _target(self, row: int) -> Values:
        """The float model's values before its head, and its routers' scores.

        They are kept: a few activations per token and layer.
        """
        if row not in self.targets:
            kept = self.teacher.forward(self.batches[row], lambda wanted: {})
            scores = {k: v for values in kept for k, v in values.items() if k in self.routers}
            for name in self._hidden(kept[-1]):
                require_squares(kept[-1][name], "the last hidden state")
            self.targets[row] = kept[-1] | scores
        return self.targets[row]

    def _terms(self, row: int, values: Values, logits: Tensor) -> dict[str, Tensor]:
        """hidden of one batch; with a head kl, and lm if it has a weight."""
        target = self._target(row)
        hidden = [
            relative(
                (values[k] - target[k]).float().square().sum(), target[k].float().square().sum()
            )
            for k in self._hidden(values)
        ]
        found = {"hidden": torch.stack(hidden).mean()}
        if not self.has_head:
            return found
        teacher = self.teacher.head(target, lambda wanted: {})
        found["kl"] = divergence(*(z.flatten(0, -2).float() for z in (logits, teacher)))
        if self.weights["lm"]:
            following = self.batches[row][:, 1:].flatten()
            found["lm"] = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), following)
        return found

    def _hidden(self, values: Values) -> list[str]:
        """The names of those values before the head that trained tensors change."""
        return [k for k in values if k in self.whole.moving and k not in self.routers]

    def _misalignment(self, row: int, name: str, scores: Tensor) -> Tensor:
        """One router's share of the routing term."""
        teacher = self._target(row)[name].flatten(0, -2).float()
        s, t = standardized(scores.flatten(0, -2).float(), teacher)
        k = self.routers[name]
        return (value_loss(s, t, k) + boundary_loss(s, t, k)) / len(self.routers)

    def _weight(self, term: str) -> float:
        return self.weights[term] * self.scale[term]

    def _weighted(self, terms: Mapping[str, Number]) -> list[Number]:
        return [self._weight(k) * v for k, v in terms.items()]
