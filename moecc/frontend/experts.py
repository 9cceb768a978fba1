"""Experts modules of transformers as `moecc::experts`: their layout, and canonical operands.

  1. `layout_of` finds a module's gate function by running it on random numbers; the flags of
     transformers don't tell.
  2. `dense_operands` makes the op's canonical operands from the module's parameters by plain tensor
     ops (transpose, reorder).
  3. `run_experts` is the one place that calls the op: on those operands, or on the stored tensors
     of a compressed module (`moecc.frontend.compressed`).

`register()` makes 3 the experts implementation "moecc" of transformers. `moecc.frontend.families`
covers the families outside that interface.
Shapes: E experts, D hidden, F intermediate, T tokens, k experts per token.
  gate_up [E, 2F or F, D], gate rows first; down [E, D, F]
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moecc import target
from moecc.checkpoint.schema import METHOD
from moecc.errors import MoeccError
from moecc.frontend.compressed import compressed_attributes
from moecc.frontend.probe import GateAttributes, Layout, probe_gate, probe_post_norm
from moecc.ir import ops as ops  # defines the ops that run_experts calls
from moecc.types import FamilyModule

IMPLEMENTATION = "moecc"


class DenseOperands(NamedTuple):
    """The op's weight operands, rows and axes in canonical order."""

    gate_up: Tensor
    down: Tensor
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None


@dataclass(frozen=True)
class ExpertsClass:
    """The operands and the gate of an experts class outside transformers' interface."""

    operands: Callable[[nn.Module], DenseOperands]
    layout: Callable[[nn.Module], Layout]


EXPERTS_CLASSES: dict[str, ExpertsClass] = {}  # by class name; `moecc.frontend.families` fills it


def is_experts(module: nn.Module) -> bool:
    """Return whether `module` holds the routed experts of one layer and moecc can run it."""
    interface = (
        hasattr(module, "_apply_gate")
        and hasattr(module, "has_gate")
        and hasattr(module, "is_transposed")
    )
    return interface or type(module).__name__ in EXPERTS_CLASSES


def experts_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return every experts module of `model` by its dotted path, in the model's order."""
    return {path: module for path, module in model.named_modules() if is_experts(module)}


def layout_of(module: nn.Module) -> Layout:
    """Return the gate and the storage order of an experts module.

    The first call must be outside fake mode. Raise MoeccError if the gate isn't known.
    """
    layout: Layout | None = module.__dict__.get("_moecc_layout")
    if layout is None:
        known = EXPERTS_CLASSES.get(type(module).__name__)
        layout = known.layout(module) if known else probe_gate(module)
        module.__dict__["_moecc_layout"] = layout
    return layout


def gate_of(module: nn.Module) -> GateAttributes:
    """Return act, gate, alpha and limit of an experts module: the op's attributes without eps."""
    return layout_of(module).gate_attributes()


def dense_operands(module: FamilyModule) -> DenseOperands:
    """Return the module's dense parameters as canonical operands.

    Only plain tensor ops are used, so that a trace records them.
    """
    if known := EXPERTS_CLASSES.get(type(module).__name__):
        return known.operands(module)
    layout = layout_of(module)
    prefix = "gate_up_proj" if module.has_gate else "up_proj"
    gate_up, down = getattr(module, prefix), module.down_proj
    gate_up_bias = getattr(module, f"{prefix}_bias") if module.has_bias else None
    down_bias = module.down_proj_bias if module.has_bias else None
    if layout.transposed:
        gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
    if layout.interleaved:
        gate_up = deinterleave(gate_up)
        gate_up_bias = None if gate_up_bias is None else deinterleave(gate_up_bias)
    return DenseOperands(gate_up, down, gate_up_bias, down_bias)


def deinterleave(rows: Tensor) -> Tensor:
    """Return [E, 2F, ...] with gate and up rows alternating as the same with gate rows first."""
    return rows.view(rows.shape[0], -1, 2, *rows.shape[2:]).transpose(1, 2).flatten(1, 2)


def post_norm_of(module: FamilyModule) -> tuple[Tensor | None, float]:
    """Return weight and epsilon of the norm on each expert's output, (None, 0) if it has none."""
    if not getattr(module, "has_post_expert_norm", False):
        return None, 0.0
    norm = module.post_expert_norm
    if "_moecc_post_norm" not in module.__dict__:
        module.__dict__["_moecc_post_norm"] = probe_post_norm(norm, type(module).__name__)
    return 1.0 + norm.weight, module.__dict__["_moecc_post_norm"]


def probe(module: nn.Module) -> None:
    """Find layout and norm now, outside fake mode; raise MoeccError if one isn't known."""
    layout_of(module)
    post_norm_of(module)


def run_experts(module: FamilyModule, x: Tensor, topk_index: Tensor, topk_weight: Tensor) -> Tensor:
    """Call moecc::experts for a dense module, moecc::vq_experts for a compressed one.

    x [T, D]; topk_index and topk_weight [T, k]; result [T, D]. Packed codes go to the op that takes
    them in that order. Raise MoeccError if offloading lends the codes to a device with kernels of
    its own.
    """
    routed = (x, topk_index.to(torch.int64), topk_weight)
    post_norm, eps = post_norm_of(module)
    if attributes := compressed_attributes(module):
        gate_up, down = module.gate_up(), module.down()
        if module.gate_up.packed:
            tiles = (*gate_up, *down)
            packed: Tensor = torch.ops.moecc.vq_experts_packed(
                *routed, *tiles, post_norm, **attributes
            )
            return packed
        if module.gate_up.place not in (None, x.device.type) and target.kernels_for(x.device.type):
            raise MoeccError(
                f"experts that were loaded on {module.gate_up.place} are lent to {x.device.type} "
                "for a moment, which the kernels there don't support; load them there "
                f"(device_map), or set {target.VARIABLE}=reference"
            )
        # Slope and offset are None: they are folded into the stored tensors.
        stored = (*gate_up, None, None, *down, None, None)
        compressed: Tensor = torch.ops.moecc.vq_experts(*routed, *stored, post_norm, **attributes)
        return compressed
    dense: Tensor = torch.ops.moecc.experts(
        *routed, *dense_operands(module), post_norm, **gate_of(module), eps=eps
    )
    return dense


# The names of the parameters are those that transformers' interface passes.
def experts_forward(
    module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The experts implementation "moecc" of transformers."""
    return run_experts(module, hidden_states, top_k_index, top_k_weights)


def register() -> None:
    """Make "moecc" an experts implementation of transformers.

    `from_pretrained(..., experts_implementation="moecc")` then takes it, and so does the name that
    an artifact's config.json asks for (`moecc.checkpoint.schema`).
    """
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    for name in (IMPLEMENTATION, METHOD):
        ALL_EXPERTS_FUNCTIONS.register(name, experts_forward)
