"""A device that is none: tensors that say they are elsewhere and compute on the CPU.

Where a GPU would refuse, so does this device: an operation on it takes no tensor of the CPU, except
numbers, indices and copies, none becomes a numpy array, and none is drawn by a generator of the
CPU. It also refuses operations whose result on a GPU depends on the order in which threads add:
those that may add several numbers to one place, if they do.
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
_JOIN = {"cat", "stack"}


class Elsewhere(Tensor):
    """A tensor on the stand-in."""

    here: Tensor

    @staticmethod
    def __new__(cls, here: Tensor) -> Elsewhere:
        if here.is_conj():  # operations below `_Mode` take no notice
            here = torch.conj_physical(here.conj())
        made: Elsewhere = Tensor._make_wrapper_subclass(
            cls, here.shape, strides=here.stride(), dtype=here.dtype, device=DEVICE
        )
        made.here = here
        return made

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.here.untyped_storage()

    def data_ptr(self) -> int:
        return self.here.data_ptr()

    def tolist(self) -> Any:
        return self.here.tolist()

    @property
    def _base(self) -> Tensor | None:  # type: ignore[override]
        return self.here._base

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

        with _differentiable(func.namespace == "moecc"):  # its backward differentiates
            return tree_map_only(Tensor, moved, func(*args, **kwargs))


@contextmanager
def _differentiable(wanted: bool) -> Iterator[None]:
    """Let autograd see operations of the CPU inside, which PyTorch hides from it within a mode."""
    keys = torch._C.DispatchKey.AutogradFunctionality, torch._C.DispatchKey.ADInplaceOrView
    before = [torch._C._dispatch_tls_is_dispatch_key_excluded(key) for key in keys]
    for key, excluded in zip(keys, before, strict=True):
        torch._C._dispatch_tls_set_dispatch_key_excluded(key, excluded and not wanted)
    try:
        yield
    finally:
        for key, excluded in zip(keys, before, strict=True):
            torch._C._dispatch_tls_set_dispatch_key_excluded(key, excluded)


class _Literals(TorchFunctionMode):
    """PyTorch brings lists of numbers to a device below the level at which `_Mode` sees it."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.tensor and kwargs.get("device") == DEVICE:
            return Elsewhere(func(*args, **{**kwargs, "device": torch.device("cpu")}))
        if args and isinstance(args[0], Elsewhere):
            if func is Tensor.new_tensor:
                return Elsewhere(torch.tensor(*args[1:], **{"dtype": args[0].dtype, **kwargs}))
            if func is Tensor.__getitem__ and isinstance(args[1], list):
                return args[0][torch.tensor(args[1], dtype=torch.long)]
        return func(*args, **kwargs)


def _refuse(name: str, func: Any, tensors: list[Tensor]) -> None:
    if name in _IN_ANY_ORDER and not _apart(name, tensors):
        raise AssertionError(f"{func} adds in any order on a GPU")
    here = [t for t in tensors if not isinstance(t, Elsewhere)]
    if name not in _JOIN and not (func._schema.is_mutable and any(t is tensors[0] for t in here)):
        here = [t for t in here if t.dim()]
    if name in _TAKE_INDICES:
        here = [t for t in here if t.is_floating_point()]
    if here and name not in _COPY:
        shapes = [tuple(t.shape) for t in here]
        raise AssertionError(f"{func} takes tensors of the CPU, {shapes}, and of a GPU")


def _apart(name: str, tensors: list[Tensor]) -> bool:
    """Return whether an operation adds no two numbers to one place, or adds whole numbers."""
    if not tensors[0].is_floating_point():
        return True
    if name not in ("scatter_add", "index_add"):
        return False
    index = tensors[1].tolist()  # of the last dimension, or of the only one
    rows = index if tensors[1].dim() > 1 else [index]
    return all(len(set(row)) == len(row) for row in rows)


@contextmanager
def device() -> Iterator[Callable[[Tensor], Tensor]]:
    """Give what moves a tensor to the stand-in, where it may be used meanwhile."""
    with _Mode(), _Literals():
        yield lambda t: t.to(DEVICE)


def back(t: Tensor) -> Tensor:
    """Return a tensor of the stand-in as one of the CPU."""
    assert isinstance(t, Elsewhere), "this tensor is not on the stand-in"
    return t.here
