"""A model without its weights, ready to be traced.

  1. The source (folder, hub id, configuration) gives a transformers configuration. Only *.json
     files are fetched.
  2. The configuration gives the class (`moecc.frontend.config`), and the class the module tree,
     whose parameters have no storage (`moecc.frontend.build`).
  3. The checks refuse a model that moecc can't take. They probe each experts module
     (`moecc.frontend.probe`), so that an unknown gate stops here and not in a trace.

An nn.Module can be given too; then its own parameters are used and it is left as it was.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from moecc.checkpoint import low_bit
from moecc.checkpoint.schema import METHODS, Compression
from moecc.errors import MoeccError
from moecc.frontend import experts
from moecc.frontend import families as families  # makes its classes known to experts.is_experts
from moecc.frontend.build import build
from moecc.frontend.compressed import CompressedProjection, QuantizedLinear
from moecc.frontend.config import (
    as_if_plain,
    config_dtype,
    model_class,
    quantization_method,
    read_config,
    require_layers,
    source_name,
    text_config,
)
from moecc.frontend.prepare import prepare
from moecc.types import Config

# The names that families give to the number of experts.
EXPERT_COUNTS = (
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "moe_num_experts",
    "num_routed_experts",
)
# The names that they give to the number of experts per token; dbrx has it in its ffn_config.
TOP_K = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_topk",
    "moe_top_k",
    "moe_k",
    "top_k_experts",
)
_MIXTURE = re.compile("Moe(Block)?$", re.IGNORECASE)  # names of classes that hold experts
# Their buffers are loaded from the checkpoint, so they are fake as parameters are.
STORED = (CompressedProjection, QuantizedLinear)


@dataclass(frozen=True)
class Skeleton:
    """A model to trace."""

    model: nn.Module
    config: Config
    mode: FakeTensorMode | None  # of its parameters; None for a model with weights of its own
    experts: dict[str, nn.Module]  # experts modules by path
    folder: Path | None = None  # of the configuration, if it was read from one
    source: str = ""  # the folder or hub id that was given

    @property
    def name(self) -> str:
        """The given source and the family, for messages."""
        return _where(self.source, self.model_type)

    @property
    def advice(self) -> str:
        """The end of a message about a configuration that makes no model that runs."""
        return _advice(self.source)

    @property
    def model_type(self) -> str:
        """The family, as the configuration names it."""
        return str(getattr(self.config, "model_type", type(self.model).__name__))


def skeleton(source: str | Path | nn.Module | Config, dtype: torch.dtype | None = None) -> Skeleton:
    """Return the model of a local folder, hub id or transformers configuration, without weights.

    An nn.Module is taken as it is. dtype: of the parameters; by default the configuration's, else
    float32. Raise MoeccError if the source can't be read, is no Mixture-of-Experts model, or
    belongs to a family that isn't known.
    """
    return _checked(bare(source, dtype))


def bare(source: str | Path | nn.Module | Config, dtype: torch.dtype | None = None) -> Skeleton:
    """Return a skeleton that isn't checked: it may have no experts, or unknown ones."""
    if isinstance(source, nn.Module):
        config = getattr(source, "config", None)
        return Skeleton(source, config, None, experts.experts_modules(source))
    config, folder = read_config(source)
    method = quantization_method(config)
    if method in low_bit.METHODS:
        config = as_if_plain(config)
    elif method not in (None, *METHODS):
        raise MoeccError(
            f"{source_name(source)}: its weights are quantized already ({method}); "
            f"give the unquantized checkpoint, or one of {' or '.join(low_bit.METHODS)}"
        )
    if folder is not None:
        require_layers(config, folder)
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    given = str(source) if isinstance(source, (str, Path)) else ""
    cls = model_class(config)
    try:
        model = build(cls, config, dtype or config_dtype(config), mode)
    except MoeccError as error:
        raise MoeccError(f"{_where(given, _family(config))}: {error}{_advice(given)}") from error
    if method in METHODS:
        _prepare_compressed(model, config, mode)
    return Skeleton(model, config, mode, experts.experts_modules(model), folder, given)


