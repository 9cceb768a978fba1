"""Takes a LoRA adapter that was trained on the compressed model into it: `lora` is for one trained on the float model.

PEFT trains one of dense matrices on the compressed model as transformers loads it; one of routed experts on a model that holds
their decoded weights.

  1. Dense matrices get their update exactly, rounded to the type they are stored in (`_tune.peft`).
  2. What the experts' updates have in common becomes `rank` more rows of the layer's shared basis: top singular vectors under the
     second moments of what enters, as `klt` finds its own (`_code.basis`, steps 2 to 7). Codes stay.
  3. The audit has, per projection, which share of the update's effect is lost: |U - stored|^2 / |U|^2 under those moments, U
     [E, N, K] the update; the rounding of the basis that was there already is counted in.

Cost in bits per weight of gate_up: 8 rank / D, 16 rank / (E N) for the rows, and 16 / D where there was no basis.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from moecc.errors import MoeccError
from moecc.ir import vq4
from moecc.ir.moe import MoE, Projection
from moecc.ir.ops import VQ_EXPERTS
from moecc.ir.program import Program
from moecc.options import option
from moecc.passes._code.basis import factorize
from moecc.passes._code.half import compact
from moecc.passes._code.metric import weighted_error
from moecc.passes._code.moments import hidden_units, mean_outer, routed_tokens
from moecc.passes._tune.peft import Adapter, Update, adapter_files, merge_into, require_fitting
from moecc.pipeline.bits import basis_bits
from moecc.pipeline.estimate import Estimate
from moecc.pipeline.passes import Context, Layer, Pass
from moecc.pipeline.stream import Stream

_PARTS = ("basis", "coef", "coef_scale")


@dataclass(frozen=True, kw_only=True)
class AbsorbLora(Pass):
    name: ClassVar[str] = "absorb"
    requires: ClassVar[frozenset[str]] = frozenset({"folded"})
    after: ClassVar[frozenset[str]] = frozenset({"routing", "merged"})
    provides: ClassVar[frozenset[str]] = frozenset({"absorbed"})
    needs_data: ClassVar[bool] = True
    path: str = option("", help="folder with adapter_config.json and adapter_model.safetensors")
    rank: int = option(
        16, help="rows that the basis of each adapted projection grows by", low=1, high=1024
    )

    def files(self) -> list[Path]:
        return adapter_files(self.name, self.path)

    def check(self, program: Program) -> None:
        require_fitting(self.name, self.path, program)

    def estimate(self, found: Estimate) -> None:
        for (
            p
        ) in found.projections:  # an adapter of the experts, if there is one, makes the bases grow
            rank = min(self.rank, p.columns if p.input_side else p.rows)
            p.on_top += basis_bits(rank, p.experts, p.rows, p.columns, input_side=p.input_side)

    def run(self, program: Program, ctx: Context) -> bool:
        assert ctx.reference is not None
        updates = Adapter.read(self.name, self.path).updates(ctx.reference)
        experts = {w for moe in ctx.reference.moe_layers() for w in _sources(ctx.reference, moe)}
        adapted = ctx.reference.copy()
        for weight, update in updates.items():
            if weight in experts:
                adapted.tensors.spill(weight, partial(_sum, ctx.reference, weight, update))
            else:
                merge_into(program, weight, update)
                ctx.record(weight, lora=str(update))
        last = max((m.layer for m in program.moe_layers()), default=0)
        stream = Stream(program, ctx.batches)
        for stage in ctx.progress(range(last + 1 if experts & updates.keys() else 0), "absorb"):
            layer = Layer(stage, program, ctx.reference, stream, stream)
            for moe in layer.moe:
                self.absorb(layer, moe, adapted, ctx)
            stream.advance()
        return bool(updates)

    def absorb(self, layer: Layer, moe: MoE, adapted: Program, ctx: Context) -> None:
        """Step 2 for the projections of a layer's experts that have an update."""
        after = replace(layer, reference=adapted)
        updates: dict[Projection, Tensor] = {
            p: after.original(p) - layer.original(p)  # type: ignore[operator]
            for p in moe.projections
        }
        if not any(bool(u.any()) for u in updates.values()):
            return
        if moe.node.target is not VQ_EXPERTS:
            raise MoeccError(
                f"{moe.path}: its experts are dense; merge the adapter with lora{{path=...}} before coding"
            )
        moments = _moments(layer, moe)
        for projection, update in updates.items():
            if update.any():
                lost = self.grow(layer, projection, update, moments[projection.name])
                ctx.record(
                    projection.path,
                    lora=f"rank {self.rank} of the basis",
                    lora_lost=lost,
                )

    def grow(self, layer: Layer, projection: Projection, update: Tensor, moment: Tensor) -> float:
        """Add the rows and store the projection's new shared part; the share that is lost."""
        input_side = projection.input_side
        rank = min(self.rank, update.shape[2 if input_side else 1])
        size = (
            update.square().mean().sqrt() / 0.02
        )  # coefficients of weights of this size keep off float16's least
        found = factorize(update / size, moment, rank, input_side=input_side).tensors
        basis, coef, scale = (found[n].float() for n in _PARTS)  # type: ignore[union-attr]
        basis = basis * size
        old = [layer.weight(projection, n) for n in _PARTS]
        before, ways = update.new_zeros(()), [(basis, coef, scale)]
        if old[0] is not None and old[1] is not None and old[2] is not None:
            before = vq4.basis_part(old[1], old[2], old[0], torch.float32, input_side=input_side)
            join = _rows_joined if input_side else _columns_joined
            ways = list(join((old[0], old[1], old[2]), (basis, coef, scale)))
        whole, best, lost = (
            weighted_error(update, moment).sum().clamp(min=1e-30),
            ways[0],
            torch.inf,
        )
        for way in ways:
            stored = compact(way[0]), way[1].to(torch.int8), compact(way[2])
            after = vq4.basis_part(
                stored[1], stored[2], stored[0], torch.float32, input_side=input_side
            )
            error = float(weighted_error(update - (after - before), moment).sum() / whole)
            best, lost = (stored, error) if error < lost else (best, lost)
        parts = zip(_PARTS, best, strict=True)
        projection.set_operands(
            {name: layer.program.add(f"{projection.path}.{name}", t) for name, t in parts}
        )
        return lost


