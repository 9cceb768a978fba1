"""Experts modules of transformers as `moecc::experts`: what a module computes, in canonical operands.

  1. `layout_of` finds a module's gate function by running it on random numbers; the flags of transformers don't tell.
  2. `dense_operands` makes the op's canonical operands of its parameters with plain tensor ops (transpose, reorder).
  3. `run_experts` is the one place that calls the op: on those operands, or on a compressed module's stored tensors.
  4. `compress_module` swaps a module's dense parameters for the tensors of `moecc.ir.vq4`, as `moecc compile` writes them.

`register()` makes 3 the experts implementation "moecc" of transformers. Families outside it: `moecc.frontend.families`.
Shapes: E experts, D hidden, F intermediate; gate_up [E, 2F or F, D], gate rows first; down [E, D, F].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from moecc import target
from moecc.errors import MoeccError
from moecc.frontend.probe import Layout, probe_gate, probe_post_norm
from moecc.ir import ops, vq4
from moecc.target import Kernels

IMPLEMENTATION = "moecc"
TensorSpecs = Mapping[
    str, tuple[Sequence[int], str]
]  # tensor name -> (shape, dtype as torch spells it: "uint8")


class DenseOperands(NamedTuple):
    """The op's weight operands in canonical order of rows and axes."""

    gate_up: Tensor
    down: Tensor
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None


@dataclass(frozen=True)
class Adapted:
    """An experts class outside transformers' interface: its operands and its gate (`moecc.frontend.families` fills ADAPTED)."""

    operands: Callable[[nn.Module], DenseOperands]
    layout: Callable[[nn.Module], Layout]


ADAPTED: dict[str, Adapted] = {}


def is_experts(module: nn.Module) -> bool:
    """Whether `module` holds the routed experts of one layer and moecc can run it."""
    interface = (
        hasattr(module, "_apply_gate")
        and hasattr(module, "has_gate")
        and hasattr(module, "is_transposed")
    )
    return interface or type(module).__name__ in ADAPTED


def experts_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every experts module of `model` by its dotted path, in the model's order."""
    return {path: module for path, module in model.named_modules() if is_experts(module)}


def layout_of(module: nn.Module) -> Layout:
    """The gate and the storage order of an experts module. Call it outside fake mode the first time."""
    layout: Layout | None = module.__dict__.get("_moecc_layout")
    if layout is None:
        adapted = ADAPTED.get(type(module).__name__)
        layout = adapted.layout(module) if adapted else probe_gate(module)
        module.__dict__["_moecc_layout"] = layout
    return layout


def gate_of(module: nn.Module) -> dict[str, Any]:
    """act, gate, alpha and limit of an experts module: the op's attributes but eps."""
    return layout_of(module).gate_attributes()


def dense_operands(module: Any) -> DenseOperands:
    """The module's dense parameters as canonical operands, by plain tensor ops that a trace records."""
    if adapted := ADAPTED.get(type(module).__name__):
        return adapted.operands(module)
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
    """[E, 2F, ...] with gate and up rows alternating -> the same with all gate rows first."""
    return rows.view(rows.shape[0], -1, 2, *rows.shape[2:]).transpose(1, 2).flatten(1, 2)


def post_norm_of(module: Any) -> tuple[Tensor | None, float]:
    """Weight and epsilon of the norm on each expert's output, where the class has one."""
    if not getattr(module, "has_post_expert_norm", False):
        return None, 0.0
    norm = module.post_expert_norm
    if "_moecc_post_norm" not in module.__dict__:
        module.__dict__["_moecc_post_norm"] = probe_post_norm(norm, type(module).__name__)
    return 1.0 + norm.weight, module.__dict__["_moecc_post_norm"]


def probe(module: nn.Module) -> None:
    """Find the layout and the norm now, outside fake mode; MoeccError where the module isn't known."""
    layout_of(module)
    post_norm_of(module)


def run_experts(module: Any, x: Tensor, topk_index: Tensor, topk_weight: Tensor) -> Tensor:
    """moecc::experts of a dense module, moecc::vq_experts of a compressed one, on the codes as they lie. x [T, D]; the
    others [T, k]."""
    routed = (x, topk_index.to(torch.int64), topk_weight)
    post_norm, eps = post_norm_of(module)
    if attributes := compressed_attributes(module):
        if module.gate_up.packed:
            tiles = (*module.gate_up.tensors(), *module.down.tensors())
            packed: Tensor = torch.ops.moecc.vq_experts_packed(
                *routed, *tiles, post_norm, **attributes
            )
            return packed
        if module.gate_up.place not in (None, x.device.type) and target.kernels_for(x.device.type):
            raise MoeccError(
                f"experts that were loaded on {module.gate_up.place} are lent to {x.device.type} for a moment, which the "
                f"kernels there don't support; load them there (device_map), or set {target.VARIABLE}=reference"
            )
        stored = (*module.gate_up.operands(), *module.down.operands())
        compressed: Tensor = torch.ops.moecc.vq_experts(*routed, *stored, post_norm, **attributes)
        return compressed
    dense: Tensor = torch.ops.moecc.experts(
        *routed, *dense_operands(module), post_norm, **gate_of(module), eps=eps
    )
    return dense


