"""transformers' side of an artifact: `import moecc`, then
`AutoModelForCausalLM.from_pretrained(OUT)` works.

config.json of an artifact tells the constructor which modules are compressed and how
(`moecc.checkpoint.schema`), and nothing that is in the weights.
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

from moecc.checkpoint.schema import METHOD, Compression, require_version
from moecc.frontend.compressed import settle
from moecc.frontend.config import model_class, read_config
from moecc.frontend.prepare import prepare
from moecc.ir import vq4


class MoeccConfig(QuantizationConfigMixin):
    """The quantization_config of an artifact."""

    def __init__(
        self,
        version: int = vq4.VERSION,
        experts: Mapping[str, Any] | None = None,
        linears: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ):
        require_version(version)
        self.quant_method: Any = METHOD
        self.version, self.experts, self.linears = version, dict(experts or {}), dict(linears or {})

    def to_dict(self) -> dict[str, Any]:
        return {
            "quant_method": METHOD,
            "version": self.version,
            "experts": self.experts,
            "linears": self.linears,
        }


class MoeccQuantizer(HfQuantizer):
    """Gives a model its compressed modules before weights are loaded, and their kernels once it is
    known where they are.
    """

    requires_calibration = True
    quantization_config: MoeccConfig

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        prepare(model, Compression.of(self.quantization_config))
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        settle(model)
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def load(folder: str, dtype: torch.dtype | None = None) -> Any:
    """The transformers model of an artifact (or of any checkpoint), by the class that its
    configuration asks for.
    """
    config, _ = read_config(folder)
    model = model_class(config).from_pretrained(
        folder, dtype=dtype or "auto", local_files_only=True
    )
    return model.eval()


if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
    register_quantization_config(METHOD)(MoeccConfig)
    register_quantizer(METHOD)(MoeccQuantizer)
