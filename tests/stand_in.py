"""A device that is none: tensors that say they are elsewhere and compute on the CPU.

Where a GPU would refuse, so does this device: an operation on it takes no tensor of the CPU, except
numbers, indices and copies, none becomes a numpy array, and none is drawn by a generator of the
CPU. It also refuses operations whose result on a GPU depends on the order in which threads add.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

# A name that PyTorch knows and looks for no driver of.
DEVICE = torch.device("lazy")
_IN_ANY_ORDER = {"index_add", "scatter_add", "scatter_reduce", "put", "cumsum", "histc"}
_TAKE_INDICES = {"index", "index_put"}
_COPY = {"copy", "_to_copy"}


class Elsewhere(Tensor):
    """A tensor on the stand-in."""

    here: Tensor

    @staticmethod
    def __new__(cls, here: Tensor) -> Elsewhere:
        made: Elsewhere = Tensor._make_wrapper_subclass(
            cls, here.shape, strides=here.stride(), dtype=here.dtype, device=DEVICE
        )
        made.here = here
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, *_: object) -> None:
        raise AssertionError(f"{func} outside `device`")


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
        elsewhere = {id(t.here): t for t in tensors if isinstance(t, Elsewhere)}
        name = func._schema.name.removeprefix("aten::").rstrip("_")
        if elsewhere:
            _refuse(name, func, tensors)
        to = kwargs.get("device", DEVICE if elsewhere else None)
        if to == DEVICE and kwargs.get("generator") is not None:
            raise AssertionError(f"{func} draws for a GPU with a generator of the CPU")
        if to == DEVICE and "device" in kwargs:
            kwargs["device"] = torch.device("cpu")
        args, kwargs = tree_map_only(Elsewhere, lambda t: t.here, (args, kwargs))
        if to != DEVICE:
            return func(*args, **kwargs)

        def moved(t: Tensor) -> Tensor:
            return elsewhere[id(t)] if id(t) in elsewhere else Elsewhere(t)

        return tree_map_only(Tensor, moved, func(*args, **kwargs))


class _Literals(TorchFunctionMode):
    """`torch.tensor` copies to a device below the level at which `_Mode` sees it."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.tensor and kwargs.get("device") == DEVICE:
            return Elsewhere(func(*args, **{**kwargs, "device": torch.device("cpu")}))
        return func(*args, **kwargs)


def _refuse(name: str, func: Any, tensors: list[Tensor]) -> None:
    if name in _IN_ANY_ORDER:
        raise AssertionError(f"{func} adds in any order on a GPU")
    here = [t for t in tensors if not isinstance(t, Elsewhere) and t.dim()]
    if name in _TAKE_INDICES:
        here = [t for t in here if t.is_floating_point()]
    if here and name not in _COPY:
        shapes = [tuple(t.shape) for t in here]
        raise AssertionError(f"{func} takes tensors of the CPU, {shapes}, and of a GPU")


@contextmanager
def device() -> Iterator[Callable[[Tensor], Tensor]]:
    """Give what moves a tensor to the stand-in, where it may be used meanwhile."""
    with _Mode(), _Literals():
        yield lambda t: t.to(DEVICE)


def back(t: Tensor) -> Tensor:
    """Return a tensor of the stand-in as one of the CPU."""
    assert isinstance(t, Elsewhere), "this tensor is not on the stand-in"
    return t.here
