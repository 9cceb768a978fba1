"""Takes a PEFT LoRA adapter that was trained on the compressed model into it: `lora` is for one trained on the float model.

  1. Dense matrices get their update exactly, rounded to the type they are stored in (`_peft`).
  2. What the experts' updates have in common becomes `rank` more rows of the layer's shared basis: top singular vectors under the
     second moments of what enters, as `klt` finds its own (`_shared`, steps 2 to 7). Codes stay.
  3. The audit has, per projection, which share of the update's effect is lost: |U - stored|^2 / |U|^2 under those moments, U
     [E, N, K] the update; the rounding of the basis that was there already is counted in.

Cost in bits per weight of gate_up: 8 rank / D, and 16 rank / (E N) for the rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from moecc import vq4
from moecc.base import Context, Layer, MoeccError, Pass, option
from moecc.ir import MoE, Program
from moecc.ops import VQ_EXPERTS
from moecc.passes._coding import weighted_error
from moecc.passes._moments import hidden_units, mean_outer, routed_tokens
from moecc.passes._peft import Adapter, adapter_files, merge_into
from moecc.passes._shared import factorize
from moecc.passes._store import compact
from moecc.stream import Stream

_PARTS = ("basis", "coef", "coef_scale")


@dataclass(frozen=True, kw_only=True)
class AbsorbLora(Pass):
    name: ClassVar[str] = "absorb"
    requires: ClassVar[frozenset[str]] = frozenset({"folded"})
    after: ClassVar[frozenset[str]] = frozenset({"routing", "merged"})
    provides: ClassVar[frozenset[str]] = frozenset({"absorbed"})
    needs_data: ClassVar[bool] = True
    path: str = option("", help="folder with adapter_config.json and adapter_model.safetensors")
    rank: int = option(16, help="rows that the basis of each adapted projection grows by", low=1, high=1024)

    def files(self) -> list[Path]:
        return adapter_files(self.path)

    def run(self, program: Program, ctx: Context) -> bool:
        assert ctx.reference is not None
        updates = Adapter.read(self.path).updates(program)
        experts = {w for moe in ctx.reference.moe_layers() for w in _sources(ctx.reference, moe)}
        adapted = ctx.reference.copy()
        for weight, update in updates.items():
            if weight in experts:
                adapted.tensors[weight] = adapted.read(weight).float() + update.delta()
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
        found = next(m for m in adapted.moe_layers() if m.path == moe.path)
        before = next(m for m in layer.reference.moe_layers() if m.path == moe.path)
        updates = {p: _read(adapted, found, p) - _read(layer.reference, before, p) for p in ("gate_up", "down")}
        if not any(bool(u.any()) for u in updates.values()):
            return
        if moe.node.target is not VQ_EXPERTS:
            raise MoeccError(
                f"{moe.path}: its experts are dense; merge the adapter with lora{{path=...}} before coding"
            )
        moments = _moments(layer, moe)
        for projection, update in updates.items():
            if update.any():
                lost = self.grow(layer, moe, projection, update, moments[projection])
                ctx.record(f"{moe.path}.{projection}", lora=f"rank {self.rank} of the basis", lora_lost=lost)

    def grow(self, layer: Layer, moe: MoE, projection: str, update: Tensor, moment: Tensor) -> float:
        """Add the rows and store the projection's new shared part; the share that is lost."""
        input_side = projection == "gate_up"
        rank = min(self.rank, update.shape[2 if input_side else 1])
        basis, coef, scale = (factorize(update, moment, rank, input_side=input_side).tensors[n] for n in _PARTS)
        assert basis is not None and coef is not None and scale is not None
        old = {n: layer.weight(moe, f"{projection}_{n}") for n in _PARTS}
        before = update.new_zeros(())
        if old["basis"] is not None and old["coef"] is not None and old["coef_scale"] is not None:
            before = vq4.basis_part(old["coef"], old["coef_scale"], old["basis"], torch.float32, input_side=input_side)
            basis = compact(torch.cat([old["basis"], basis.float()]))
            if input_side:  # one scale for a row of all coefficients
                wide = torch.cat(
                    [old["coef"] * old["coef_scale"].unsqueeze(-1), coef * scale.float().unsqueeze(-1)], -1
                )
                scale = (wide.abs().amax(-1) / 127).clamp(min=6e-5).half()
                coef = (wide / scale.float().unsqueeze(-1)).round().clamp(-127, 127).to(torch.int8)
            else:
                coef = torch.cat([old["coef"].to(torch.int8), coef], 1)
                scale = compact(torch.cat([old["coef_scale"], scale.float()], 1))
        args, names = list(moe.node.args), [a.name for a in VQ_EXPERTS._schema.arguments]
        for name, tensor in zip(_PARTS, (basis, coef, scale), strict=True):
            args[names.index(f"{projection}_{name}")] = layer.program.add(f"{moe.path}.{projection}.{name}", tensor)
        moe.node.args = tuple(args)
        stored = vq4.basis_part(coef, scale, basis, torch.float32, input_side=input_side) - before
        lost = weighted_error(update - stored, moment).sum() / weighted_error(update, moment).sum().clamp(min=1e-30)
        return float(lost)


def _sources(program: Program, moe: MoE) -> tuple[str, ...]:
    """The model's parameters behind an experts node's two matrices."""
    nodes = [moe.operand(p) for p in ("gate_up", "down")]
    return tuple(s for n in nodes if n is not None for s in program.origins(program.weights[n.name].name))


def _read(program: Program, moe: MoE, projection: str) -> Tensor:
    node = moe.operand(projection)
    assert node is not None
    return program.read(program.weights[node.name].name).float()


def _moments(layer: Layer, moe: MoE) -> dict[str, Tensor]:
    """Second moments [E, K, K] of what enters both projections; the hidden units are the float experts'."""
    routed = routed_tokens(layer, moe)
    gate_up, bias = layer.original(moe, "gate_up"), layer.original(moe, "gate_up_bias")
    assert gate_up is not None
    experts = range(len(gate_up))
    hidden = [
        mean_outer(hidden_units(moe, routed.x[routed.rows(e)], gate_up[e], None if bias is None else bias[e]))
        for e in experts
    ]
    return {"gate_up": mean_outer(routed.x).expand(len(gate_up), -1, -1), "down": torch.stack(hidden)}
