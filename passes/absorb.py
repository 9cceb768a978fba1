"""Takes in a LoRA adapter that was trained on the compressed model; `lora` is for the float one.

PEFT trains adapters of dense matrices on the compressed model as transformers loads it. It trains
adapters of routed experts on a model that holds their decoded weights.

  1. Add the updates of dense matrices exactly, rounded to the type that the matrix is stored in
     (`_tune.update`).
  2. Turn the common part of the experts' updates into `rank` more rows of the layer's shared basis:
     top singular vectors under the second moments of the input, as `klt` finds its own
     (`_code.basis`, steps 2 to 7). Codes stay.
  3. The audit has the share of the update's effect that is lost in each projection:
     |U - stored|^2 / |U|^2 under these moments. It includes the new rounding of a basis that was
     there already.

Shapes: E experts, N rows, K columns, D hidden; U [E, N, K] the update. Cost in bits per weight of
gate_up: 8 rank / D and 16 rank / (E N) for the rows, and 16 / D if there was no basis.
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
from moecc.ir.relative import relative
from moecc.options import option
from moecc.passes._code.basis import factorize
from moecc.passes._code.half import compact
from moecc.passes._code.metric import weighted_error
from moecc.passes._code.moments import hidden_units, mean_outer, routed_tokens
from moecc.passes._tune.peft import Adapter, adapter_files, require_fitting
from moecc.passes._tune.update import Update, merge_into
from moecc.pipeline.bits import basis_bits
from moecc.pipeline.estimate import Estimate
from moecc.pipeline.passes import Context, Layer, Pass
from moecc.pipeline.stream import Stream

_PARTS = ("basis", "coef", "coef_scale")
Parts = tuple[Tensor, Tensor, Tensor]  # basis, coef, coef_scale, as floats


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
        # on top, because only an adapter of the experts makes the bases grow
        for p in found.projections:
            rank = min(self.rank, p.columns if p.input_side else p.rows)
            p.on_top += basis_bits(rank, p.experts, p.rows, p.columns, input_side=p.input_side)

    def run(self, program: Program, ctx: Context) -> bool:
        assert ctx.reference is not None
        updates = Adapter.read(self.name, self.path).updates(ctx.reference)
        experts = {
            weight
            for moe in ctx.reference.moe_layers()
            for projection in moe.projections
            for weight in ctx.reference.parameters_of(projection, "")
        }
        adapted = ctx.reference.copy()
        for weight, update in updates.items():
            if weight in experts:
                adapted.tensors.spill(weight, partial(_sum, ctx.reference, weight, update))
            else:
                merge_into(program, weight, update)
                ctx.record(weight, lora=str(update))
        last = max((m.layer for m in program.moe_layers()), default=0)
        stream = Stream(program, ctx.batches, ctx.workers)
        for stage in ctx.progress(range(last + 1 if experts & updates.keys() else 0), "absorb"):
            layer = Layer(stage, program, ctx.reference, stream, stream)
            for moe in layer.moe:
                self.absorb(layer, moe, adapted, ctx)
            stream.advance()
        return bool(updates)

    def absorb(self, layer: Layer, moe: MoE, adapted: Program, ctx: Context) -> None:
        """Step 2 for those projections of a layer's experts that have an update.

        Raise MoeccError if the experts are not coded.
        """
        after = replace(layer, reference=adapted)
        updates: dict[Projection, Tensor] = {
            p: after.original(p) - layer.original(p)  # type: ignore[operator]
            for p in moe.projections
        }
        if not any(bool(u.any()) for u in updates.values()):
            return
        if moe.node.target is not VQ_EXPERTS:
            raise MoeccError(
                f"{moe.path}: its experts are dense; merge the adapter with lora{{path=...}} "
                "before coding"
            )
        moments = _moments(layer, moe)
        for p, update in updates.items():
            if update.any():
                lost = self.grow(layer, p, update, moments[p.name])
                ctx.record(p.path, lora=f"rank {self.rank} of the basis", lora_lost=lost)

    def grow(self, layer: Layer, projection: Projection, update: Tensor, moment: Tensor) -> float:
        """Add the rows, store the projection's new shared part, and return the lost share."""
        side = projection.input_side
        rank = min(self.rank, update.shape[2 if side else 1])
        # coefficients of weights of this size stay clear of float16's least numbers
        size = update.square().mean().sqrt() / 0.02
        found = factorize(update / size, moment, rank, input_side=side).tensors
        basis, coef, scale = (found[n].float() for n in _PARTS)  # type: ignore[union-attr]
        new = basis * size, coef, scale
        old = [layer.weight(projection, n) for n in _PARTS]
        before, ways = update.new_zeros(()), [new]
        if old[0] is not None and old[1] is not None and old[2] is not None:
            before = vq4.basis_part(old[1], old[2], old[0], torch.float32, input_side=side)
            join = _rows_joined if side else _columns_joined
            ways = list(join((old[0], old[1], old[2]), new))
        whole = weighted_error(update, moment).sum()
        best, lost = ways[0], torch.inf
        for way in ways:
            stored = compact(way[0]), way[1].to(torch.int8), compact(way[2])
            after = vq4.basis_part(stored[1], stored[2], stored[0], torch.float32, input_side=side)
            left = weighted_error(update - (after - before), moment).sum()
            error = float(relative(left, whole))
            best, lost = (stored, error) if error < lost else (best, lost)
        parts = zip(_PARTS, best, strict=True)
        projection.set_operands(
            {name: layer.program.add(f"{projection.path}.{name}", t) for name, t in parts}
        )
        return lost


