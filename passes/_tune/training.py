"""Training under the loss of the whole model, with checks on held-out text.

1. Adam, with a rate that rises over the first steps and then falls to zero.
2. Ten times, measure the held-out loss. Note the state if it is the best so far, and keep all that
   an interrupted run needs to go on from here.
3. Stop once `patience` checks in a row brought no better state. The best state stays, the start
   included.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moecc.passes._tune.model_loss import ModelLoss
from moecc.pipeline.passes import Context, Kept

_CHECKS = 10  # evaluations of the held-out loss
_WARM_UP = 20  # steps
_ADAM = ("step", "exp_avg", "exp_avg_sq")  # its state of one parameter


@dataclass(frozen=True)
class Reached:
    """How far training is."""

    step: int  # steps done
    waited: int  # checks in a row without a better loss
    before: dict[str, float]  # held-out terms and loss before training
    least: dict[str, float]  # those of the best state
    best: list[Tensor]  # its parameters


class Training:
    """One training run of everything that `loss` is a function of."""

    def __init__(self, loss: ModelLoss, ctx: Context, steps: int, batches: int, patience: int):
        """steps: at most. batches: per step. patience: checks, `_CHECKS` for no early stop."""
        self.loss, self.trained, self.ctx = loss, loss.trained, ctx
        self.steps, self.batches, self.patience = steps, batches, patience

    def run(self) -> tuple[dict[str, float], dict[str, float]]:
        """Train; return held-out terms and loss before training, and of the state that is kept.

        Go on from the last check if an interrupted run has left one.
        """
        loss, steps = self.loss, self.steps
        generator = torch.Generator().manual_seed(self.ctx.seed_for("rilq"))
        size = (steps, self.batches)
        drawn = torch.randint(len(loss.rows), size, generator=generator).tolist()
        optimizer = torch.optim.Adam(self.trained.groups(), betas=(0.9, 0.95))
        rates, every = [g["lr"] for g in optimizer.param_groups], max(1, -(-steps // _CHECKS))
        at = self._resumed(optimizer) or self._begun()
        for step in self.ctx.progress(range(at.step, steps), "rilq"):
            if at.waited >= self.patience:
                break
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * (1 - step / steps) * min(1.0, (step + 1) / _WARM_UP)
            for i in drawn[step]:
                loss.backward(loss.rows[i], 1 / self.batches)
            optimizer.step()
            optimizer.zero_grad()
            if (step + 1) % every == 0 or step + 1 == steps:
                at = self._checked(at, step + 1)
                self._keep(at, optimizer)
        self.trained.restore(at.best)
        return at.before, at.least

    def _begun(self) -> Reached:
        terms = self.loss.held_out_terms()
        self.loss.start_at(terms)
        before = self.loss.with_loss(terms)
        return Reached(0, 0, before, before, self.trained.state())

    def _checked(self, at: Reached, step: int) -> Reached:
        """Step 2."""
        now = self.loss.with_loss(self.loss.held_out_terms())
        if now["loss"] < at.least["loss"]:
            return Reached(step, 0, at.before, now, self.trained.state())
        return Reached(step, at.waited + 1, at.before, at.least, at.best)

    def _keep(self, at: Reached, optimizer: torch.optim.Optimizer) -> None:
        """Keep values, best values and Adam's state, by number of the parameter."""
        values = {"now": self.trained.state(), "best": at.best}
        tensors = {f"{i}.{what}": v for what, found in values.items() for i, v in enumerate(found)}
        for i, state in optimizer.state_dict()["state"].items():
            tensors |= {f"{i}.{what}": state[what] for what in _ADAM}
        facts = {"step": at.step, "waited": at.waited, "before": at.before, "least": at.least}
        self.ctx.keep("rilq", Kept(tensors, facts))

    def _resumed(self, optimizer: torch.optim.Optimizer) -> Reached | None:
        """Where an interrupted run was, with parameters and `optimizer` as they were then."""
        work = self.ctx.kept("rilq")
        if work is None:
            return None
        numbers = range(len(self.trained.parameters))
        # Adam holds nothing of a parameter that never had a gradient
        stepped = [i for i in numbers if f"{i}.{_ADAM[0]}" in work.tensors]
        state = {i: {what: work.tensors[f"{i}.{what}"] for what in _ADAM} for i in stepped}
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
        now, best = ([work.tensors[f"{i}.{what}"] for i in numbers] for what in ("now", "best"))
        self.trained.restore(now)
        self.loss.start_at(work.facts["before"])
        return Reached(**work.facts, best=best)
