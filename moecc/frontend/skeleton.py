"""A model without its weights, ready to be traced.

  1. the source (folder, hub id, configuration) gives a transformers configuration; nothing but *.json is fetched
  2. the configuration gives the class, and the class the module tree
  3. every parameter becomes a FakeTensor the moment it is registered: shape, dtype and device, no storage. Buffers stay
     real, because rotary frequencies and masks are computed in constructors and are in no checkpoint
  4. each experts module is probed (`moecc.frontend.probe`), so that a gate that isn't known stops here and not in a trace

An nn.Module can be given too; then its own parameters are used and it is left as it was.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from moecc.checkpoint import low_bit
from moecc.checkpoint.schema import METHOD, Compression
from moecc.errors import MoeccError, reason
from moecc.frontend import experts, families
from moecc.frontend.config import (
    as_if_plain,
    config_dtype,
    model_class,
    quantization_method,
    read_config,
    source_name,
    text_config,
)
from moecc.frontend.prepare import prepare


@dataclass(frozen=True)
class Skeleton:
    """A model to trace. `mode` is the fake mode of its parameters, None for a model with weights of its own."""

    model: nn.Module
    config: Any
    mode: FakeTensorMode | None
    experts: dict[str, nn.Module]  # experts modules by path
    folder: Path | None = (
        None  # where the configuration was read, None for a configuration or a module
    )
    source: str = ""  # the folder or hub id that was given

    @property
    def name(self) -> str:
        """For messages: what was given, and its family."""
        return _where(self.source, self.model_type)

    @property
    def advice(self) -> str:
        """What to do where the configuration makes no model that runs."""
        return _advice(self.source)

    @property
    def model_type(self) -> str:
        return str(getattr(self.config, "model_type", type(self.model).__name__))


def skeleton(source: str | Path | nn.Module | Any, dtype: torch.dtype | None = None) -> Skeleton:
    """The weight-free model of a local folder, a hub id or a transformers configuration; or a given module, as it is.

    dtype: of the parameters; by default what the configuration says, else float32. MoeccError where the source can't be
    read, is no Mixture-of-Experts model, or belongs to a family that isn't known.
    """
    return _checked(bare(source, dtype))


def bare(source: str | Path | nn.Module | Any, dtype: torch.dtype | None = None) -> Skeleton:
    """A skeleton that nothing is asked of yet: it may have no experts, or such as moecc doesn't know."""
    if isinstance(source, nn.Module):
        return Skeleton(
            source, getattr(source, "config", None), None, experts.experts_modules(source)
        )
    config, folder = read_config(source)
    method = quantization_method(config)
    if method in low_bit.METHODS:
        config = as_if_plain(config)
    elif method not in (None, METHOD):
        raise MoeccError(
            f"{source_name(source)}: its weights are quantized already ({method}); give the unquantized checkpoint, or one of "
            f"{' or '.join(low_bit.METHODS)}"
        )
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    given = str(source) if isinstance(source, (str, Path)) else ""
    model = _build(config, dtype or config_dtype(config), mode, given)
    if method == METHOD:
        _prepare_compressed(model, config, mode)
    return Skeleton(model, config, mode, experts.experts_modules(model), folder, given)