def _columns_joined(old: Parts, new: Parts) -> Iterator[Parts]:
    """down: every row of the basis has a scale of its own, so there is one way."""
    basis, coef, scale = (torch.cat([o, n], d) for o, n, d in zip(old, new, (0, 1, 1), strict=True))
    yield basis, coef, scale


def _rows_joined(old: Parts, new: Parts) -> Iterator[Parts]:
    """gate_up: one scale for all coefficients of an expert's row, so there are several ways.

    Each stretches the new basis by another factor, so that the new coefficients need no larger a
    scale than the old ones, on none to all of the rows. The other rows are rounded anew.
    """
    coarse, fine = old[1] * old[2].unsqueeze(-1), new[1] * new[2].unsqueeze(-1)
    fits = 127 * old[2] / fine.abs().amax(-1).clamp(min=1e-30)
    fits = fits[(fits > 0) & (fits < 1e20)]
    shares = fits.new_tensor([0.0, 0.25, 0.5, 0.75, 1.0])
    for fit in torch.quantile(fits, shares) if len(fits) else [fits.new_ones(())]:
        least = torch.maximum(old[2], (fine * fit).abs().amax(-1) / 127)
        scale = compact(least.clamp(min=1e-8)).float()
        coef = torch.cat([coarse, fine * fit], -1) / scale.unsqueeze(-1)
        yield torch.cat([old[0], new[0] / fit]), coef.round().clamp(-127, 127), scale


def _sum(program: Program, weight: str, update: Update) -> Tensor:
    """The adapted weight, unrounded."""
    return program.read(weight).float() + update.delta().to(program.device)


def _moments(layer: Layer, moe: MoE) -> dict[str, Tensor]:
    """Second moments [E, K, K] of both projections' inputs, hidden units by the float experts."""
    routed = routed_tokens(layer, moe)
    gate_up, down = (layer.original(p) for p in moe.projections)
    bias = layer.original(moe.gate_up, "bias")
    assert gate_up is not None and down is not None
    hidden = gate_up.new_empty(len(gate_up), *[down.shape[2]] * 2)
    for e, weight in enumerate(gate_up):
        x, own = routed.x[routed.rows(e)], None if bias is None else bias[e]
        hidden[e] = mean_outer(hidden_units(moe.attributes, x, weight, own))
    unused = hidden.diagonal(dim1=-2, dim2=-1).sum(-1) == 0
    # An expert without tokens gets the others' mean: damping would make zeros the identity, and
    # then it would count as much as all others.
    hidden[unused] = hidden.sum(0) / max(1, int((~unused).sum()))
    return {"gate_up": mean_outer(routed.x).expand(len(gate_up), -1, -1), "down": hidden}
