"""Plans how the bits of a budget are spent: more for projections whose errors cost more.

  1. On a sample of the calibration text, measure every projection's moments for the float model
     (`_code.moments`). From these, estimate the cost of its error at 2, 3 and 4 bits, with
     codebooks for experts or for the layer, with and without a mean and a basis taken out
     (`_code.sharing`). `sensitivity` brings all costs to one unit, that of the model's output and
     its routers, so that layers and projections can be compared.
  2. Of all plans within the budget, take the one whose errors cost least in sum. This is the
     multiple-choice knapsack problem; dynamic programming over the bits to be spent solves it.

The plan holds bits, codebook, mean and rank for each projection of each layer; `klt` and `vq` do as
it says. Cost in bits per weight: `bits`, everything that is stored for the routed experts included.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moecc.errors import MoeccError
from moecc.ir.moe import MoE, Projection
from moecc.ir.ops import EXPERTS
from moecc.ir.program import Program
from moecc.options import option
from moecc.passes._code.machinery import coding_by
from moecc.passes._code.moments import measure, routed_tokens
from moecc.passes._code.sharing import Case, choosing
from moecc.pipeline.bits import coded_bits
from moecc.pipeline.estimate import Estimate
from moecc.pipeline.passes import Context, Kept, Layer, Pass
from moecc.pipeline.stream import Stream, first_tokens
from moecc.pipeline.work import Scope, Work

# Error of an output by owner of the codebooks, relative to codebooks of experts; measured with
# `vq` behind a mean.
_BOOKS = {"expert": 1.0, "layer": 1.06}
# Error of an output by bits, relative to 2 bits; measured with `vq`.
_ERROR = {2: 1.0, 3: 0.23, 4: 0.075}
_STEPS = 1 << 14  # of what is to be spent beyond the least


@dataclass(frozen=True)
class Planned:
    """One projection's part of the plan."""

    bits: int  # of its codes
    codebook: str  # expert or layer
    mean: int  # bits of its mean, 0: none
    rank: int  # of its basis
    cost: float
    stored: int  # bits in all