@contextmanager
def fake_parameters(mode: FakeTensorMode) -> Iterator[None]:
    """Inside, every parameter is replaced when it is registered by a storage-free one on the CPU."""
    original, original_apply = nn.Module.register_parameter, nn.Module._apply

    def register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        original(self, name, param)
        if param is not None and not isinstance(param.data, FakeTensor):
            with mode:
                fake = torch.empty_strided(
                    param.shape, param.stride(), dtype=param.dtype, device="cpu"
                )
            self._parameters[name] = nn.Parameter(fake, requires_grad=param.requires_grad)

    def apply(self: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """For constructors that give a part another dtype; torch's own would swap storage, which fake tensors don't have."""
        for module in self.modules() if recurse else [self]:
            for name, p in module._parameters.items():
                if p is not None:
                    module._parameters[name] = nn.Parameter(
                        fn(p.data), requires_grad=p.requires_grad
                    )
            for name, b in module._buffers.items():
                module._buffers[name] = None if b is None else fn(b)
        return self

    nn.Module.register_parameter, nn.Module._apply = register, apply  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter, nn.Module._apply = original, original_apply  # type: ignore[method-assign]


def _build(config: Any, dtype: torch.dtype, mode: FakeTensorMode, given: str) -> nn.Module:
    from transformers.initialization import no_init_weights

    experts.register()
    cls = model_class(config)
    auto = hasattr(cls, "from_config")
    try:
        with fake_parameters(mode), no_init_weights():
            model: nn.Module = (cls.from_config if auto else cls._from_config)(config, dtype=dtype)
    except Exception as error:
        why = f"the model can't be built from its config: {_unbuilt(config, error)}{_advice(given)}"
        raise MoeccError(f"{_where(given, _family(config))}: {why}") from error
    _keep_float32(model, dtype)
    return model.eval()


def _unbuilt(config: Any, error: Exception) -> str:
    """The reason. A name that transformers doesn't know, of an activation, say, comes as a KeyError of that name alone."""
    if not isinstance(error, KeyError) or not error.args:
        return reason(error)
    entries = text_config(config).to_dict().items()
    entry = next((key for key, value in entries if value == error.args[0]), None)
    return f"{entry} {error} is unknown" if entry else f"{error} is unknown"


def _keep_float32(model: Any, dtype: torch.dtype) -> None:
    """Give the parameters that transformers keeps in float32 that dtype, as loading the checkpoint would."""
    plan = model._get_dtype_plan(dtype) if hasattr(model, "_get_dtype_plan") else {}
    rules = [(re.compile(pattern), wanted) for pattern, wanted in plan.items()]
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        wanted = next((w for rule, w in rules if rule.search(name)), None)
        if wanted is not None and tensor.is_floating_point() and tensor.dtype != wanted:
            tensor.data = tensor.data.to(wanted)


def _prepare_compressed(model: nn.Module, config: Any, mode: FakeTensorMode) -> None:
    """Give a checkpoint that moecc wrote its compressed modules; their buffers are fake, as parameters are."""
    for module in experts.experts_modules(model).values():
        experts.probe(module)  # before the fake mode, in which nothing can be compared
    with mode:
        prepare(model, Compression.of(config))


# ---------------------------------------------------------------- checks


def _family(config: Any) -> str:
    return str(getattr(config, "model_type", "") or type(config).__name__)


def _where(given: str, family: str) -> str:
    return f"{given} ({family})" if given else family


def _advice(given: str) -> str:
    return "; check config.json" if given else ""


EXPERT_COUNTS = (
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "moe_num_experts",
    "num_routed_experts",
)


# What families call the number of experts that a token takes; dbrx has it in its ffn_config.
TOP_K = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_topk",
    "moe_top_k",
    "moe_k",
    "top_k_experts",
)


def _checked(found: Skeleton) -> Skeleton:
    family = found.model_type
    if getattr(found.config, "is_encoder_decoder", False):
        raise MoeccError(f"{family}: an encoder-decoder model; moecc takes decoders")
    if not found.experts:
        part = text_config(found.config)
        if any(isinstance(n := getattr(part, key, None), int) and n > 1 for key in EXPERT_COUNTS):
            raise MoeccError(
                f"{family}: {type(found.model).__name__} has experts of a class that moecc doesn't know"
            )
        raise MoeccError(
            f"{family}: {type(found.model).__name__} has no experts; moecc takes Mixture-of-Experts models"
        )
    _check_state(found)
    _check_top_k(found)
    for path, module in found.experts.items():
        try:
            experts.probe(module)
        except MoeccError as error:
            raise MoeccError(f"{family}, {path}: {error}") from error
    return found


def _check_top_k(found: Skeleton) -> None:
    """A model that chooses no expert would be compiled without a word, and one that chooses too many can't be traced."""
    part = text_config(found.config)
    part = getattr(part, "ffn_config", part)
    (key, top_k), (total, count) = _first_count(part, TOP_K), _first_count(part, EXPERT_COUNTS)
    if top_k is None or count is None:
        return
    count += (
        getattr(part, "zero_expert_num", 0) or 0
    )  # longcat's router may choose experts that do nothing
    if not 1 <= top_k <= count:
        what = f"{key} is {top_k} and {total} {count}, but a token takes 1 expert or more, and no more than there are"
        raise MoeccError(f"{found.name}: {what}{found.advice}")


def _first_count(config: Any, keys: tuple[str, ...]) -> tuple[str, int | None]:
    """The first of `keys` that gives one number for all layers."""
    aliases = getattr(config, "attribute_map", {})
    values = ((aliases.get(key, key), getattr(config, key, None)) for key in keys)
    return next(((key, value) for key, value in values if type(value) is int), ("", None))


def _check_state(found: Skeleton) -> None:
    """A trace would carry a tensor on the meta device along, without its numbers and without a word."""
    state = (*found.model.named_parameters(), *found.model.named_buffers())
    for name, tensor in state:
        if tensor.device.type == "meta":
            raise MoeccError(
                f"{found.model_type}: {name} is on the meta device; give the model's folder or configuration"
            )
    stored = {id(b) for m in found.model.modules() if isinstance(m, STORED) for b in m.buffers()}
    for name, buffer in found.model.named_buffers():
        if found.mode is not None and isinstance(buffer, FakeTensor) and id(buffer) not in stored:
            raise MoeccError(
                f"{found.model_type}: buffer {name} has lost its numbers; the family isn't supported"
            )


STORED = (
    experts.CompressedProjection,
    experts.QuantizedLinear,
)  # loaded from the checkpoint, so fake like parameters
_ = families.METHODS  # importing the adapters makes their classes known to `experts.is_experts`
