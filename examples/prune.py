"""Takes out the experts that do least and leaves their bits to the others.

  1. The calibration text runs through the float model. An expert's score is the mean over all
     tokens of w_e |y_e|, its routing weight times the norm of its output: how often it is chosen,
     and how much it then adds (as in REAP, arXiv 2510.13999).
  2. Each layer keeps the `keep` share of its experts with the highest scores, in their order; where
     the router chooses groups first, the same number of each group. A token never has fewer than it
     takes.
  3. Router, configuration and stored weights follow (`Context.keep_experts`), and passes behind it
     take what is left for the float model: `moecc compile MODEL --passes
     ./examples/prune.py{keep=0.75},kbvq -o OUT`.

Cost: the routed experts' bits shrink to the `keep` share. Not done: weights of the experts that
stay are not adjusted.

Shapes: T tokens, k experts per token, E experts, D hidden.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from moecc.ir.moe import MoE
from moecc.ir.ops import EXPERTS
from moecc.ir.program import Program
from moecc.options import option
from moecc.pipeline.estimate import Estimate
from moecc.pipeline.passes import Context, Kept, Layer, Pass
from moecc.pipeline.stream import Stream, first_tokens


@dataclass(frozen=True, kw_only=True)
class PruneExperts(Pass):
    name: ClassVar[str] = "prune"
    after: ClassVar[frozenset[str]] = frozenset({"lora"})
    provides: ClassVar[frozenset[str]] = frozenset({"pruned"})
    needs_data: ClassVar[bool] = True
    makes_reference: ClassVar[bool] = True
    keep: float = option(0.75, help="share of each layer's experts that stays", low=0.01, high=1)
    tokens: int = option(
        8192, help="calibration tokens to measure on, at most", low=1, high=1 << 30
    )

    def check(self, program: Program) -> None:
        groups = program.expert_groups()
        program.require_experts(
            {m.path: self.count(m.sizes[0], m.top_k, groups) for m in program.moe_layers()}
        )

    def count(self, experts: int, top_k: int, groups: int) -> int:
        """Return the number of experts that a layer keeps, the same of each group.

        A token can still take `top_k`.
        """
        each = max(1, math.floor(self.keep * experts / groups + 0.5))
        return max(each, math.ceil(top_k / groups)) * groups

    def estimate(self, found: Estimate) -> None:
        for p in found.projections:
            kept = self.count(p.experts, p.top_k, p.groups)
            p.low, p.high = p.low * kept / p.experts, p.high * kept / p.experts
            p.experts = kept

    def run(self, program: Program, ctx: Context) -> bool:
        found = ctx.once("prune", lambda: Kept(facts=self.choose(program, ctx)))
        before = {m.path: m.sizes[0] for m in program.moe_layers()}
        if all(len(rows) == before[path] for path, rows in found.facts.items()):
            return False
        ctx.keep_experts(program, found.facts)
        for path, rows in found.facts.items():
            ctx.notes.append(f"{path}: {len(rows)} of {before[path]} experts kept: {rows}")
        return True

    def choose(self, program: Program, ctx: Context) -> dict[str, list[int]]:
        """Steps 1 and 2: return the experts that stay, ascending, by path."""
        stream, keep = Stream(program, first_tokens(ctx.batches, self.tokens), ctx.workers), {}
        groups = program.expert_groups()
        last = max((m.layer for m in program.moe_layers()), default=0)
        for stage in ctx.progress(range(last + 1), "prune"):
            layer = Layer(stage, program, program, stream, stream)
            for moe in layer.moe:
                count = self.count(moe.sizes[0], moe.top_k, groups)
                keep[moe.path] = highest(expert_scores(layer, moe), count, groups)
            stream.advance()
        return keep


def expert_scores(layer: Layer, moe: MoE) -> Tensor:
    """Step 1 for one layer: return the scores [E]."""
    names = [n.name for n in moe.node.args[:3] if isinstance(n, fx.Node)]
    tapped = layer.tap(names)
    x, index, weight = (torch.cat([v.flatten(0, -2) for v in tapped[n]]) for n in names)
    operands = [None if n is None else layer.program.value(n) for n in moe.node.args[3:]]
    scores = torch.zeros(moe.sizes[0], dtype=torch.float64)
    # one expert per token at a time, so that each output is its own
    for slot in range(index.shape[1]):
        chosen, one = index[:, slot : slot + 1], torch.ones_like(weight[:, slot : slot + 1])
        y = EXPERTS(x, chosen, one, *operands, **moe.attributes)
        norms = y.double().norm(dim=-1) * weight[:, slot].double().abs()
        scores.index_add_(0, chosen[:, 0].cpu(), norms.cpu())  # layers may run on a GPU
    return scores / len(x)


def highest(scores: Tensor, count: int, groups: int = 1) -> list[int]:
    """Return the `count` experts of highest score, ascending.

    groups: of neighbouring experts; equally many are taken of each.
    """
    each = scores.view(groups, -1)
    best = each.argsort(dim=-1, descending=True, stable=True)[:, : count // groups]
    offset = torch.arange(groups).unsqueeze(-1) * each.shape[1]
    return sorted((best + offset).flatten().tolist())