@dataclass(frozen=True, kw_only=True)
class PlanBits(Pass):
    name: ClassVar[str] = "budget"
    requires: ClassVar[frozenset[str]] = frozenset({"sensitivity"})
    after: ClassVar[frozenset[str]] = frozenset({"lora"})
    provides: ClassVar[frozenset[str]] = frozenset({"budget"})
    leads_to: ClassVar[frozenset[str]] = frozenset({"basis", "vq"})  # which do as it says
    needs_data: ClassVar[bool] = True
    bits: int | float = option(
        2.5, help="bits per weight of the routed experts, everything stored included", low=2, high=6
    )
    rank: int | str = option(
        "auto", help="rows of each shared basis", choices=("auto",), low=0, high=1024
    )
    mean: int | str = option(
        "auto", help="bits of each shared mean; off: none", choices=("auto", "off", 2, 3, 4)
    )
    codebook: str = option(
        "auto", help="one codebook per expert or per layer", choices=("auto", "expert", "layer")
    )
    tokens: int = option(
        8192, help="calibration tokens to measure on, at most", low=1, high=1 << 30
    )

    def machinery(self, device: torch.device) -> str:
        return coding_by(device)

    def estimate(self, found: Estimate) -> None:
        found.data["budget"] = self
        found.most = str(self), float(self.bits)

    def widths(self) -> Collection[int]:
        return _ERROR

    def work(self, scope: Scope) -> Work:
        done = choosing(scope)
        done.here += min(self.tokens, scope.tokens) * (scope.forward + scope.dense)
        return done

    def run(self, program: Program, ctx: Context) -> bool:
        layers = program.moe_layers()
        costs = ctx.data["sensitivity"]
        # All layers or none: costs in sensitivity's unit and costs relative to a layer's output
        # could not be compared.
        known = all(m.path in costs and m.operand("post_norm") is None for m in layers)
        if not known:
            ctx.notes.append(
                "budget: sensitivity does not reach all layers; "
                "errors relative to their outputs are planned with"
            )
        kept = ctx.once("budget", lambda: Kept(facts=self.plan(program, layers, ctx, known=known)))
        ctx.data["budget"] = {name: Planned(**planned) for name, planned in kept.facts.items()}
        return False

    def plan(
        self, program: Program, layers: list[MoE], ctx: Context, *, known: bool
    ) -> dict[str, dict[str, object]]:
        """By path of a projection, the fields of its `Planned`.

        known: whether costs are sensitivity's. Raise MoeccError if the budget pays for no plan.
        """
        stream, offers = Stream(program, first_tokens(ctx.batches, self.tokens), ctx.workers), {}
        last = max((m.layer for m in layers), default=0)
        for stage in ctx.progress(range(last + 1), "budget"):
            layer = Layer(stage, program, program, stream, stream)
            for moe in layer.moe:
                if moe.node.target is EXPERTS:
                    offers.update(self.offers(layer, moe, ctx, known=known))
            stream.advance()
        weights = sum(w for w, _ in offers.values())
        plan = spend({name: found for name, (_, found) in offers.items()}, self.bits * weights)
        if plan is None:
            least = sum(min(o.stored for o in found) for _, found in offers.values()) / weights
            raise MoeccError(
                f"budget: bits={self.bits} is too few; with scales and codebooks the least is "
                f"{math.ceil(1000 * least) / 1000:.3f}"
            )
        return {name: asdict(planned) for name, planned in plan.items()}

    def offers(
        self, layer: Layer, moe: MoE, ctx: Context, *, known: bool
    ) -> dict[str, tuple[int, list[Planned]]]:
        """By path of a projection: its number of weights, and all that may be done with them."""
        cost = ctx.data["sensitivity"][moe.path] if known else None
        moments = measure(layer, moe, routed_tokens(layer, moe), cost)
        cases = {p: Case.of(layer, p, moments, ctx) for p in moe.projections}
        return {p.path: (p.weights, list(self._offers_of(p, case))) for p, case in cases.items()}

    def _offers_of(self, projection: Projection, case: Case) -> Iterator[Planned]:
        experts, rows, columns = projection.shape
        bias = 0 if projection.operand("bias") is None else 16 * experts * rows
        books = {k: v for k, v in _BOOKS.items() if self.codebook in ("auto", k)}
        whole = case.cost(2)
        for c in case.choices(*case.offers(self.mean, self.rank)):
            for bits, error in _ERROR.items():
                for book, factor in books.items():
                    own = experts if book == "expert" else 1
                    stored = c.bits + bias + coded_bits(experts, rows, columns, bits, books=own)
                    cost = whole * c.cost * error * factor
                    yield Planned(bits, book, c.mean, c.rank, cost, stored)


def spend(offers: dict[str, list[Planned]], budget: float) -> dict[str, Planned] | None:
    """Step 2: one offer for each name, of the least cost in sum that `budget` bits can pay.

    None if the budget does not pay even the smallest offers.
    """
    least = {name: min(o.stored for o in found) for name, found in offers.items()}
    spare = budget - sum(least.values())
    if spare < 0:
        return None
    # Exact if all sizes are multiples of a unit this large; else each size is rounded up.
    common = math.gcd(*(o.stored - least[name] for name, found in offers.items() for o in found))
    unit = max(spare / _STEPS, common, 1)
    most = int(spare / unit)
    # the least cost of the projections so far, by the units that they may spend
    costs = torch.zeros(most + 1, dtype=torch.float64)
    taken: dict[str, Tensor] = {}
    steps = {
        name: [math.ceil((o.stored - least[name]) / unit) for o in found]
        for name, found in offers.items()
    }
    for name, found in offers.items():
        ways = torch.full((len(found), most + 1), torch.inf, dtype=torch.float64)
        for way, offer, step in zip(ways, found, steps[name], strict=True):
            if step <= most:
                way[step:] = costs[: most + 1 - step] + offer.cost
        costs, taken[name] = ways.min(0)
    plan, left = {}, most
    for name in reversed(offers):
        chosen = int(taken[name][left])
        plan[name] = offers[name][chosen]
        left -= steps[name][chosen]
    return plan
