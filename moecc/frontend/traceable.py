"""What a model needs in place while torch.export traces it; afterwards it is as it was.

`traceable`         evaluation mode, moecc's experts and methods, opaque scans, plain masks
`logits_alone`      no cache, no auxiliary loss and no inner states beside the logits
`only_input_ids`    a forward that takes input_ids and nothing else
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

import torch
from torch import nn

from moecc.errors import MoeccError, out_of_memory, reason
from moecc.frontend import experts
from moecc.frontend.families import methods_replaced
from moecc.frontend.scans import opaque_scans
from moecc.frontend.skeleton import Skeleton
from moecc.types import Config, FamilyModule

Mask: TypeAlias = Callable[..., torch.Tensor]  # of indices that broadcast


@contextmanager
def traceable(found: Skeleton) -> Iterator[None]:
    """Make the model traceable; raise MoeccError, with its name, for whatever its code raises.

    Too little memory is no fault of the model, and comes as it is.
    """
    model = found.model
    try:
        with (
            # Otherwise parts of the graph hide in set_grad_enabled sub-graphs. The graph stays
            # differentiable.
            torch.no_grad(),
            _moecc_experts(model),
            methods_replaced(model),
            opaque_scans(model),
            _broadcast_masks(),
            _one_line(),
        ):
            yield
    except MoeccError:
        raise
    except Exception as error:
        if out_of_memory(error):
            raise
        raise MoeccError(
            f"{found.name}: the model can't be traced: {reason(error)}{found.advice}"
        ) from error


# Switches of a configuration that give a model more outputs, or the same ones in another form.
_OUTPUTS = {
    "use_cache": False,
    "output_router_logits": False,  # puts the auxiliary loss in front of the logits
    "output_attentions": False,
    "output_hidden_states": False,
    "return_dict": True,
}


@contextmanager
def logits_alone(model: nn.Module) -> Iterator[None]:
    """Set the switches of every configuration so that logits are the model's only output."""
    found = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    configs: list[Config] = list(found.values())
    before = [dict(vars(c)) for c in configs]
    for config in configs:
        for name, value in _OUTPUTS.items():
            if hasattr(config, name):
                setattr(config, name, value)
    try:
        yield
    finally:
        for config, values in zip(configs, before, strict=True):
            config.__dict__.clear()
            config.__dict__.update(values)


@contextmanager
def only_input_ids(model: FamilyModule) -> Iterator[None]:
    """Give the model a forward without `**kwargs`, which torch.export would take for an input."""
    forward = model.forward

    def input_ids_only(input_ids: torch.Tensor) -> object:
        return forward(input_ids=input_ids)

    had = "forward" in model.__dict__
    model.forward = input_ids_only
    try:
        yield
    finally:
        if had:
            model.forward = forward
        else:
            del model.forward


@contextmanager
def _moecc_experts(model: FamilyModule) -> Iterator[None]:
    """Put the model in evaluation mode, with moecc's experts."""
    experts.register()
    training, dispatch = model.training, getattr(model, "_can_set_experts_implementation", bool)()
    before = getattr(getattr(model, "config", None), "_experts_implementation", None)
    model.eval()
    if dispatch:
        model.set_experts_implementation(experts.IMPLEMENTATION)
    try:
        yield
    finally:
        model.train(training)
        if dispatch:
            model.set_experts_implementation(before or "eager")


@contextmanager
def _broadcast_masks() -> Iterator[None]:
    """Compose a model's own masks by broadcast indices; vmap would leave its calls in the graph."""
    from transformers import masking_utils

    original = getattr(masking_utils, "_vmap_expansion_sdpa", None)
    broadcast = getattr(masking_utils, "_non_vmap_expansion_sdpa", None)
    if original is None or broadcast is None:
        yield
        return

    def expansion(mask_function: Mask) -> Mask:
        return lambda *indices: mask_function(*broadcast(*indices))

    masking_utils._vmap_expansion_sdpa = expansion
    try:
        yield
    finally:
        masking_utils._vmap_expansion_sdpa = original


@contextmanager
def _one_line() -> Iterator[None]:
    """Silence the traceback that torch logs if an op can't be traced; the raised error says it."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before
