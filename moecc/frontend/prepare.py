"""Give a model that has no weights yet the compressed modules of an artifact, and take them away.

prepare   dense modules -> those that hold the artifact's tensors, which are loaded afterwards
restore   compressed modules -> dense ones with the weights that they stand for
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from moecc.checkpoint.schema import Compression, StoredExperts, StoredLinear
from moecc.checkpoint.values import kept_dtype
from moecc.errors import MoeccError, quoted
from moecc.frontend import experts, families
from moecc.frontend.compressed import (
    QuantizedLinear,
    compress_module,
    compressed_attributes,
    decompress_module,
    removed_parameters,
)
from moecc.ir.gates import rows_per_unit
from moecc.types import FamilyModule

# ---------------------------------------------------------------- dense to compressed


def prepare(model: FamilyModule, stored: Compression) -> Compression:
    """Replace the modules of `model` that an artifact stores in compressed form.

    Return `stored` with the paths that the modules have in `model`. Raise MoeccError if the model
    lacks such a module, or has one of another shape.
    """
    found = _relocated(model, stored)
    experts.register()
    families.replace_methods(model)
    for path, entry in found.experts.items():
        module = model.get_submodule(path)
        _require_experts(path, module, entry)
        compress_module(module, entry.gate_up, entry.down, entry.attributes, entry.remove)
        _pin(module)
        # transformers' initializers would look for the dense parameters.
        for part in (*module.modules(), model.get_submodule(path.rpartition(".")[0])):
            part._is_hf_initialized = True
    for path, linear in found.linears.items():
        _require_linear(path, model.get_submodule(path), linear)
        quantized = QuantizedLinear(linear)
        quantized._is_hf_initialized = True  # type: ignore[assignment]
        model.set_submodule(path, quantized)
    _ignore(model, found.guard)
    _set_implementation(model, experts.IMPLEMENTATION)
    return found


def _relocated(model: FamilyModule, stored: Compression) -> Compression:
    """Return `stored` with the paths that its modules have in `model`.

    A model without a head (AutoModel) has the modules of the one with a head, without that one's
    prefix; it may also be the model without a head that was stored.
    """
    modules = dict(model.named_modules())
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    paths = [*stored.experts, *stored.linears]
    ways: list[Callable[[str], str]] = [str, lambda p: p.removeprefix(prefix), prefix.__add__]
    there = [[p for p in paths if way(p) in modules] for way in ways]
    way, found = max(zip(ways, there, strict=True), key=lambda pair: len(pair[1]))
    if lost := next((p for p in paths if p not in found), None):
        raise _unlike(lost, f"{type(model).__name__} has no such module")
    return replace(
        stored,
        experts={way(p): entry for p, entry in stored.experts.items()},
        linears={way(p): entry for p, entry in stored.linears.items()},
        guard=[way(name) for name in stored.guard],
    )


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
    return MoeccError(f"{quoted(path)}: {why}, unlike what is stored; compile the model again")


def _ignore(model: FamilyModule, names: Iterable[str]) -> None:
    """Let transformers and the checkpoint's reader leave tensors of these names alone."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    patterns = {rf"(^|\.){re.escape(name.removeprefix(prefix))}$" for name in names}
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    model._keys_to_ignore_on_load_unexpected = {*ignored, *patterns}


def _pin(module: FamilyModule) -> None:
    """Let compressed experts be run by moecc whatever set_experts_implementation chooses later.

    That changes the model's configuration, so the module gets a copy.
    """
    if hasattr(module, "config"):
        module.__dict__["_moecc_config"] = module.config
        module.config = copy.copy(module.config)
        module.config._experts_implementation = experts.IMPLEMENTATION


def _set_implementation(model: FamilyModule, name: str | None) -> None:
    can_set = getattr(model, "_can_set_experts_implementation", None)
    if can_set is not None and can_set():
        model.set_experts_implementation(name)


