"""A transformers configuration: read from a folder or a hub id, and the class of model that it asks for."""

from __future__ import annotations

import copy
import inspect
import sys
from pathlib import Path
from typing import Any

import torch

from moecc.checkpoint.source import model_folder
from moecc.errors import MoeccError, reason

# ---------------------------------------------------------------- configuration


def source_name(source: Any) -> str:
    return str(source) if isinstance(source, (str, Path)) else type(source).__name__


def read_config(source: Any) -> tuple[Any, Path | None]:
    """The configuration and, for a folder or a hub id, the local folder that holds it."""
    from transformers import AutoConfig, PretrainedConfig

    if isinstance(source, PretrainedConfig):
        return source, None
    if not isinstance(source, (str, Path)):
        raise MoeccError(
            f"a model is a folder, a hub id, a transformers configuration or an nn.Module, not {source_name(source)}"
        )
    folder = model_folder(str(source), ["*.json"])
    try:
        config = AutoConfig.from_pretrained(
            folder, trust_remote_code=False
        )  # None would ask on the terminal
    except Exception as error:
        why = reason(error)
        own = "; moecc doesn't run a model's own code, it takes the families of transformers"
        raise MoeccError(
            f"{source}: its config.json can't be used: {why}{own if 'custom code' in why else '; check config.json'}"
        ) from error
    return config, folder


def quantization_method(config: Any) -> str | None:
    """quant_method of the checkpoint, None for plain weights."""
    for part in (config, text_config(config)):
        quantization = getattr(part, "quantization_config", None)
        if quantization:
            get = (
                quantization.get
                if isinstance(quantization, dict)
                else lambda k, d, q=quantization: getattr(q, k, d)
            )
            return str(
                getattr(get("quant_method", "unknown"), "value", get("quant_method", "unknown"))
            )
    return None


def as_if_plain(config: Any) -> Any:
    """The configuration of the same model in bfloat16, as which a checkpoint in few bits is read."""
    config = copy.deepcopy(config)
    for part in (config, text_config(config)):
        if getattr(part, "quantization_config", None) is not None:
            del part.quantization_config
    return config


def text_config(config: Any) -> Any:
    """The language model's part of a configuration."""
    get = getattr(config, "get_text_config", None)
    return get() if callable(get) else config


def longest_row(config: Any) -> int | None:
    """The most tokens that the model has positions for, None where its configuration doesn't say."""
    limit = getattr(text_config(config), "max_position_embeddings", None)
    return limit if type(limit) is int and limit > 0 else None


def config_dtype(config: Any) -> torch.dtype:
    """The dtype that the configuration names, else float32."""
    for part in (config, text_config(config)):
        dtype = getattr(part, "dtype", None)
        dtype = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
        if isinstance(dtype, torch.dtype):
            return dtype
    return torch.float32


# ---------------------------------------------------------------- class and module tree


def model_class(config: Any) -> Any:
    """The (auto) class to build: the causal language model, else what the checkpoint says, else any."""
    import transformers
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto import modeling_auto as auto

    if type(config) in auto.MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForCausalLM
    for name in getattr(config, "architectures", None) or ():
        found = getattr(transformers, name, None)
        if found is not None and getattr(found, "config_class", None) is type(config):
            return found
    if type(config) in auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForImageTextToText
    if type(config) in auto.MODEL_MAPPING:
        return AutoModel
    return _class_of_config(config)


def _class_of_config(config: Any) -> Any:
    """A text tower that no auto class maps: the model class of its modelling file that takes this configuration."""
    from transformers import PreTrainedModel

    name = type(config).__module__.replace(".configuration_", ".modeling_")
    try:
        __import__(name)
    except ImportError as error:
        raise MoeccError(
            f"{type(config).__name__}: transformers has no model class for this configuration"
        ) from error
    classes = [
        c for _, c in inspect.getmembers(sys.modules[name], inspect.isclass) if c.__module__ == name
    ]
    mine = [
        c for c in classes
        if issubclass(c, PreTrainedModel) and getattr(c, "config_class", None) is type(config)
        and not c.__name__.endswith("PreTrainedModel")
    ]  # fmt: skip
    if not mine:
        raise MoeccError(
            f"{type(config).__name__}: transformers has no model class for this configuration"
        )
    return min(
        mine,
        key=lambda c: ("ForCausalLM" not in c.__name__, "Model" not in c.__name__, len(c.__name__)),
    )
