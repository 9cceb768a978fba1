"""The cost of an error in a layer's output: the metric that coding and tuning work under.

  1. Run calibration text through the float model. Take gradients g of a quantity that compression
     should keep, with respect to the experts' outputs and to the values that leave each layer.
     Their mean outer product S = E[g g^T] gives a small error d the cost d^T S d. There are two
     kinds:
       kl       g of -log p(y), y drawn from the model itself. S is the Fisher information, and
                d^T S d / 2 the divergence KL(float || changed) of the next token, to second order
                (Martens, arXiv 1412.1193, 9.2). A model without a head gives its last hidden state
                h instead: g of z . h, z standard normal, and d^T S d the squared change of h.
       routing  g of sum_r z . sqrt(q) s over all routers r behind, where s are their scores in
                standard deviations, z is standard normal, and q is the nearness of a score to the
                top-k boundary. d^T S d is how far the scores that decide are moved (VSRAQ's
                sensitivity, arXiv 2606.05688, to second order).
  2. Measure kl on even calibration batches and routing on odd ones, on up to `tokens` tokens each.
     Scale routing to weigh `routing` times as much as kl, over all layers that have a router behind
     them, and add both up.

All of this goes layer by layer, forward and backward, and expert by expert (`_tune.gradients`).
Memory: one layer without its experts, a few experts, what is alive within a layer for the `tokens`
tokens, two S [D, D], the logits of a batch, and 1 GiB of what the backward needs. Scratch disk: the
rest of that, two activations per token and layer, while a kind is measured; and two S per layer
and kind at most.

Not measured: routers whose scores the trace does not show, and routers that choose all experts; the
audit's notes name the former. Cost in bits per weight: none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moecc.ir.program import Program
from moecc.ir.tensors import CPU
from moecc.options import option
from moecc.passes._tune.gradients import AT_ONCE, IN_MEMORY, Gradients, Measured
from moecc.pipeline.estimate import Estimate
from moecc.pipeline.passes import Context, Pass
from moecc.pipeline.stream import first_tokens
from moecc.pipeline.work import Scope, Work

# time against that of its products alone: measured on layers of Qwen3-30B-A3B
_BESIDE = 1.6
_ALIVE = 10  # float32 copies of all tokens' hidden states within a layer
_LOGITS, _CHUNKS = 2, 3  # copies of a batch's logits, and of those that are worked on together


@dataclass(frozen=True, kw_only=True)
class MeasureSensitivity(Pass):
    name: ClassVar[str] = "sensitivity"
    after: ClassVar[frozenset[str]] = frozenset({"lora"})
    provides: ClassVar[frozenset[str]] = frozenset({"sensitivity"})
    needs_data: ClassVar[bool] = True
    weighs_errors: ClassVar[bool] = True
    kl: float = option(1.0, help="weight of the model's output; 0: not measured", low=0, high=1e4)
    routing: float = option(
        1.0,
        help="weight of the routers behind, relative to the output's; 0: not measured",
        low=0,
        high=1e4,
    )
    tokens: int = option(
        8192, help="calibration tokens for each of both, at most", low=1, high=1 << 30
    )

    def estimate(self, found: Estimate) -> None:
        return None

    def work(self, scope: Scope) -> Work:
        kinds = sum(bool(weight) for weight in (self.kl, self.routing))
        if not kinds:
            return Work()
        tokens = min(self.tokens, scope.tokens / kinds)
        squares = sum(layer.hidden**2 for layer in scope.layers)
        held = 2 * 4 * tokens * sum(layer.hidden for layer in scope.layers)
        alive = _ALIVE * 4 * tokens * scope.hidden
        weights = scope.largest + 3 * scope.expert + 2 * scope.hidden**2
        outputs = bool(self.kl) * 2 * scope.outputs * scope.hidden
        head = bool(self.kl) * (_LOGITS * scope.row * scope.outputs + _CHUNKS * AT_ONCE)
        return Work(
            # forward, again with a graph, and backward; and for what lies between experts
            products=_BESIDE * 3 * kinds * tokens * (scope.forward - scope.dense),
            here=_BESIDE * tokens * (kinds * (4 * scope.dense + squares) + outputs),
            memory=min(held, IN_MEMORY) + alive + 4 * (weights + head),
            scratch=max(0.0, held - IN_MEMORY),
            kept=kinds * 4 * squares,
        )

    def run(self, program: Program, ctx: Context) -> bool:
        assert ctx.reference is not None
        gradients = Gradients(ctx.reference, ctx)
        kinds = [k for k in ("kl", "routing") if getattr(self, k)]
        means: dict[str, Measured] = {}
        for i, kind in enumerate(kinds):
            batches = first_tokens(ctx.batches[i :: len(kinds)] or ctx.batches, self.tokens)
            means[kind] = gradients.once(kind, batches)
        kl, routing = (means.get(kind, Measured()) for kind in ("kl", "routing"))
        ctx.data["sensitivity"] = Combined(kl, routing, self.kl, self.routing, program.device)
        return False


class Combined(Mapping[str, Tensor]):
    """Step 2's sum, [D, D] by path of an MoE layer and by name of a value between layers.

    A sum is formed when it is asked for, because the parts may lie on disk.
    """

    def __init__(
        self,
        kl: Measured,
        routing: Measured,
        kl_weight: float,
        routing_weight: float,
        device: torch.device = CPU,
    ):
        """device: where sums are formed."""
        self.kl, self.routing, self.kl_weight, self.device = kl, routing, kl_weight, device
        both = sorted(kl.keys() & routing.keys())
        sizes = [sum(m.trace(n) for n in both) for m in (kl, routing)]
        comparable = bool(both) and sizes[1] > 0
        self.factor = routing_weight * (sizes[0] / sizes[1] * kl_weight if comparable else 1.0)

    def __iter__(self) -> Iterator[str]:
        return iter([*self.kl, *(n for n in self.routing if n not in self.kl)])

    def __len__(self) -> int:
        return len(self.kl.keys() | self.routing.keys())

    def __contains__(self, name: object) -> bool:
        return name in self.kl or name in self.routing

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.kl:
            return self.routing[name].to(self.device) * self.factor
        found = self.kl[name].to(self.device) * self.kl_weight
        if name not in self.routing:
            return found
        return found.add_(self.routing[name].to(self.device), alpha=self.factor)
