"""The module tree of a configuration, with parameters that have no storage.

Every parameter becomes a FakeTensor at the moment when it is registered: it has shape, dtype and
device, but no storage. A large one is never allocated before that either: one tensor of experts may
need more memory than there is. Buffers stay real, because constructors compute rotary frequencies
and masks that no checkpoint holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from mmap import mmap
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from moecc.checkpoint.values import planned_dtype
from moecc.errors import MoeccError, out_of_memory, quoted, reason
from moecc.frontend import experts
from moecc.frontend.config import text_config
from moecc.types import Config, FamilyModule

aten = torch.ops.aten
# no numbers that a buffer could be computed from
_EMPTY = {aten.empty, aten.empty_strided, aten.empty_permuted, aten.empty_like, aten.new_empty}
_RANDOM = {aten.rand, aten.randn, aten.rand_like, aten.randn_like, aten.randint, aten.normal}
_CONSTANT = {aten.zeros, aten.ones, aten.full}
_SMALL = 1 << 20  # bytes
_TABLE = 1 << 25  # bytes; some constructors write a table, as of positions, into a constant


class _NoLarge(TorchDispatchMode):
    """Inside, no empty, random or constant tensor takes much memory.

    A large one that would be empty or random is fake. A constant of more than _TABLE bytes is one
    element that every index reads, so that masks can be computed from it; writing to it raises
    RuntimeError.
    """

    def __init__(self, mode: FakeTensorMode):
        super().__init__()  # type: ignore[no-untyped-call]
        self.mode = mode

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: object,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> object:
        kwargs, made = kwargs or {}, func.overloadpacket
        if made in _EMPTY | _RANDOM | _CONSTANT:
            with self.mode:
                fake = func(*args, **kwargs)
            if fake.nbytes > _SMALL:
                return _constant(func((), *args[1:], **kwargs), fake) if made in _CONSTANT else fake
        return func(*args, **kwargs)


def _constant(one: Tensor, like: Tensor) -> Tensor:
    """Return a tensor like another one whose elements all are `one`."""
    if like.nbytes > _TABLE or like.device.type != "cpu":
        return one.expand(like.shape)
    # Its own pages go back to the system. In the heap, those of one parameter after another would
    # leave holes.
    pages = mmap(-1, like.nbytes)
    return torch.frombuffer(pages, dtype=like.dtype).view(like.shape).copy_(one)


@contextmanager
def fake_parameters(mode: FakeTensorMode) -> Iterator[None]:
    """Inside, replace every parameter that is registered by a CPU one without storage.

    Also allocate no large one before that.
    """
    original, original_apply = nn.Module.register_parameter, nn.Module._apply

    def register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        original(self, name, param)
        if param is None or (isinstance(param.data, FakeTensor) and param.device.type == "cpu"):
            return
        with mode:
            fake = torch.empty_like(param.data, device="cpu")
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
        with _NoLarge(mode):
            yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]
        nn.Module._apply = original_apply  # type: ignore[method-assign]


def build(
    model_class: FamilyModule, config: Config, dtype: torch.dtype, mode: FakeTensorMode
) -> nn.Module:
    """Return a model of `model_class` in evaluation mode, its parameters fake in `mode`.

    The parameters that transformers keeps in float32 stay so. Raise MoeccError if the constructor
    fails; too little memory comes as it is.
    """
    from transformers.initialization import no_init_weights

    experts.register()
    auto = hasattr(model_class, "from_config")
    try:
        with fake_parameters(mode), no_init_weights():
            make = model_class.from_config if auto else model_class._from_config
            model: nn.Module = make(config, dtype=dtype)
    except Exception as error:
        if out_of_memory(error):
            raise
        raise MoeccError(
            f"the model can't be built from its config: {_unbuilt(config, error)}"
        ) from error
    _spread_constants(model)
    _keep_float32(model, dtype)
    return model.eval()


def _spread_constants(model: nn.Module) -> None:
    """Give the elements of large constant buffers a place each: a trace holds their strides."""
    for buffer in model.buffers():
        if buffer.untyped_storage().nbytes() < buffer.nbytes:
            buffer.data = buffer.contiguous()


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
