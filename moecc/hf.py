"""transformers' side of an artifact: `import moecc`, then `AutoModelForCausalLM.from_pretrained(OUT)` works.

config.json of an artifact carries what the constructor has to be told, and nothing that is in the weights:
  quantization_config = {
    quant_method: "moecc", version,
    experts: {path: {attributes, remove: [dense parameters, relative], gate_up: {tensor: [shape, dtype]}, down: {...}}},
    linears: {path: {bits, tensors: {tensor: [shape, dtype]}}}}
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from moecc import adapters, experts, vq4
from moecc.errors import MoeccError

METHOD = "moecc"


class MoeccConfig(QuantizationConfigMixin):
    """The quantization_config of an artifact."""

    def __init__(
        self, version: int = vq4.VERSION, experts: Mapping[str, Any] | None = None, linears: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ):  # fmt: skip
        if version != vq4.VERSION:
            raise MoeccError(
                f"this artifact is of format version {version}, this moecc reads {vq4.VERSION}; compile it again"
            )
        self.quant_method: Any = METHOD
        self.version, self.experts, self.linears = version, dict(experts or {}), dict(linears or {})

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": METHOD, "version": self.version, "experts": self.experts, "linears": self.linears}


class MoeccQuantizer(HfQuantizer):
    """Gives a model its compressed modules before weights are loaded, and what runs them when it is known where they are."""

    requires_calibration = True
    quantization_config: MoeccConfig

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        prepare(model, self.quantization_config)
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        experts.settle(model)
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def prepare(model: nn.Module, config: Any) -> None:
    """Replace, in a model that has no weights yet, what an artifact stores in compressed form.

    `config`: a MoeccConfig, its dict, or a model configuration that has one.
    """
    settings = _settings(config)
    experts.register()
    adapters.apply_adapters(model)
    for path, entry in settings.experts.items():
        module = _submodule(model, path)
        experts.compress_module(module, entry["gate_up"], entry["down"], entry["attributes"], entry["remove"])
        for part in (*module.modules(), _submodule(model, path.rpartition(".")[0])):
            part._is_hf_initialized = True  # type: ignore[assignment]  # initializers would look for the dense parameters
    for path, entry in settings.linears.items():
        if not isinstance(_submodule(model, path), nn.Linear):
            raise MoeccError(
                f"{path}: stored as a quantized linear, but the model has no nn.Linear there; compile it again"
            )
        parent, _, leaf = path.rpartition(".")
        linear = experts.QuantizedLinear(entry["tensors"], entry["bits"])
        linear._is_hf_initialized = True  # type: ignore[assignment]
        setattr(model.get_submodule(parent), leaf, linear)
    can_dispatch = getattr(model, "_can_set_experts_implementation", None)
    if can_dispatch is not None and can_dispatch():
        model.set_experts_implementation(experts.IMPLEMENTATION)  # type: ignore[operator]


def _settings(config: Any) -> MoeccConfig:
    found = getattr(config, "quantization_config", config)
    return MoeccConfig(**{k: v for k, v in found.items() if k != "quant_method"}) if isinstance(found, dict) else found


def _submodule(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise MoeccError(
            f"{path}: stored in the artifact, but the model has no such module; compile it again"
        ) from None


def load(folder: str, dtype: torch.dtype | None = None) -> Any:
    """The transformers model of an artifact (or of any checkpoint), by the class that its configuration asks for."""
    from moecc.skeleton import model_class, read_config

    config, _ = read_config(folder)
    model = model_class(config).from_pretrained(folder, dtype=dtype or "auto", local_files_only=True)
    return model.eval()


if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
    register_quantization_config(METHOD)(MoeccConfig)
    register_quantizer(METHOD)(MoeccQuantizer)
