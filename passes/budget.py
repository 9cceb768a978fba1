"""How the bits of a budget are spent: more where an error costs more.

  1. On a sample of the calibration text, for the float model: every projection's moments (`_code.moments`), and from them what its error
     will cost at 2, 3 and 4 bits, with codebooks for experts or for the layer, with and without a mean and a basis taken out
     (`_code.basis`, step 8). With `sensitivity` costs are in one unit, the model's output and its routers, so that layers and
     projections can be compared
  2. Of all plans within the budget the one whose errors cost least in sum, by dynamic programming over what may be spent (the
     multiple-choice knapsack problem)

The plan holds bits, codebook, mean and rank per layer and projection; `klt` and `vq` do as it says.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from moecc.errors import MoeccError
from moecc.ir.moe import MoE
from moecc.ir.ops import EXPERTS
from moecc.ir.program import Program
from moecc.options import option
from moecc.passes._code.basis import Case
from moecc.passes._code.moments import measure, routed_tokens
from moecc.pipeline.bits import coded_bits
from moecc.pipeline.estimate import Estimate
from moecc.pipeline.passes import Context, Kept, Layer, Pass
from moecc.pipeline.stream import Stream, first_tokens

_BOOKS = {
    "expert": 1.0,
    "layer": 1.06,
}  # of an output, by whose the codebooks are: measured likewise, behind a mean
_STEPS = 1 << 14  # in which what is to be spent beyond the least is counted
_ERROR = {
    2: 1.0,
    3: 0.23,
    4: 0.075,
}  # of an output after coding, relative to 2 bits: measured with `vq`


@dataclass(frozen=True)
class Planned:
    """One projection's part of the plan: bits of its codes, whose the codebooks are (expert or layer), its mean's bits (0: none),
    its basis's rank; cost and bits stored."""

    bits: int
    codebook: str
    mean: int
    rank: int
    cost: float
    stored: int


@dataclass(frozen=True, kw_only=True)
class PlanBits(Pass):
    name: ClassVar[str] = "budget"
    requires: ClassVar[frozenset[str]] = frozenset({"sensitivity"})
    after: ClassVar[frozenset[str]] = frozenset({"lora"})
    provides: ClassVar[frozenset[str]] = frozenset({"budget"})
    leads_to: ClassVar[frozenset[str]] = frozenset({"basis", "vq"})  # which do as it says
    needs_data: ClassVar[bool] = True
    bits: int | float = option(
        2.5, help="bits per weight of the routed experts, all that is stored counted", low=2, high=6
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

    def estimate(self, found: Estimate) -> None:
        found.data["budget"] = self
        found.most = str(self), float(self.bits)

    def run(self, program: Program, ctx: Context) -> bool:
        layers = program.moe_layers()
        # costs of some layers in its unit and of others relative to their outputs could not be compared
        costs = ctx.data["sensitivity"]
        known = all(m.path in costs and m.operand("post_norm") is None for m in layers)
        if not known:
            ctx.notes.append(
                "budget: sensitivity does not reach all layers; errors relative to their outputs are planned with"
            )
        plan = ctx.once(
            "budget", lambda: Kept(facts=self.plan(program, layers, ctx, known=known))
        ).facts
        ctx.data["budget"] = {name: Planned(**planned) for name, planned in plan.items()}
        return False

    def plan(
        self, program: Program, layers: list[MoE], ctx: Context, *, known: bool
    ) -> dict[str, dict[str, Any]]:
        """By path and projection, the fields of what is planned for it."""
        stream, offers = Stream(program, first_tokens(ctx.batches, self.tokens)), {}
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
                f"budget: bits={self.bits} is too few; with scales and codebooks the least is {math.ceil(1000 * least) / 1000:.3f}"
            )
        return {name: asdict(planned) for name, planned in plan.items()}

    def offers(
        self, layer: Layer, moe: MoE, ctx: Context, *, known: bool
    ) -> dict[str, tuple[int, list[Planned]]]:
        """By path and projection: how many weights there are, and what may be done with them."""
        moments = measure(
            layer,
            moe,
            routed_tokens(layer, moe),
            ctx.data["sensitivity"][moe.path] if known else None,
        )
        planned = {}
        for projection in moe.projections:
            case = Case.of(layer, projection, moments, ctx)
            experts, rows, columns = case.weight.shape
            bias = 0 if projection.operand("bias") is None else 16 * experts * rows
            books = {k: v for k, v in _BOOKS.items() if self.codebook in ("auto", k)}
            planned[projection.path] = case.weight.numel(), [
                Planned(bits, book, c.mean, c.rank, c.cost * error * factor, c.bits + bias + coded_bits(
                    experts, rows, columns, bits, books=experts if book == "expert" else 1))
                for c in case.choices(*case.offers(self.mean, self.rank), case.cost(2))
                for bits, error in _ERROR.items() for book, factor in books.items()
            ]  # fmt: skip
        return planned


def spend(offers: dict[str, list[Planned]], budget: float) -> dict[str, Planned] | None:
    """Step 2: one offer each, of the least cost in sum that `budget` bits can pay; None where they can't pay the smallest."""
    least = {name: min(o.stored for o in found) for name, found in offers.items()}
    spare = budget - sum(least.values())
    if spare < 0:
        return None
    # exact where all sizes are multiples of a unit this large, else each is rounded up
    unit = max(
        spare / _STEPS,
        math.gcd(*(o.stored - least[name] for name, found in offers.items() for o in found)),
        1,
    )
    most = int(spare / unit)
    costs = torch.zeros(
        most + 1, dtype=torch.float64
    )  # the least for the projections so far, by what they may spend
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
