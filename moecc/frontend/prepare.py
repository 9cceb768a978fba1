"""Give a model that has no weights yet the compressed modules of an artifact."""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from moecc.checkpoint.schema import Compression, StoredExperts, StoredLinear
from moecc.errors import MoeccError
from moecc.frontend import experts, families
from moecc.frontend.compressed import QuantizedLinear, compress_module
from moecc.types import FamilyModule


def prepare(model: FamilyModule, found: Compression) -> None:
    """Replace the modules of `model` that an artifact stores in compressed form.

    Raise MoeccError if the model lacks such a module, or has one of another shape.
    """
    experts.register()
    families.replace_methods(model)
    for path, entry in found.experts.items():
        module = _submodule(model, path)
        _require_experts(path, module, entry)
        compress_module(module, entry.gate_up, entry.down, entry.attributes, entry.remove)
        # transformers' initializers would look for the dense parameters.
        for part in (*module.modules(), _submodule(model, path.rpartition(".")[0])):
            part._is_hf_initialized = True  # type: ignore[assignment]
    for path, linear in found.linears.items():
        _require_linear(path, _submodule(model, path), linear)
        parent, _, leaf = path.rpartition(".")
        quantized = QuantizedLinear(linear)
        quantized._is_hf_initialized = True  # type: ignore[assignment]
        setattr(model.get_submodule(parent), leaf, quantized)
    _ignore(model, found.guard)
    can_dispatch = getattr(model, "_can_set_experts_implementation", None)
    if can_dispatch is not None and can_dispatch():
        model.set_experts_implementation(experts.IMPLEMENTATION)


def _submodule(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise _unlike(path, "the model has no such module") from None


def _require_experts(path: str, module: nn.Module, entry: StoredExperts) -> None:
    """Raise MoeccError unless the module's dense experts are those that `entry` replaces."""
    if not experts.is_experts(module):
        raise _unlike(path, f"the model has {type(module).__name__} there, which holds no experts")
    with torch.enable_grad():
        dense = experts.dense_operands(module)
    for name, operand in (("gate_up", dense.gate_up), ("down", dense.down)):
        if tuple(operand.shape) != entry.shapes[name]:
            sizes = f"{name} has E, N, K {entry.shapes[name]}"
            raise _unlike(path, f"{sizes}, but config.json says {tuple(operand.shape)}")
    replaced = {n for n, p in module.named_parameters() if any(p is q for q in _behind(dense))}
    if sorted(entry.remove) != sorted(replaced):
        raise _unlike(path, f"it replaces {sorted(entry.remove)}, the model has {sorted(replaced)}")
    gate = experts.gate_of(module) | {"eps": experts.post_norm_of(module)[1]}
    if gate != entry.attributes:
        raise _unlike(path, f"it computes {dict(entry.attributes)}, the model {gate}")


def _behind(operands: Iterable[Tensor | None]) -> list[nn.Parameter]:
    """Return the parameters from which autograd says that `operands` were computed."""
    found, open_ends = [], []
    for operand in operands:
        if isinstance(operand, nn.Parameter):
            found.append(operand)
        elif operand is not None:
            open_ends.append(operand.grad_fn)
    while open_ends:
        node = open_ends.pop()
        if (parameter := getattr(node, "variable", None)) is not None:
            found.append(parameter)
        open_ends += [n for n, _ in getattr(node, "next_functions", ()) if n is not None]
    return found


def _require_linear(path: str, module: nn.Module, linear: StoredLinear) -> None:
    if not isinstance(module, nn.Linear):
        raise _unlike(path, "the model has no nn.Linear there")
    if linear.shape != tuple(module.weight.shape):
        raise _unlike(path, f"it is {linear.shape}, the model's {tuple(module.weight.shape)}")
    if ("bias" in linear.tensors) != (module.bias is not None):
        raise _unlike(path, "it and the model's linear don't both have a bias")


def _unlike(path: str, why: str) -> MoeccError:
    return MoeccError(f"{path!r}: {why}, unlike what is stored; compile the model again")


def _ignore(model: FamilyModule, names: Iterable[str]) -> None:
    """Let transformers and the checkpoint's reader leave tensors of these names alone."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    patterns = {rf"(^|\.){re.escape(name.removeprefix(prefix))}$" for name in names}
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    model._keys_to_ignore_on_load_unexpected = {*ignored, *patterns}
