"""Give a model that has no weights yet the compressed modules of an artifact."""

from __future__ import annotations

from torch import nn

from moecc.checkpoint.schema import Compression
from moecc.errors import MoeccError
from moecc.frontend import experts, families
from moecc.frontend.compressed import QuantizedLinear, compress_module


def prepare(model: nn.Module, found: Compression) -> None:
    """Replace the modules of `model` that an artifact stores in compressed form.

    Raise MoeccError if the model lacks such a module.
    """
    experts.register()
    families.replace_methods(model)
    for path, entry in found.experts.items():
        module = _submodule(model, path)
        compress_module(module, entry.gate_up, entry.down, entry.attributes, entry.remove)
        # transformers' initializers would look for the dense parameters.
        for part in (*module.modules(), _submodule(model, path.rpartition(".")[0])):
            part._is_hf_initialized = True  # type: ignore[assignment]
    for path, linear in found.linears.items():
        if not isinstance(_submodule(model, path), nn.Linear):
            raise MoeccError(
                f"{path}: stored as a quantized linear, but the model has no nn.Linear there; "
                "compile it again"
            )
        parent, _, leaf = path.rpartition(".")
        quantized = QuantizedLinear(linear.tensors, linear.bits)
        quantized._is_hf_initialized = True  # type: ignore[assignment]
        setattr(model.get_submodule(parent), leaf, quantized)
    can_dispatch = getattr(model, "_can_set_experts_implementation", None)
    if can_dispatch is not None and can_dispatch():
        model.set_experts_implementation(experts.IMPLEMENTATION)  # type: ignore[operator]


def _submodule(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise MoeccError(
            f"{path}: stored in the artifact, but the model has no such module; compile it again"
        ) from None