Parts = tuple[Tensor, Tensor, Tensor]  # basis, coef, coef_scale, as floats


def _columns_joined(old: Parts, new: Parts) -> Iterator[Parts]:
    """down: every row of the basis has a scale of its own."""
    yield (
        torch.cat([old[0], new[0]]),
        torch.cat([old[1], new[1]], 1),
        torch.cat([old[2], new[2]], 1),
    )


def _rows_joined(old: Parts, new: Parts) -> Iterator[Parts]:
    """gate_up: an expert's row has one scale for all its coefficients. The new basis is stretched so that the new ones need no
    larger a scale than the old, on none to all of the rows; the others are rounded anew."""
    coarse, fine = old[1] * old[2].unsqueeze(-1), new[1] * new[2].unsqueeze(-1)
    fits = 127 * old[2] / fine.abs().amax(-1).clamp(min=1e-30)
    fits = fits[(fits > 0) & (fits < 1e20)]
    for fit in (
        torch.quantile(fits, torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]))
        if len(fits)
        else [torch.ones(())]
    ):
        scale = compact(
            torch.maximum(old[2], (fine * fit).abs().amax(-1) / 127).clamp(min=1e-8)
        ).float()
        coef = torch.cat([coarse, fine * fit], -1) / scale.unsqueeze(-1)
        yield torch.cat([old[0], new[0] / fit]), coef.round().clamp(-127, 127), scale


def _sum(program: Program, weight: str, update: Update) -> Tensor:
    """The adapted weight, unrounded."""
    return program.read(weight).float() + update.delta()


def _sources(program: Program, moe: MoE) -> tuple[str, ...]:
    """The model's parameters behind an experts node's two matrices."""
    nodes = [p.operand() for p in moe.projections]
    return tuple(
        s for n in nodes if n is not None for s in program.origins(program.weights[n.name].name)
    )


def _moments(layer: Layer, moe: MoE) -> dict[str, Tensor]:
    """Second moments [E, K, K] of what enters both projections; the hidden units are the float experts'."""
    routed = routed_tokens(layer, moe)
    gate_up, down = (layer.original(p) for p in moe.projections)
    bias = layer.original(moe.gate_up, "bias")
    assert gate_up is not None and down is not None
    hidden = gate_up.new_empty(len(gate_up), *[down.shape[2]] * 2)
    for e, weight in enumerate(gate_up):
        units = hidden_units(
            moe, routed.x[routed.rows(e)], weight, None if bias is None else bias[e]
        )
        hidden[e] = mean_outer(units)
    unused = hidden.diagonal(dim1=-2, dim2=-1).sum(-1) == 0
    hidden[unused] = hidden.sum(0) / max(
        1, int((~unused).sum())
    )  # else it would count as much as all others
    return {"gate_up": mean_outer(routed.x).expand(len(gate_up), -1, -1), "down": hidden}
