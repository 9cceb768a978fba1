"""KBVQ-MoE, first part: take out the common part of a layer's experts.  arXiv 2602.11184.

  1. Two things can be taken out before coding: a mean that all experts share as it is, and a basis
     in which each expert has coefficients. `_code.basis` says how both are found.
  2. If an option is auto, estimate the error after coding for all combinations of a mean and a
     basis, none allowed, and find the one that is most worth its bits (`_code.sharing`,
     `_code.rate`). Errors of both projections count: if one is far the smaller, bits do not go
     there. Code the best combination on a sample of experts, and take it only if it is worth its
     bits there too. Behind `budget`, do as that has planned.
  3. What is left becomes the dense operand of `moecc::klt_experts`.

So by default there may be no basis at all, and a mean instead if that costs less. The paper always
shares a basis and has no mean: rank=R,mean=off.

Cost in bits per weight of gate_up: mean bits / E for a mean, 8 r / D + 16 / D + 16 r / (E N) for a
basis of r rows (E experts, N rows, D hidden).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from moecc.ir import vq4
from moecc.ir.moe import MoE, Projection
from moecc.ir.ops import EXPERTS, KLT_EXPERTS
from moecc.ir.program import Program
from moecc.ir.tensors import Reader
from moecc.options import option
from moecc.passes._code.basis import MORE, Shared, added, root_of, stored_basis
from moecc.passes._code.machinery import coding_by
from moecc.passes._code.moments import Moments
from moecc.passes._code.rate import gain
from moecc.passes._code.sharing import Case, Choice, Pulled, Pulling, choosing, pull
from moecc.pipeline.bits import basis_bits, coded_bits
from moecc.pipeline.estimate import Estimate
from moecc.pipeline.passes import Context, Layer, LayerPass
from moecc.pipeline.work import Scope, Work
from moecc.pipeline.workers.base import Workers

Cases = dict[Projection, Case]


@dataclass(frozen=True, kw_only=True)
class SharedBasis(LayerPass):
    name: ClassVar[str] = "klt"
    requires: ClassVar[frozenset[str]] = frozenset({"moments"})
    after: ClassVar[frozenset[str]] = frozenset({"budget"})
    provides: ClassVar[frozenset[str]] = frozenset({"basis"})
    leads_to: ClassVar[frozenset[str]] = frozenset({"vq"})
    rank: int | str = option(
        "auto", help="rows of the shared basis, per projection", choices=("auto",), low=0, high=1024
    )
    mean: int | str = option(
        "auto",
        help="bits of a matrix that all experts share as it is; off: none",
        choices=("auto", "off", 2, 3, 4),
    )
    bits: int = option(
        2,
        help="bits that coding will use; options that are auto are judged by them",
        choices=(2, 3, 4),
    )

    def machinery(self, device: torch.device) -> str:
        return coding_by(device)

    def estimate(self, found: Estimate) -> None:
        for p in found.projections:
            rank = 0 if self.rank == "auto" else int(self.rank)
            shared = basis_bits(rank, p.experts, p.rows, p.columns, input_side=p.input_side)
            if self.mean not in ("auto", "off"):
                shared += coded_bits(1, p.rows, p.columns, int(self.mean))
            p.low, p.high, p.coded = shared, shared, True
        if "auto" in (self.rank, self.mean) and "budget" not in found.data:
            found.remarks.append("a shared mean and basis come on top where they earn their bits")

    def work(self, scope: Scope) -> Work:
        return Work() if self.leaves_all else choosing(scope)

    @property
    def leaves_all(self) -> bool:
        """Whether nothing may be taken out, unless `budget` says so."""
        return self.rank == 0 and self.mean == "off"

    def run_layer(self, layer: Layer, ctx: Context) -> bool:
        done = [self.factor(layer, moe, ctx) for moe in layer.moe if moe.node.target is EXPERTS]
        return any(done)

    def factor(self, layer: Layer, moe: MoE, ctx: Context) -> bool:
        """Take out the shared part of one layer's experts; return whether there is any."""
        if self.leaves_all and "budget" not in ctx.data:
            for p in moe.projections:
                ctx.record(p.path, rank=0, mean="none")
            return False
        moments: Moments = layer.data["moments", moe.path]
        cases = {p: Case.of(layer, p, moments, ctx) for p in moe.projections}
        plan = {p: ctx.data.get("budget", {}).get(p.path) for p in cases}
        planned = {p: (it.mean, it.rank) for p, it in plan.items() if it is not None}
        taken = planned if len(planned) == len(cases) else self.choose(cases)
        found: dict[Projection, Shared] = {}
        total = sum(p.weights for p in cases)
        for p, (mean, rank) in taken.items():
            found[p] = take(layer, cases[p], moments, mean, rank, ctx.workers)
            if self.rank == "auto" and rank and p not in planned and not cases[p].whole:
                bits = basis_bits(rank, *p.shape, input_side=p.input_side) / total
                plain = cases[p].take(mean, 0)
                if not cases[p].earns(plain, found[p], bits):
                    rank, found[p] = 0, plain
            ctx.record(p.path, rank=rank, mean=f"{mean} bit" if mean else "none")
        if not any(shared.tensors for shared in found.values()):
            return False
        self.lower(layer, moe, found)
        return True

    def lower(self, layer: Layer, moe: MoE, found: dict[Projection, Shared]) -> None:
        """Step 3: replace the experts node."""
        operands: list[fx.Node | None] = [
            remainder(layer.program, p, shared) for p, shared in found.items()
        ]
        for p, shared in found.items():
            for name in vq4.SHARED:
                tensor = shared.tensors.get(name)
                add = None if tensor is None else layer.program.add(f"{p.path}.{name}", tensor)
                operands.append(add)
        operands += [*(p.operand("bias") for p in moe.projections), moe.operand("post_norm")]
        args = (*moe.node.args[:3], *operands)
        layer.program.replace(moe.node, KLT_EXPERTS, args, moe.attributes)

    def choose(self, cases: Cases) -> dict[Projection, tuple[int, int]]:
        """Step 2: bits of the mean (0: none) and rank of the basis for each projection."""
        offers = {p: case.offers(self.mean, self.rank) for p, case in cases.items()}
        least = {p: (means[0], ranks[0]) for p, (means, ranks) in offers.items()}
        total = sum(p.weights for p in cases)
        found = {
            p: list(cases[p].choices(*offer))
            for p, offer in offers.items()
            if len(offer[0]) * len(offer[1]) > 1
        }
        if not any(_may_earn(some, total) for some in found.values()):
            return least
        costs = {p: case.cost(self.bits) for p, case in cases.items()}
        best = {
            p: self.best(cases[p], some, costs[p], sum(costs.values()) - costs[p], total)
            for p, some in found.items()
        }
        return {**least, **best}

    def best(
        self, case: Case, choices: Sequence[Choice], whole: float, other: float, total: int
    ) -> tuple[int, int]:
        """The mean and the rank that are most worth their bits, of those offered for a projection.

        whole: the cost of its error if nothing is taken out; other: that of the layer's other
        projection; total: weights of both.
        """

        def worth(choice: Choice, cost: float) -> float:
            return gain(whole + other, cost + other, choice.bits / total)

        first = choices[0]
        best = max(choices, key=lambda choice: worth(choice, whole * choice.cost))
        if best is not first:
            measured = case.cost(self.bits, best.mean, best.rank)
            plain = worth(first, whole * first.cost)
            best = best if worth(best, measured) > plain else first
        return best.mean, best.rank


