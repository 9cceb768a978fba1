"""transformers' side of an artifact, for `AutoModelForCausalLM.from_pretrained(OUT)`.

`moecc.hook` imports this module right after transformers' quantizers. config.json of an artifact
tells the constructor which modules are compressed and how (`moecc.checkpoint.schema`), and nothing
that is in the weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
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

from moecc.checkpoint.files import TensorEntry, read_header
from moecc.checkpoint.recipes import Recipes
from moecc.checkpoint.schema import METHOD, METHODS, REFUSALS, Compression
from moecc.checkpoint.values import require_finite
from moecc.errors import MoeccError
from moecc.frontend import experts
from moecc.frontend.compressed import settle
from moecc.frontend.config import model_class, read_config
from moecc.frontend.prepare import prepare, restore


class MoeccConfig(QuantizationConfigMixin):
    """The quantization_config of an artifact.

    Raise MoeccError if it is none that moecc writes (`moecc.checkpoint.schema`).
    """

    def __init__(self, **settings: Any):
        self.quant_method: Any = METHOD
        self.compression = Compression.of(settings)

    def to_dict(self) -> dict[str, Any]:
        return self.compression.as_config()


class MoeccQuantizer(HfQuantizer):
    """Gives a model its compressed modules before weights are loaded, and their kernels once it is
    known where they are.
    """

    requires_calibration = True
    quantization_config: MoeccConfig

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> nn.Module:
        said = self.quantization_config.compression
        # with the paths of this model, by which it is saved
        self.quantization_config.compression = prepare(model, said)
        if checkpoint_files:
            headers = [read_header(Path(file))[0] for file in checkpoint_files]
            stored = {name: entry for header in headers for name, entry in header.items()}
            said.require(stored)
            _require_finite(stored[name] for name in said.names())
            _require_whole(model, stored, Path(checkpoint_files[0]).parent)
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        settle(model)
        for key, value in REFUSALS.items():  # for the config.json that save_pretrained writes
            setattr(model.config, key, value)
        return model

    def get_state_dict_and_metadata(
        self, model: nn.Module
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        _require_own_modules(model)
        # transformers splits what it merged when it loaded, so the guard has a size to split
        guard = self.quantization_config.compression.guard
        return model.state_dict() | {name: torch.zeros(1, 2, 2) for name in guard}, {}

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether adapters can be trained on the model: every op has its derivatives."""
        return True

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        # save_pretrained leaves the name of a type in the configuration
        restore(model, getattr(torch, dtype) if isinstance(dtype, str) else dtype)
        for key in REFUSALS.keys() & vars(model.config).keys():  # the float model needs no moecc
            delattr(model.config, key)
        return model


def _require_own_modules(model: nn.Module) -> None:
    """Raise MoeccError if PEFT's layers would be saved within the model: no class loads them.

    A model that transformers itself gave an adapter saves the adapter alone.
    """
    if getattr(model, "_hf_peft_config_loaded", False):
        return
    for path, module in model.named_modules():
        if type(module).__module__.partition(".")[0] == "peft":
            advice = "save the adapter alone by save_pretrained of the PeftModel, or unload() it"
            raise MoeccError(f"{path} is a layer of PEFT, which no artifact holds; {advice}")


def _require_finite(entries: Iterable[TensorEntry]) -> None:
    """Raise MoeccError if a float of compressed modules, such as a scale, is NaN or infinite."""
    with torch.device("cpu"):  # transformers makes models without storage here
        for entry in entries:
            if entry.dtype.is_floating_point:
                require_finite(entry.read(), f"{entry.name!r} of {entry.file}")


def _require_whole(model: Any, stored: Iterable[str], folder: Path) -> None:
    """Raise MoeccError if `folder` with tensors `stored` lacks one that it was saved with.

    transformers draws what files lack at random and only says so. That is right for a new head, on
    a model that was saved with another one or with none.
    """
    missing = Recipes(model, stored).missing
    if type(model).__name__ not in (model.config.architectures or ()):
        base = model.base_model  # the model itself, if it has no head
        body = f"{model.base_model_prefix}." if base is not model else ""
        missing = [name for name in missing if name.startswith(body)]
    if missing:
        lost = f"{len(missing)} missing" if len(missing) > 1 else "no other is missing"
        raise MoeccError(f"{folder} has no tensor for {missing[0]!r} ({lost}); fetch it again")


def load(folder: str, dtype: torch.dtype | None = None) -> Any:
    """The transformers model of an artifact (or of any checkpoint), by the class that its
    configuration asks for.
    """
    config, _ = read_config(folder)
    model = model_class(config).from_pretrained(
        folder, config=config, dtype=dtype or "auto", local_files_only=True
    )
    return model.eval()


experts.register()  # config.json asks for this implementation before a quantizer is asked
for method in METHODS:
    if method not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(method)(MoeccConfig)
        register_quantizer(method)(MoeccQuantizer)
