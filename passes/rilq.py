"""RILQ: what is left of the error is made up for by all layers together, under a loss of the whole model.  arXiv 2412.01129.

  1. Every float matrix that each token meets in a decoder layer (attention, shared expert; no router, no gate: `_tune.linears`) gets
     an adapter W + B A of `rank` rows, B zero at first. `merge` folds them in afterwards; they cost no bits.
  2. The experts' adapters live in what is stored of them: coefficients in the shared basis, the basis, codebooks, scales and
     biases are trained as they are stored (`_tune.tuned`), so that merging them is exact and free. Codes stay.
  3. All are trained by Adam on
         hidden * |h - h_float|^2 / |h_float|^2 of the last hidden state        (the paper's model loss)
       + lm * -log p(next token of the calibration text)       (the paper's language-model loss; weight 0 by default)
       + kl * KL(float model || program) of the next token                      (ours: what is to be kept, not the text)
       + routing * misalignment of every router's scores (`_tune.routing`: value and boundary), so that no gain is bought with flips
     hidden, kl and routing relative to their values before training. A model without a head has no lm and no kl. One layer's
     graph is in memory at a time (`_tune.whole`).
  4. An eighth of the calibration batches is held out. The state with the least held-out loss is kept, the start included; when
     `patience` checks in a row bring no better one, training ends; by default it does not, for as rates fall to zero the best
     state comes late (behind `vsraq`, on the example, the first better one at the ninth of ten checks). An interrupted run goes on
     from its last check.

Cost in bits per weight: none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from moecc.errors import MoeccError
from moecc.ir.ops import VQ_EXPERTS
from moecc.ir.program import Program
from moecc.options import option
from moecc.passes._tune.block import output_logits
from moecc.passes._tune.linears import linears
from moecc.passes._tune.low_rank import attach
from moecc.passes._tune.routing import boundary_loss, selection_scores, standardized, value_loss
from moecc.passes._tune.tuned import Tuned, split
from moecc.passes._tune.whole import Values, Whole
from moecc.pipeline.estimate import Estimate
from moecc.pipeline.passes import Context, Kept, Pass
from moecc.pipeline.stream import StageWeights, fits_in_memory

_CHECKS = 10  # evaluations of the held-out loss
_WARM_UP = 20  # steps
_ADAM = ("step", "exp_avg", "exp_avg_sq")  # what it holds of a parameter


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
    experts: bool = option(True, help="train what is stored of the experts too")
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
        help="checks of 10 in a row without a better held-out loss before training ends; 10: never",
        low=1,
        high=10,
    )

    def estimate(self, found: Estimate) -> None:
        return None

    def run(self, program: Program, ctx: Context) -> bool:
        if not (self.hidden or self.kl or self.lm):
            raise MoeccError("rilq: hidden, kl and lm are all 0; give one of them a weight")
        has_head = output_logits(program) is not None
        if not has_head:
            if not self.hidden:
                raise MoeccError(
                    "rilq: the model gives no logits, so kl and lm can't be measured; give hidden a weight"
                )
            ctx.notes.append(
                "rilq: the model gives no logits of its vocabulary; kl and lm are left out of the loss"
            )
        trained = Trained(self, program, ctx)
        if not trained.parameters:
            return False
        before, after = Training(self, program, trained, ctx, has_head=has_head).run()
        for moe in program.moe_layers():
            for projection in moe.projections:
                ctx.record(projection.path, rilq={"before": before, "after": after})
        return trained.store(better=after["loss"] < before["loss"])


class Trained:
    """Everything that is trained: adapters of dense matrices, and the experts' stored tensors."""

    def __init__(self, options: ModelLossAdapters, program: Program, ctx: Context):
        self.program = program
        self.kept = (
            StageWeights(program) if fits_in_memory(program) else None
        )  # what is adapted, read once
        self.experts = Tuned(
            program,
            [m for m in program.moe_layers() if m.node.target is VQ_EXPERTS]
            if options.experts
            else [],
        )
        self.a: dict[str, Tensor] = {}
        self.b: dict[str, Tensor] = {}
        self.lr = options.lr
        for stage in range(program.layers) if options.rank else ():
            for node, name, reason in linears(program, stage):
                weight = node.args[1]
                assert isinstance(weight, fx.Node)
                if reason or program.weights[weight.name].recipe is not None:
                    ctx.record(name, adapter=f"none: {reason or 'computed from other weights'}")
                else:
                    generator = torch.Generator().manual_seed(ctx.seed_for("rilq", name))
                    self._adapt(weight, options.rank, generator)

    def _adapt(self, weight: fx.Node, rank: int, generator: torch.Generator) -> None:
        rows, columns = weight.meta["val"].shape
        rank = min(rank, rows, columns)
        self.a[weight.name] = (
            torch.randn(rank, columns, generator=generator) / columns**0.5
        ).requires_grad_()
        self.b[weight.name] = torch.zeros(rows, rank, requires_grad=True)

    @property
    def placeholders(self) -> set[str]:
        return {*self.a, *self.experts.parameters}

    @property
    def parameters(self) -> list[Tensor]:
        return [*self.a.values(), *self.b.values(), *self.experts.parameters.values()]

    def values(self, wanted: set[str]) -> Mapping[str, Tensor]:
        """Differentiable values of the placeholders `wanted`."""
        return {**self._adapted(wanted), **self.experts.rounded(wanted)}

    def stored(self, wanted: set[str]) -> Mapping[str, Tensor]:
        """Their values as they are stored."""
        return {**self._adapted(wanted), **self.experts.stored(wanted)}

    def _adapted(self, wanted: set[str]) -> dict[str, Tensor]:
        weights = StageWeights(self.program) if self.kept is None else self.kept
        return {p: weights[p] + self.b[p] @ self.a[p] for p in self.a if p in wanted}

    def groups(self) -> list[dict[str, Any]]:
        """Parameter groups for an optimizer."""
        dense = (
            [{"params": [*self.a.values(), *self.b.values()], "lr": 3e-4 * self.lr}]
            if self.a
            else []
        )
        return [*dense, *self.experts.groups(0.15 * self.lr)]

    def state(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def restore(self, state: list[Tensor]) -> None:
        for p, value in zip(self.parameters, state, strict=True):
            p.copy_(value)

    def store(self, *, better: bool) -> bool:
        """Leave adapters and experts in the program; nothing where training brought nothing."""
        if not better:
            return False
        for placeholder in self.a:
            attach(
                self.program,
                placeholder,
                self.a[placeholder].detach(),
                self.b[placeholder].detach(),
            )
        self.experts.store()
        return True


@dataclass(frozen=True)
class Reached:
    """How far training is: steps done, checks in a row without a better loss, held-out terms before, the best and their state."""

    step: int
    waited: int
    before: dict[str, float]
    least: dict[str, float]
    best: list[Tensor]


def _scale(start: Mapping[str, float]) -> dict[str, float]:
    """What makes each term but lm 1 at the start."""
    return {
        "lm": 1.0,
        **{k: 1 / max(start[k], 1e-12) for k in ("hidden", "kl", "routing") if k in start},
    }


class Training:
    """Steps 3 and 4."""

    def __init__(
        self,
        options: ModelLossAdapters,
        program: Program,
        trained: Trained,
        ctx: Context,
        *,
        has_head: bool,
    ):
        self.options, self.trained, self.ctx, self.has_head = options, trained, ctx, has_head
        routers = {
            selection_scores(m).name: m.top_k for m in program.moe_layers() if m.logits is not None
        }
        self.routers = routers if options.routing else {}
        self.whole = Whole(program, trained.placeholders, watch=self.routers)
        self.batches = list(ctx.batches)
        self.rows, self.held_out = split(len(self.batches))
        assert ctx.reference is not None
        self.teacher = Whole(ctx.reference, set(), watch=self.routers)
        self.targets: dict[int, Values] = {}
        self.scale: dict[str, float] = {}

    def target(self, row: int) -> Values:
        """The float model's values before its head and its routers' scores, kept: a few activations per token and layer."""
        if row not in self.targets:
            kept = self.teacher.forward(self.batches[row], lambda wanted: {})
            self.targets[row] = kept[-1] | {
                k: v for values in kept for k, v in values.items() if k in self.routers
            }
        return self.targets[row]

    def terms(self, row: int, values: Values, logits: Tensor) -> dict[str, Tensor]:
        """hidden of one batch; kl, and lm where it has a weight, of a model with a head."""
        target = self.target(row)
        moving = [k for k in values if k in self.whole.moving and k not in self.routers]
        hidden = [
            (values[k] - target[k]).float().square().sum() / target[k].float().square().sum()
            for k in moving
        ]
        found = {"hidden": torch.stack(hidden).mean()}
        if not self.has_head:
            return found
        student = logits.float().log_softmax(-1)
        teacher = self.teacher.head(target, lambda wanted: {}).float().log_softmax(-1)
        found["kl"] = (teacher.exp() * (teacher - student)).sum(-1).mean()
        if self.options.lm:
            found["lm"] = F.nll_loss(
                student[:, :-1].flatten(0, 1), self.batches[row][:, 1:].flatten()
            )
        return found

    def misalignment(self, row: int, name: str, scores: Tensor) -> Tensor:
        """One router's share of the routing term."""
        s, t = standardized(
            scores.flatten(0, -2).float(), self.target(row)[name].flatten(0, -2).float()
        )
        k = self.routers[name]
        return (value_loss(s, t, k) + boundary_loss(s, t, k)) / len(self.routers)

    def weight(self, term: str) -> float:
        value: float = getattr(self.options, term) * self.scale[term]
        return value

    def total(self, terms: Mapping[str, Any]) -> Any:
        return sum(self.weight(k) * v for k, v in terms.items())

    @torch.no_grad()
    def held_out_terms(self) -> dict[str, float]:
        """The terms of the loss on the held-out batches."""
        sums: dict[str, float] = {}
        for row in self.held_out:
            kept = self.whole.forward(self.batches[row], self.trained.stored)
            terms = self.terms(row, kept[-1], self.whole.head(kept[-1], self.trained.stored))
            inner = {k: v for values in kept for k, v in values.items() if k in self.routers}
            if inner:
                terms["routing"] = torch.stack(
                    [self.misalignment(row, k, v) for k, v in inner.items()]
                ).sum()
            for k, v in terms.items():
                sums[k] = sums.get(k, 0.0) + float(v) / len(self.held_out)
        return sums

    def run(self) -> tuple[dict[str, float], dict[str, float]]:
        """Train, from the last check of an interrupted run where there is one; the held-out terms and loss before, and of the
        state that is kept."""
        steps, generator = (
            self.options.steps,
            torch.Generator().manual_seed(self.ctx.seed_for("rilq")),
        )
        drawn = torch.randint(
            len(self.rows), (steps, self.options.batches), generator=generator
        ).tolist()
        optimizer = torch.optim.Adam(self.trained.groups(), betas=(0.9, 0.95))
        rates, every = [g["lr"] for g in optimizer.param_groups], max(1, -(-steps // _CHECKS))
        at = self.resumed(optimizer) or self.begun()
        for step in self.ctx.progress(range(at.step, steps), "rilq"):
            if at.waited >= self.options.patience:
                break
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * (1 - step / steps) * min(1.0, (step + 1) / _WARM_UP)
            for i in drawn[step]:
                self.step(self.rows[i])
            optimizer.step()
            optimizer.zero_grad()
            if (step + 1) % every == 0 or step + 1 == steps:
                terms = self.held_out_terms()
                now = {**terms, "loss": float(self.total(terms))}
                better = now["loss"] < at.least["loss"]
                least, best = (now, self.trained.state()) if better else (at.least, at.best)
                at = Reached(step + 1, 0 if better else at.waited + 1, at.before, least, best)
                self.keep(at, optimizer)
        self.trained.restore(at.best)
        return at.before, at.least

    def begun(self) -> Reached:
        terms = self.held_out_terms()
        self.scale = _scale(terms)
        before = {**terms, "loss": float(self.total(terms))}
        return Reached(0, 0, before, before, self.trained.state())

    def keep(self, at: Reached, optimizer: torch.optim.Optimizer) -> None:
        """Note where training is: by number of a parameter its value, its best value and what Adam holds of it."""
        values = {"now": self.trained.state(), "best": at.best}
        tensors = {f"{i}.{what}": v for what, found in values.items() for i, v in enumerate(found)}
        for i, state in optimizer.state_dict()["state"].items():
            tensors |= {f"{i}.{what}": state[what] for what in _ADAM}
        facts = {"step": at.step, "waited": at.waited, "before": at.before, "least": at.least}
        self.ctx.keep("rilq", Kept(tensors, facts))

    def resumed(self, optimizer: torch.optim.Optimizer) -> Reached | None:
        """Where an interrupted run was, with parameters and `optimizer` as they were then."""
        work = self.ctx.kept("rilq")
        if work is None:
            return None
        numbers = range(len(self.trained.parameters))
        stepped = [
            i for i in numbers if f"{i}.{_ADAM[0]}" in work.tensors
        ]  # others never had a gradient
        state = {i: {what: work.tensors[f"{i}.{what}"] for what in _ADAM} for i in stepped}
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
        now, best = ([work.tensors[f"{i}.{what}"] for i in numbers] for what in ("now", "best"))
        self.trained.restore(now)
        self.scale = _scale(work.facts["before"])
        return Reached(**work.facts, best=best)

    def step(self, row: int) -> None:
        """Add one batch's gradient."""
        share = 1 / self.options.batches

        def loss(values: Values, logits: Tensor) -> Tensor:
            found: Tensor = share * self.total(self.terms(row, values, logits))
            return found

        def of(name: str) -> Callable[[Tensor], Tensor]:
            return lambda scores: (
                share * self.weight("routing") * self.misalignment(row, name, scores)
            )

        self.whole.backward(
            self.batches[row], self.trained.values, loss, {name: of(name) for name in self.routers}
        )
