"""The tensors that are trained across the whole model: adapters of dense matrices, and experts.

Shapes: W [N, K] gets W + B A with A [rank, K], B [N, rank].
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, fx

from moecc.ir.ops import VQ_EXPERTS
from moecc.ir.program import Program
from moecc.passes._tune.linears import linears
from moecc.passes._tune.low_rank import attach
from moecc.passes._tune.tuned import Group, Tuned
from moecc.pipeline.passes import Context
from moecc.pipeline.stream import StageWeights, fits_in_memory


class Trained:
    """Adapters A and B of dense matrices by placeholder, and the experts' stored tensors."""

    def __init__(self, program: Program, ctx: Context, *, rank: int, experts: bool, lr: float):
        """rank: rows of each adapter, 0 for none. experts: whether to train them. lr: a factor.

        The audit names each linear that gets no adapter.
        """
        self.program, self.lr = program, lr
        # the adapted weights, read once if they fit
        self.kept = StageWeights(program) if fits_in_memory(program, ctx.spare) else None
        coded = [m for m in program.moe_layers() if m.node.target is VQ_EXPERTS]
        self.experts = Tuned(program, coded if experts else [])
        self.a: dict[str, Tensor] = {}
        self.b: dict[str, Tensor] = {}
        for stage in range(program.layers) if rank else ():
            for node, name, reason in linears(program, stage):
                weight = node.args[1]
                assert isinstance(weight, fx.Node)
                if reason or program.weights[weight.name].recipe is not None:
                    ctx.record(name, adapter=f"none: {reason or 'computed from other weights'}")
                else:
                    generator = torch.Generator().manual_seed(ctx.seed_for("rilq", name))
                    self._adapt(weight, rank, generator)

    def _adapt(self, weight: fx.Node, rank: int, generator: torch.Generator) -> None:
        rows, columns = weight.meta["val"].shape
        rank = min(rank, rows, columns)
        device = self.program.device
        a = (torch.randn(rank, columns, generator=generator) / columns**0.5).to(device)
        self.a[weight.name] = a.requires_grad_()
        self.b[weight.name] = torch.zeros(rows, rank, device=device, requires_grad=True)

    @property
    def placeholders(self) -> set[str]:
        """The placeholders whose values training changes."""
        return {*self.a, *self.experts.parameters}

    @property
    def parameters(self) -> list[Tensor]:
        """All parameters, always in the same order."""
        return [*self.a.values(), *self.b.values(), *self.experts.parameters.values()]

    def values(self, wanted: set[str]) -> Mapping[str, Tensor]:
        """Differentiable values of the placeholders `wanted`."""
        return {**self._adapted(wanted), **self.experts.rounded(wanted)}

    def stored(self, wanted: set[str]) -> Mapping[str, Tensor]:
        """Their values as `store` would leave them."""
        return {**self._adapted(wanted), **self.experts.stored(wanted)}

    def _adapted(self, wanted: set[str]) -> dict[str, Tensor]:
        weights = StageWeights(self.program) if self.kept is None else self.kept
        return {p: weights[p] + self.b[p] @ self.a[p] for p in self.a if p in wanted}

    def groups(self) -> list[Group]:
        """Parameter groups for an optimizer."""
        dense: Group = {"params": [*self.a.values(), *self.b.values()], "lr": 3e-4 * self.lr}
        return [*([dense] if self.a else []), *self.experts.groups(0.15 * self.lr)]

    def state(self) -> list[Tensor]:
        """A copy of all parameters."""
        return [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def restore(self, state: list[Tensor]) -> None:
        """Set all parameters to what `state` returned."""
        for p, value in zip(self.parameters, state, strict=True):
            p.copy_(value)

    def store(self, *, better: bool) -> bool:
        """Leave adapters and experts in the program, nothing unless they are `better`."""
        if not better:
            return False
        for placeholder, a in self.a.items():
            attach(self.program, placeholder, a.detach(), self.b[placeholder].detach())
        self.experts.store()
        return True
