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
from moecc.ir.moe import MoE
from moecc.ir.ops import EXPERTS, KLT_EXPERTS
from moecc.options import option
from moecc.passes._code.basis import Case, Choice, Shared
from moecc.passes._code.moments import Moments
from moecc.passes._code.rate import gain
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

    def run_layer(self, layer: Layer, ctx: Context) -> bool:
        done = [self.factor(layer, moe, ctx) for moe in layer.moe if moe.node.target is EXPERTS]
        return any(done)

    def factor(self, layer: Layer, moe: MoE, ctx: Context) -> bool:
        moments: Moments = layer.data["moments", moe.path]
        cases = {p: Case.of(layer, moe, p, moments, ctx) for p in ("gate_up", "down")}
        plan = [ctx.plan.get(f"{moe.path}.{p}") for p in cases]
        planned = {
            p: (it.mean, it.rank) for p, it in zip(cases, plan, strict=True) if it is not None
        }
        taken = planned if len(planned) == len(cases) else self.choose(cases)
        found: dict[str, Shared] = {}
        for p, (mean, rank) in taken.items():
            found[p] = cases[p].take(mean, rank)
            ctx.record(f"{moe.path}.{p}", rank=rank, mean=f"{mean} bit" if mean else "none")
        if not any(shared.tensors for shared in found.values()):
            return False
        operands: list[fx.Node | None] = []
        for p, shared in found.items():
            operands.append(
                layer.program.add(f"{moe.path}.{p}.remainder", shared.left_of(cases[p].weight))
            )
        for p, shared in found.items():
            stored = [shared.tensors.get(n) for n in vq4.SHARED]
            operands += [
                None if t is None else layer.program.add(f"{moe.path}.{p}.{n}", t)
                for n, t in zip(vq4.SHARED, stored, strict=True)
            ]
        operands += [moe.operand(n) for n in ("gate_up_bias", "down_bias", "post_norm")]
        layer.program.replace(
            moe.node, KLT_EXPERTS, (*moe.node.args[:3], *operands), moe.attributes
        )
        return True

    def choose(self, cases: dict[str, Case]) -> dict[str, tuple[int, int]]:
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
        cases: dict[str, Case],
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
