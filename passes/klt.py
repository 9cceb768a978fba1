"""KBVQ-MoE, first part: what the experts of a layer have in common is taken out before coding.  arXiv 2602.11184.

  1. A mean that all share as it is, and a basis in which each expert has coefficients (`_code.basis` says how both are found)
  2. auto: those whose error after coding is worth their bits (`_code.rate`), none allowed, by an estimate for all combinations; the
     best is coded, on a sample of experts, and taken only if it is worth its bits so too. Errors of both projections count: where
     one is far the smaller, bits do not go there. So by default there may be no basis at all, and a mean instead where that costs
     less, which the paper has not: it shares a basis always (rank=R,mean=off). Behind `budget`: what that has planned
  3. What is left becomes the dense operand of `moecc::klt_experts`

Cost in bits per weight of gate_up: mean bits / E for a mean, 8 r / D + 16 / D + 16 r / (E N) for a basis of r rows (E experts,
N rows, D hidden).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from moecc.ir import vq4
from moecc.ir.moe import MoE, Projection
from moecc.ir.ops import EXPERTS, KLT_EXPERTS
from moecc.options import option
from moecc.passes._code.basis import Case, Choice, Shared
from moecc.passes._code.moments import Moments
from moecc.passes._code.rate import gain
from moecc.pipeline.bits import basis_bits, coded_bits
from moecc.pipeline.estimate import Estimate
from moecc.pipeline.passes import Context, Layer, LayerPass


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
    bits: int = option(2, help="bits that coding will use, for what is auto", choices=(2, 3, 4))

    def estimate(self, found: Estimate) -> None:
        for p in found.projections:
            rank = 0 if self.rank == "auto" else int(self.rank)
            shared = basis_bits(rank, p.experts, p.rows, p.columns, input_side=p.input_side)
            if self.mean not in ("auto", "off"):
                shared += coded_bits(1, p.rows, p.columns, int(self.mean))
            p.low, p.high, p.coded = shared, shared, True
        if "auto" in (self.rank, self.mean) and "budget" not in found.data:
            found.remarks.append("a shared mean and basis come on top where they earn their bits")

    def run_layer(self, layer: Layer, ctx: Context) -> bool:
        done = [self.factor(layer, moe, ctx) for moe in layer.moe if moe.node.target is EXPERTS]
        return any(done)

    def factor(self, layer: Layer, moe: MoE, ctx: Context) -> bool:
        moments: Moments = layer.data["moments", moe.path]
        cases = {p: Case.of(layer, p, moments, ctx) for p in moe.projections}
        plan = [ctx.data.get("budget", {}).get(p.path) for p in cases]
        planned = {
            p: (it.mean, it.rank) for p, it in zip(cases, plan, strict=True) if it is not None
        }
        taken = planned if len(planned) == len(cases) else self.choose(cases)
        found: dict[Projection, Shared] = {}
        for p, (mean, rank) in taken.items():
            found[p] = cases[p].take(mean, rank)
            ctx.record(p.path, rank=rank, mean=f"{mean} bit" if mean else "none")
        if not any(shared.tensors for shared in found.values()):
            return False
        operands: list[fx.Node | None] = []
        for p, shared in found.items():
            operands.append(
                layer.program.add(f"{p.path}.remainder", shared.left_of(cases[p].weight))
            )
        for p, shared in found.items():
            stored = [shared.tensors.get(n) for n in vq4.SHARED]
            operands += [
                None if t is None else layer.program.add(f"{p.path}.{n}", t)
                for n, t in zip(vq4.SHARED, stored, strict=True)
            ]
        operands += [*(p.operand("bias") for p in moe.projections), moe.operand("post_norm")]
        layer.program.replace(
            moe.node, KLT_EXPERTS, (*moe.node.args[:3], *operands), moe.attributes
        )
        return True

    def choose(self, cases: dict[Projection, Case]) -> dict[Projection, tuple[int, int]]:
        """Bits of the mean (0: none) and rank of the basis for each projection of a layer."""
        offers = {p: case.offers(self.mean, self.rank) for p, case in cases.items()}
        taken = {
            p: (means[0], ranks[0]) for p, (means, ranks) in offers.items()
        }  # the least that may be
        open_ones = [p for p, (means, ranks) in offers.items() if len(means) * len(ranks) > 1]
        costs = {p: case.cost(self.bits) for p, case in cases.items()} if open_ones else {}
        for p in open_ones:
            taken[p] = self.best(
                cases[p], offers[p], costs[p], sum(costs.values()) - costs[p], cases
            )
        return taken

    def best(
        self,
        case: Case,
        offer: tuple[Sequence[int], Sequence[int]],
        whole: float,
        other: float,
        cases: dict[Projection, Case],
    ) -> tuple[int, int]:
        """What is worth its bits, of means and ranks offered. `whole`: cost of the error where nothing is taken out; `other`:
        that of the other projection."""
        total = sum(c.weight.numel() for c in cases.values())

        def worth(choice: Choice, cost: float) -> float:
            return gain(whole + other, cost + other, choice.bits / total)

        first, *others = case.choices(*offer, whole)
        best = max((first, *others), key=lambda choice: worth(choice, choice.cost))
        if best is not first:
            measured = case.cost(self.bits, best.mean, best.rank)
            best = best if worth(best, measured) > worth(first, first.cost) else first
        return best.mean, best.rank
