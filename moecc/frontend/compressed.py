"""Modules that hold compressed tensors in place of dense weights, as `moecc compile` stores them.

  CompressedProjection   one projection of a layer's experts (`moecc.ir.vq4`)
  QuantizedLinear        one group-quantized linear

`compress_module` gives an experts module its compressed projections, `decompress_module` takes
them away; what it computes with them is `moecc.frontend.experts.run_experts`. `settle` brings
loaded tensors into the order that the kernels of their device want.
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


def _moving(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return `fn`, which may move and cast a tensor, without the cast: stored ones keep theirs."""

    def move(tensor: Tensor) -> Tensor:
        moved = fn(tensor)
        return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

    return move


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

    # The experts module calls this: offloading brings a module's tensors when it is called.
    def forward(self) -> tuple[Tensor | None, ...]:
        """Return `tensors()`."""
        return self.tensors()

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

    def dense(self, columns: int, *, input_side: bool) -> Tensor:
        """Return the float32 matrices [E, N, columns] that the tensors stand for.

        input_side: of gate_up, else of down.
        """
        return vq4.dense(self._stored(), columns, torch.float32, input_side=input_side)

    def _replace(self, tensors: Mapping[str, Tensor | None]) -> None:
        for name, tensor in tensors.items():
            setattr(self, name, tensor)

    # .to() and .cuda() call this one.
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(_moving(fn), recurse)  # type: ignore[no-untyped-call]
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


class QuantizedLinear(nn.Linear):
    """A group-quantized nn.Linear: moecc::q_linear on stored weight, scale, zero and maybe bias."""

    scale: Tensor
    zero: Tensor

    def __init__(self, stored: StoredLinear):
        nn.Module.__init__(self)  # not nn.Linear's, which makes float parameters
        self.bits = stored.bits
        _register_buffers(self, ("weight", "scale", "zero", "bias"), stored.tensors)
        self.out_features, self.in_features = stored.shape

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N] in x's dtype."""
        if self.weight.dtype != torch.uint8:
            raise MoeccError(
                "the codes of a quantized linear were overwritten, as merging an adapter does; "
                "load the model again, and call its dequantize() before merging"
            )
        y: Tensor = torch.ops.moecc.q_linear(
            x, self.weight, self.scale, self.zero, self.bias, bits=self.bits
        )
        return y

    def dense(self) -> Tensor:
        """Return the float32 matrix [N, K] that the codes stand for."""
        return ops.dequantize_linear(self.weight, self.scale, self.zero, self.bits)

    # .to() and .half() call this one.
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        return super()._apply(_moving(fn), recurse)  # type: ignore[no-untyped-call, no-any-return]


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
    shapes = {name: module.get_parameter(name).shape for name in remove}
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
    module.__dict__["_moecc_removed"] = shapes


def removed_parameters(module: nn.Module) -> Mapping[str, torch.Size]:
    """Return the shapes of the dense parameters, dotted, that a compressed module had."""
    removed: Mapping[str, torch.Size] = module.__dict__.get("_moecc_removed", {})
    return removed


def decompress_module(module: nn.Module, parameters: Mapping[str, Tensor]) -> None:
    """Replace the compressed projections of a module by dense parameters, dotted."""
    for name in ("gate_up", "down"):
        delattr(module, name)
    for name in ("_moecc_attributes", "_moecc_removed"):
        del module.__dict__[name]
    for name, tensor in parameters.items():
        path, _, leaf = name.rpartition(".")
        module.get_submodule(path).register_parameter(leaf, nn.Parameter(tensor))


def settle(model: nn.Module) -> None:
    """Bring every compressed projection of a loaded model into the order that its device wants."""
    for module in model.modules():
        if isinstance(module, CompressedProjection):
            module.settle()