# ---------------------------------------------------------------- compressed to dense


def restore(model: nn.Module, dtype: torch.dtype) -> None:
    """Replace the compressed modules of a loaded model by dense ones, layer by layer.

    dtype: of all floating tensors but those that the family keeps in float32. Raise MoeccError, and
    change nothing, if tensors are offloaded or if the family has no place for something stored.
    """
    trainable = all(p.requires_grad for p in model.parameters())  # not beside an adapter
    found = list(_compressed(model))
    for path, module in found:
        _require_dense(path, module)
    for path, module in found:
        if isinstance(module, QuantizedLinear):
            linear = _linear(module, dtype).requires_grad_(trainable)
            model.set_submodule(path, linear)
        else:
            for parameter in _restore_experts(module, dtype):
                parameter.requires_grad_(trainable)
    families.restore_methods(model)
    _set_implementation(model, None)  # transformers' default
    tensors = dict((*model.named_parameters(), *model.named_buffers()))
    wanted = {name: kept_dtype(model, name, t, dtype) for name, t in tensors.items()}
    for name, tensor in tensors.items():
        tensor.data = tensor.data.to(wanted[name])


def _compressed(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for path, module in model.named_modules():
        if isinstance(module, QuantizedLinear) or compressed_attributes(module):
            yield path, module


def _require_dense(path: str, module: FamilyModule) -> None:
    if any(buffer.device.type == "meta" for buffer in module.buffers()):
        raise MoeccError(f"{path}: its tensors are offloaded; load the model without offloading")
    if not isinstance(module, QuantizedLinear):
        offsets = module.gate_up.bias is not None or module.down.bias is not None
        if offsets and not any(name.endswith("bias") for name in removed_parameters(module)):
            raise MoeccError(
                f"{path}: offsets are stored, and its family has no biases to hold them; "
                "compile it without offsets"
            )


def _linear(module: QuantizedLinear, dtype: torch.dtype) -> nn.Linear:
    dense = nn.Linear(
        module.in_features, module.out_features, module.bias is not None, device="meta"
    )
    dense.weight = nn.Parameter(module.dense().to(dtype))
    if module.bias is not None:
        dense.bias = nn.Parameter(module.bias.to(dtype))
    return dense.train(module.training)


def _restore_experts(module: FamilyModule, dtype: torch.dtype) -> list[nn.Parameter]:
    """Decode the canonical operands, and bring them into the layout of the family.

    Return the parameters.

    Its operands are its parameters in another order, so the gradient of the parameters under the
    decoded operands is the decoded operands in the parameters' order. Rows that the model never
    reads, such as those of experts that do nothing, are zero.
    """
    gate_up, down, attributes = module.gate_up, module.down, compressed_attributes(module)
    assert attributes is not None
    hidden, rows = down.scale.shape[1], gate_up.scale.shape[1]
    units = rows // rows_per_unit(str(attributes["gate"]))
    decoded = gate_up.dense(hidden, input_side=True), down.dense(units, input_side=False)
    values: list[Tensor | None] = [*decoded, gate_up.bias, down.bias]
    device = gate_up.codes.device
    shapes = removed_parameters(module)
    decompress_module(
        module, {name: torch.empty(s, dtype=dtype, device=device) for name, s in shapes.items()}
    )
    parameters = [module.get_parameter(name) for name in shapes]
    with torch.enable_grad():
        pairs = [
            (operand, value.to(dtype))
            for operand, value in zip(experts.dense_operands(module), values, strict=True)
            if operand is not None and value is not None
        ]
        outputs, wanted = zip(*pairs, strict=True)
        found = torch.autograd.grad(outputs, parameters, wanted, allow_unused=True)
    for parameter, value in zip(parameters, found, strict=True):
        parameter.data = torch.zeros_like(parameter) if value is None else value.contiguous()
    if (config := module.__dict__.pop("_moecc_config", None)) is not None:
        module.config = config
    return parameters