def experts_forward(
    module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:  # the signature that transformers' experts interface calls
    """The experts implementation "moecc" of transformers."""
    return run_experts(module, hidden_states, top_k_index, top_k_weights)


def register() -> None:
    """Make "moecc" an experts implementation: `from_pretrained(..., experts_implementation="moecc")`."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)


# ---------------------------------------------------------------- compressed modules


def _register_buffers(module: nn.Module, names: Sequence[str], specs: TensorSpecs) -> None:
    if unknown := set(specs) - set(names):
        raise MoeccError(f"compressed tensor {sorted(unknown)[0]!r} isn't one of {list(names)}")
    for name in names:
        tensor = None
        if name in specs:
            shape, dtype = specs[name]
            tensor = torch.empty(tuple(shape), dtype=getattr(torch, dtype))
        module.register_buffer(name, tensor)


class CompressedProjection(nn.Module):
    """The stored tensors of one projection of a layer's experts (`moecc.ir.vq4`); those that are absent are None.

    On a device for which a backend has kernels (`moecc.target`) codes and signs are in that backend's order, in place of the
    stored ones; what is saved and loaded stays as the format says. gated: its rows are gate rows and then as many up rows."""

    codes: Tensor
    codebook: Tensor

    def __init__(self, specs: TensorSpecs, *, gated: bool):
        super().__init__()
        self.gated = gated
        self.packed: str | None = None  # the target in whose order the codes are, by name
        self.place: str | None = None  # the type of device that this was last settled for
        self._columns = 0  # of the stored codes, while they are packed
        _register_buffers(self, vq4.TENSORS, specs)

    def tensors(self) -> tuple[Tensor | None, ...]:
        """By the names of vq4.TENSORS, as they lie here."""
        return tuple(getattr(self, name) for name in vq4.TENSORS)

    def operands(self) -> tuple[Tensor | None, ...]:
        """The operands of a projection in moecc::vq_experts; slope and offset are folded in what is stored."""
        return (*self.tensors(), None, None)

    def settle(self) -> None:
        """Bring the codes into the order of what runs them on the device where they are now."""
        self.place = self.codes.device.type
        wanted = target.kernels_for(self.place)
        if (wanted and wanted.name) != self.packed and self.place != "meta":
            self.unpack()
            if wanted is not None:
                self.pack(wanted)

    def pack(self, kernels: Kernels) -> None:
        """Codes and signs in the order of `kernels`, in place of the stored ones."""
        self._columns = self.codes.shape[2] * self.codebook.shape[2]
        self._replace(
            kernels.pack(dict(zip(vq4.TENSORS, self.tensors(), strict=True)), gated=self.gated)
        )
        self.packed = kernels.name

    def unpack(self) -> None:
        """Codes and signs as they are stored."""
        self._replace(self._stored())
        self.packed = None

    def _stored(self) -> dict[str, Tensor | None]:
        tensors = dict(zip(vq4.TENSORS, self.tensors(), strict=True))
        if self.packed is not None:
            tensors = target.kernels_called(self.packed).unpack(
                tensors, self._columns, gated=self.gated
            )
        return tensors

    def _replace(self, tensors: Mapping[str, Tensor | None]) -> None:
        for name, tensor in tensors.items():
            setattr(self, name, tensor)

    def _apply(
        self, fn: Callable[[Tensor], Tensor], recurse: bool = True
    ) -> Self:  # what .to() and .cuda() call
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.settle()
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.packed is not None:
            for name, tensor in self._stored().items():
                if tensor is not None:
                    destination[prefix + name] = tensor

    def _load_from_state_dict(self, *args: Any) -> None:
        packed = self.packed
        self.unpack()
        super()._load_from_state_dict(*args)
        if packed is not None:
            self.pack(target.kernels_called(packed))


def compressed_attributes(module: nn.Module) -> dict[str, Any] | None:
    """The op's attributes that a compressed module was given, None for a dense one."""
    return module.__dict__.get("_moecc_attributes")


def compress_module(
    module: nn.Module,
    gate_up: TensorSpecs,
    down: TensorSpecs,
    attributes: Mapping[str, Any],
    remove: Sequence[str],
) -> None:
    """Replace the dense parameters `remove` (dotted, relative) by children `gate_up` and `down` to be loaded.

    `attributes` are the op's: act, gate, alpha, limit, eps. The children's names are the same for every family.
    """
    for name in remove:
        path, _, leaf = name.rpartition(".")
        delattr(module.get_submodule(path), leaf)
    for name, specs in (("gate_up", gate_up), ("down", down)):
        if hasattr(module, name):
            raise MoeccError(
                f"{type(module).__name__} has an attribute {name!r} already; it can't hold compressed experts"
            )
        gated = name == "gate_up" and attributes["gate"] != "none"
        module.add_module(name, CompressedProjection(specs, gated=gated))
    module.__dict__["_moecc_attributes"] = {
        key: attributes[key] for key in ("act", "gate", "alpha", "limit", "eps")
    }


def settle(model: nn.Module) -> None:
    """Bring every compressed projection of `model` into the order of what runs it where it is; after loading."""
    for module in model.modules():
        if isinstance(module, CompressedProjection):
            module.settle()


class QuantizedLinear(nn.Module):
    """A group-quantized nn.Linear: moecc::q_linear on stored weight, scale, zero and maybe bias."""

    TENSORS = ("weight", "scale", "zero", "bias")

    def __init__(self, specs: TensorSpecs, bits: int):
        super().__init__()
        self.bits = bits
        _register_buffers(self, self.TENSORS, specs)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N] in x's dtype."""
        y: Tensor = torch.ops.moecc.q_linear(
            x, self.weight, self.scale, self.zero, self.bias, bits=self.bits
        )
        return y


_ = ops.library  # importing this module defines the ops that it calls
