"""A transformers configuration: where it is read from, what it says, and the class it asks for."""

from __future__ import annotations

import copy
import inspect
import math
import re
import sys
from pathlib import Path

import torch

from moecc.checkpoint.fit import CHECK_CONFIG
from moecc.checkpoint.reading import read_json
from moecc.checkpoint.shards import tensor_names
from moecc.checkpoint.source import model_folder
from moecc.errors import MoeccError, out_of_memory, quoted, reason
from moecc.types import Config, FamilyModule, Json

# Constructors of configurations and models loop over the numbers that have these names.
_COUNTS = re.compile(r"(layers?|blocks|depths?|loops|passes|iters|stages|levels|codebooks)$")
_EXPERTS = re.compile(r"(experts|heads|head_dim)$")
_WIDTHS = re.compile(r"(size|dim|d_model|n_embd)$")
_MOST_LAYERS, _MOST_EXPERTS, _MOST_WIDTH = 1024, 65536, 1 << 26

# ---------------------------------------------------------------- reading


def source_name(source: object) -> str:
    """Return the folder or hub id that was given, or the class of a module or configuration."""
    return str(source) if isinstance(source, (str, Path)) else type(source).__name__


def read_config(source: str | Path | Config) -> tuple[Config, Path | None]:
    """Return the configuration of `source`, and the folder that it was read from, if any.

    source: a folder, a hub id or a configuration. Raise MoeccError if it is none of these, or if
    transformers can't use its config.json.
    """
    from transformers import AutoConfig, PretrainedConfig

    if isinstance(source, PretrainedConfig):
        return source, None
    if not isinstance(source, (str, Path)):
        raise MoeccError(
            "a model is a folder, a hub id, a transformers configuration or an nn.Module, "
            f"not {source_name(source)}"
        )
    folder = model_folder(str(source), ["*.json"])
    # besides config.json those for certain versions of transformers
    for file in (folder / "config.json", *sorted(folder.glob("config.*.json"))):
        _require_countable(file, read_json(file))
    try:
        # Without trust_remote_code=False, transformers would ask on the terminal.
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        if out_of_memory(error):
            raise
        why = reason(error)
        own = "moecc doesn't run a model's own code, it takes the families of transformers"
        todo = own if "custom code" in why else "check config.json"
        raise MoeccError(f"{source}: its config.json can't be used: {why}; {todo}") from error
    if not getattr(config, "quantization_config", True):  # {} says nothing
        del config.quantization_config
    config.return_dict = True  # outputs are read by name
    return config, folder


def require_generation(folder: Path) -> None:
    """Raise MoeccError if a model with this generation_config.json can't be loaded.

    A folder without the file, or with one that is no JSON, is loaded without.
    """
    from transformers import GenerationConfig

    try:
        GenerationConfig.from_pretrained(folder, local_files_only=True)
    except OSError:
        return
    except Exception as error:  # TypeError, ValueError: whatever its values lead to
        if out_of_memory(error):
            raise
        file = folder / "generation_config.json"
        raise MoeccError(
            f"{file}: transformers can't use it: {reason(error)}; correct it or move it away"
        ) from error


def _require_countable(file: Path, config: Json) -> None:
    """Raise MoeccError if a configuration asks for more or wider modules than any model has."""
    for key, value in config.items():
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, dict):
                _require_countable(file, part)
            elif isinstance(part, int | float) and part > _most(key):
                raise MoeccError(
                    f"{quoted(key)} in {file} is {quoted(part)}, and moecc takes at most "
                    f"{_most(key)}; check config.json"
                )


def _most(key: str) -> float:
    """Return the largest number that an entry of a configuration may have."""
    if _COUNTS.search(key):
        return _MOST_LAYERS
    if _EXPERTS.search(key):
        return _MOST_EXPERTS
    return _MOST_WIDTH if _WIDTHS.search(key) else math.inf


def require_layers(config: Config, folder: Path) -> None:
    """Raise MoeccError if a configuration has far more layers than the weights in its folder.

    A model of a thousand layers takes long to build, and would be refused only then. Half as many
    may be right: longcat_flash counts two for a block.
    """
    layers = getattr(text_config(config), "num_hidden_layers", None)
    stored = 1 + max(map(_layer, tensor_names(folder)), default=-1)
    if type(layers) is int and 0 < 2 * stored < layers:
        raise MoeccError(
            f"num_hidden_layers in {folder / 'config.json'} is {layers}, and the weights there are "
            f"of {stored} layers; {CHECK_CONFIG}"
        )


def _layer(name: str) -> int:
    """Return the first number in a tensor's name, which is that of its layer, else -1."""
    return next((int(p) for p in name.split(".") if p.isdecimal() and len(p) < 10), -1)


# ---------------------------------------------------------------- facts


def text_config(config: Config) -> Config:
    """Return the language model's part of a configuration."""
    get = getattr(config, "get_text_config", None)
    return get() if callable(get) else config


def config_dtype(config: Config) -> torch.dtype:
    """Return the dtype that the configuration names, else float32."""
    for part in (config, text_config(config)):
        dtype = getattr(part, "dtype", None)
        dtype = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
        if isinstance(dtype, torch.dtype):
            return dtype
    return torch.float32


def longest_row(config: Config) -> int | None:
    """Return the number of tokens that the model has positions for, or None if it isn't said."""
    limit = getattr(text_config(config), "max_position_embeddings", None)
    return limit if type(limit) is int and limit > 0 else None


def quantization_method(config: Config) -> str | None:
    """Return quant_method of the checkpoint, or None for plain weights."""
    for part in (config, text_config(config)):
        quantization = getattr(part, "quantization_config", None)
        if quantization:
            if isinstance(quantization, dict):
                method = quantization.get("quant_method", "unknown")
            else:
                method = getattr(quantization, "quant_method", "unknown")
            return str(getattr(method, "value", method))  # an enum or its text
    return None


def as_if_plain(config: Config) -> Config:
    """Return a copy that has no quantization, as which a low-bit checkpoint is read."""
    config = copy.deepcopy(config)
    for part in (config, text_config(config)):
        if getattr(part, "quantization_config", None) is not None:
            del part.quantization_config
    return config


# ---------------------------------------------------------------- the class


def model_class(config: Config) -> FamilyModule:
    """Return the (auto) class to build.

    That is the causal language model, else the class that the checkpoint names, else any. Raise
    MoeccError if transformers has none.
    """
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


def _class_of_config(config: Config) -> FamilyModule:
    """Return the model class for a text tower that no auto class maps.

    It is in the modelling file beside the configuration's and takes this configuration.
    """
    from transformers import PreTrainedModel

    name = type(config).__module__.replace(".configuration_", ".modeling_")
    missing = f"{type(config).__name__}: transformers has no model class for this configuration"
    try:
        __import__(name)
    except ImportError as error:
        raise MoeccError(missing) from error
    classes = [
        c
        for _, c in inspect.getmembers(sys.modules[name], inspect.isclass)
        if c.__module__ == name
        and issubclass(c, PreTrainedModel)
        and getattr(c, "config_class", None) is type(config)
        and not c.__name__.endswith("PreTrainedModel")
    ]
    if not classes:
        raise MoeccError(missing)
    return min(
        classes,
        key=lambda c: ("ForCausalLM" not in c.__name__, "Model" not in c.__name__, len(c.__name__)),
    )