def _may_earn(choices: Sequence[Choice], total: int) -> bool:
    """Whether one may be worth its bits more than the first, by estimate.

    Next to errors of the other projection, each is worth less than alone, as here.
    """
    first, *others = choices
    return any(gain(first.cost, c.cost, (c.bits - first.bits) / total) > 0 for c in others)


def take(
    layer: Layer, case: Case, moments: Moments, mean: int, rank: int, workers: Workers
) -> Shared:
    """The mean of `mean` bits and the basis of `rank` rows of all experts, as they are stored."""
    if not rank or case.whole:
        return case.take(mean, rank)
    found, p = case.take(mean, 0), case.projection
    node, side = p.operand(), p.input_side
    assert node is not None

    def left(e: int) -> Tensor:
        stored = layer.program.value(node, [e])
        return found.left_of(stored.float()) if found.tensors else stored

    def turned(span: Tensor) -> Tensor:
        units = (
            Pulling(left(e), None if side else moments.expert(e).bare(p.name))
            for e in range(case.experts)
        )
        return added(workers.run(pull, units, Pulled(span, moments.common)))

    root = root_of(moments.typical()) if side else None
    begun = case.directions(found.left_of(case.weight), rank + MORE)
    basis = begun.turned(turned, root, rank)
    weights = (left(e)[0].float() for e in range(case.experts))
    return found | stored_basis(weights, p.shape[2], basis, input_side=side)


def remainder(program: Program, projection: Projection, shared: Shared) -> fx.Node:
    """What is left of a projection's experts, as a weight that is computed when it is read."""
    before, node = program.copy(), projection.operand("")
    assert node is not None

    def some(experts: Sequence[int]) -> Tensor:
        return shared.of(experts).left_of(before.value(node, experts).float())

    experts = range(projection.shape[0])
    return program.add_reader(
        f"{projection.path}.remainder", node, Reader(lambda: some(experts), some)
    )
