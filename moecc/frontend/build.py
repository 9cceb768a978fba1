"""The module tree of a configuration, with parameters that have no storage.

Every parameter becomes a FakeTensor at the moment when it is registered: it has shape, dtype and
device, but no storage. A large one is fake from the start: one tensor of experts may need more
memory than there is. Buffers stay real, because constructors compute rotary frequencies and masks
that no checkpoint holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode

from moecc.checkpoint.values import planned_dtype
from moecc.errors import MoeccError, quoted, reason
from moecc.frontend import experts
from moecc.frontend.config import text_config
from moecc.types import Config, FamilyModule

_LARGE = 1 << 28  # bytes


class _WithoutLarge(TorchFunctionMode):
    """Inside, what torch.empty would make of more than _LARGE bytes is fake."""

    def __init__(self, mode: FakeTensorMode):
        super().__init__()
        self.mode = mode

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: object,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> object:
        if func is torch.empty:
            with self.mode:
                fake = torch.empty(*args, **(kwargs or {}))
            if fake.numel() * fake.element_size() > _LARGE:
                return fake
        return func(*args, **(kwargs or {}))


@contextmanager
def fake_parameters(mode: FakeTensorMode) -> Iterator[None]:
    """Inside, replace every parameter that is registered by a CPU one without storage."""
    original, original_apply = nn.Module.register_parameter, nn.Module._apply

    def register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        original(self, name, param)
        if param is not None and not isinstance(param.data, FakeTensor):
            with mode:
                fake = torch.empty_strided(
                    param.shape, param.stride(), dtype=param.dtype, device="cpu"
                )
            self._parameters[name] = nn.Parameter(fake, requires_grad=param.requires_grad)

    # Constructors call this to give a part another dtype. torch's own swaps storage, and fake
    # tensors have none.
    def apply(self: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
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
        nn.Module.register_parameter = original  # type: ignore[method-assign]
        nn.Module._apply = original_apply  # type: ignore[method-assign]


def build(
    model_class: FamilyModule, config: Config, dtype: torch.dtype, mode: FakeTensorMode
) -> nn.Module:
    """Return a model of `model_class` in evaluation mode, its parameters fake in `mode`.

    The parameters that transformers keeps in float32 stay so. Raise MoeccError if the constructor
    fails.
    """
    from transformers.initialization import no_init_weights

    experts.register()
    auto = hasattr(model_class, "from_config")
    try:
        with fake_parameters(mode), _WithoutLarge(mode), no_init_weights():
            make = model_class.from_config if auto else model_class._from_config
            model: nn.Module = make(config, dtype=dtype)
    except Exception as error:
        raise MoeccError(
            f"the model can't be built from its config: {_unbuilt(config, error)}"
        ) from error
    _keep_float32(model, dtype)
    return model.eval()


def _unbuilt(config: Config, error: Exception) -> str:
    """Return why a constructor failed.

    A name that transformers doesn't know, such as an activation's, comes as a KeyError that says
    nothing but this name; look up the entry of the configuration that has it.
    """
    if not isinstance(error, KeyError) or not error.args:
        return reason(error)
    entries = text_config(config).to_dict().items()
    entry = next((key for key, value in entries if value == error.args[0]), None)
    name = quoted(error.args[0])
    return f"{entry} {name} is unknown" if entry else f"{name} is unknown"


def _keep_float32(model: FamilyModule, dtype: torch.dtype) -> None:
    """Give the parameters that transformers keeps in float32 that dtype, as loading would."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        wanted = planned_dtype(model, name, dtype)
        if wanted is not None and tensor.is_floating_point() and tensor.dtype != wanted:
            tensor.data = tensor.data.to(wanted)
