"""Modules that hold compressed tensors in place of dense weights, as `moecc compile` stores them.

  CompressedProjection   one projection of a layer's experts (`moecc.ir.vq4`)
  QuantizedLinear        one group-quantized linear

`compress_module` gives an experts module its compressed projections; what it computes then is
`moecc.frontend.experts.run_experts`. `settle` brings loaded tensors into the order that the
kernels of their device want.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Self

import torch
from torch import Tensor, nn

from moecc import target
from moecc.checkpoint.schema import ATTRIBUTES, StoredLinear, TensorSpecs
from moecc.errors import MoeccError
from moecc.ir import ops as ops  # defines the op that QuantizedLinear calls
from moecc.ir import vq4
from moecc.target import Kernels


def _register_buffers(module: nn.Module, names: Sequence[str], specs: TensorSpecs) -> None:
    for name in names:
        tensor = None
        if name in specs:
            shape, dtype = specs[name]
            tensor = torch.empty(tuple(shape), dtype=getattr(torch, dtype))
        module.register_buffer(name, tensor)


class CompressedProjection(nn.Module):
    """The stored tensors of one projection of a layer's experts (`moecc.ir.vq4`).

    A tensor that the projection lacks is None. On a device for which a target has kernels
    (`moecc.target`), codes and signs lie in the order of those kernels; saving and loading convert,
    so a checkpoint always has the stored order. gated: the rows are all gate rows, then as many up
    rows.
    """

    codes: Tensor
    codebook: Tensor

    def __init__(self, specs: TensorSpecs, *, gated: bool):
        super().__init__()
        self.gated = gated
        self.packed: str | None = None  # the name of the target in whose order the codes are
        self.place: str | None = None  # the type of device that this was last settled for
        self._columns = 0  # of the stored codes, while they are packed
        _register_buffers(self, vq4.TENSORS, specs)

    def tensors(self) -> tuple[Tensor | None, ...]:
        """Return the tensors of vq4.TENSORS, in the order in which they lie here."""
        return tuple(getattr(self, name) for name in vq4.TENSORS)

    def operands(self) -> tuple[Tensor | None, ...]:
        """Return the projection's operands of moecc::vq_experts.

        Slope and offset are None: they are folded into the stored tensors.
        """
        return (*self.tensors(), None, None)

    def settle(self) -> None:
        """Bring the codes into the order that the kernels of their present device want."""
        self.place = self.codes.device.type
        wanted = target.kernels_for(self.place)
        if (wanted and wanted.name) != self.packed and self.place != "meta":
            self.unpack()
            if wanted is not None:
                self.pack(wanted)

    def pack(self, kernels: Kernels) -> None:
        """Replace the stored codes and signs by those in the order of `kernels`."""
        self._columns = self.codes.shape[2] * self.codebook.shape[2]
        self._replace(
            kernels.pack(dict(zip(vq4.TENSORS, self.tensors(), strict=True)), gated=self.gated)
        )
        self.packed = kernels.name

    def unpack(self) -> None:
        """Bring codes and signs back into the stored order."""
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

    # .to() and .cuda() call this one.
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.settle()
        return self

    def _save_to_state_dict(
        self, destination: dict[str, Tensor], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.packed is not None:
            for name, tensor in self._stored().items():
                if tensor is not None:
                    destination[prefix + name] = tensor

    def _load_from_state_dict(self, *args: object) -> None:
        packed = self.packed
        self.unpack()
        super()._load_from_state_dict(*args)
        if packed is not None:
            self.pack(target.kernels_called(packed))


class QuantizedLinear(nn.Module):
    """A group-quantized nn.Linear: moecc::q_linear on stored codes, scale, zero and maybe bias."""

    def __init__(self, stored: StoredLinear):
        super().__init__()
        self.bits, self.codes_name = stored.bits, stored.codes
        _register_buffers(self, (stored.codes, "scale", "zero", "bias"), stored.tensors)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N] in x's dtype."""
        y: Tensor = torch.ops.moecc.q_linear(
            x, getattr(self, self.codes_name), self.scale, self.zero, self.bias, bits=self.bits
        )
        return y


def compressed_attributes(module: nn.Module) -> Mapping[str, str | float] | None:
    """Return the op's attributes that a compressed module was given, or None for a dense one."""
    return module.__dict__.get("_moecc_attributes")


def compress_module(
    module: nn.Module,
    gate_up: TensorSpecs,
    down: TensorSpecs,
    attributes: Mapping[str, str | float],
    remove: Sequence[str],
) -> None:
    """Replace dense parameters of an experts module by children `gate_up` and `down` to be loaded.

    attributes: those of moecc::vq_experts (ATTRIBUTES). remove: the dense parameters, dotted,
    relative to the module. The children have the same names in every family. Raise MoeccError if
    the module has an attribute of such a name already.
    """
    for name in remove:
        path, _, leaf = name.rpartition(".")
        delattr(module.get_submodule(path), leaf)
    for name, specs in (("gate_up", gate_up), ("down", down)):
        if hasattr(module, name):
            raise MoeccError(
                f"{type(module).__name__} has an attribute {name!r} already; "
                "it can't hold compressed experts"
            )
        gated = name == "gate_up" and attributes["gate"] != "none"
        module.add_module(name, CompressedProjection(specs, gated=gated))
    module.__dict__["_moecc_attributes"] = {key: attributes[key] for key in ATTRIBUTES}


def settle(model: nn.Module) -> None:
    """Bring every compressed projection of a loaded model into the order that its device wants."""
    for module in model.modules():
        if isinstance(module, CompressedProjection):
            module.settle()