def _prepare_compressed(model: nn.Module, config: Config, mode: FakeTensorMode) -> None:
    """Give the model of an artifact its compressed modules, with fake buffers."""
    for module in experts.experts_modules(model).values():
        experts.probe(module)  # before the fake mode, in which nothing can be compared
    with mode:
        prepare(model, Compression.of(config))


def _family(config: Config) -> str:
    return str(getattr(config, "model_type", "") or type(config).__name__)


def _where(given: str, family: str) -> str:
    return f"{given} ({family})" if given else family


def _advice(given: str) -> str:
    return "; check config.json" if given else ""


# ---------------------------------------------------------------- checks


def _checked(found: Skeleton) -> Skeleton:
    family = found.model_type
    if getattr(found.config, "is_encoder_decoder", False):
        raise MoeccError(f"{family}: an encoder-decoder model; moecc takes decoders")
    _check_experts(found)
    _check_state(found)
    _check_top_k(found)
    for path, module in found.experts.items():
        try:
            experts.probe(module)
        except MoeccError as error:
            raise MoeccError(f"{family}, {path}: {error}") from error
    return found


def _check_experts(found: Skeleton) -> None:
    """Raise MoeccError if moecc sees no experts; say so if the configuration has some."""
    if found.experts:
        return
    part, model = text_config(found.config), type(found.model).__name__
    modules = list(found.model.named_modules())
    if any(isinstance(n := getattr(part, key, None), int) and n > 1 for key in EXPERT_COUNTS):
        if any("expert" in name or _MIXTURE.search(type(m).__name__) for name, m in modules):
            raise MoeccError(
                f"{found.model_type}: {model} has experts of a class that moecc doesn't know"
            )
        raise MoeccError(
            f"{found.name}: the configuration gives experts to no layer, for example because "
            f"mlp_only_layers names all{found.advice}"
        )
    raise MoeccError(
        f"{found.model_type}: {model} has no experts; moecc takes Mixture-of-Experts models"
    )


def _check_top_k(found: Skeleton) -> None:
    """Raise MoeccError if a token takes no expert, or more than there are.

    A model that chooses none would be compiled without a word; one that chooses too many can't be
    traced.
    """
    part = text_config(found.config)
    part = getattr(part, "ffn_config", part)
    (key, top_k), (total, count) = _first_count(part, TOP_K), _first_count(part, EXPERT_COUNTS)
    if top_k is None or count is None:
        return
    # The router of longcat may also choose experts that do nothing.
    count += getattr(part, "zero_expert_num", 0) or 0
    if not 1 <= top_k <= count:
        raise MoeccError(
            f"{found.name}: {key} is {top_k} and {total} {count}, but a token takes 1 expert or "
            f"more, and no more than there are{found.advice}"
        )


def _first_count(config: Config, keys: tuple[str, ...]) -> tuple[str, int | None]:
    """Return the first of `keys` that gives one number for all layers, and the number."""
    aliases = getattr(type(config), "attribute_map", {})  # the file's may be anything
    values = ((aliases.get(key, key), getattr(config, key, None)) for key in keys)
    return next(((key, value) for key, value in values if type(value) is int), ("", None))


def _check_state(found: Skeleton) -> None:
    """Raise MoeccError if a tensor has no numbers: a trace would carry it along without a word."""
    for name, tensor in (*found.model.named_parameters(), *found.model.named_buffers()):
        if tensor.device.type == "meta":
            raise MoeccError(
                f"{found.model_type}: {name} is on the meta device; "
                "give the model's folder or configuration"
            )
    stored = {id(b) for m in found.model.modules() if isinstance(m, STORED) for b in m.buffers()}
    for name, buffer in found.model.named_buffers():
        if found.mode is not None and isinstance(buffer, FakeTensor) and id(buffer) not in stored:
            raise MoeccError(
                f"{found.model_type}: buffer {name} has lost its numbers; the family isn't "
                "supported"
            )
