"""Where a program's tensors are: in the checkpoint (`Store`), in memory or spilled to disk (`Held`)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor


class Store(Protocol):
    """Where a model's plain weights come from: a checkpoint (`moecc.checkpoint.store`) or a module in memory.

    Names are the model's own (`state_dict` keys). `tied` maps a name that shares another's tensor to that name; nothing in the
    checkpoint gives the `missing` names; no parameter takes the `unexpected` tensors, and the family says to leave the `ignored`.
    """

    @property
    def tied(self) -> Mapping[str, str]: ...
    @property
    def missing(self) -> Sequence[str]: ...
    @property
    def unexpected(self) -> Sequence[str]: ...
    @property
    def ignored(self) -> Sequence[str]: ...
    @property
    def nbytes(self) -> int: ...
    def names(self) -> list[str]: ...
    def __contains__(self, name: object) -> bool: ...
    def sources(self, name: str) -> list[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def dtype(self, name: str) -> torch.dtype: ...
    def read(
        self, name: str, *, dtype: torch.dtype | None = None, experts: Sequence[int] | None = None
    ) -> Tensor: ...
    def check(self) -> None: ...
    def digest(self) -> str: ...


class Held(MutableMapping[str, Tensor]):
    """Held tensors by name. One may be spilled: it stays on disk and is read each time it is asked for."""

    def __init__(self, tensors: Mapping[str, Tensor] | None = None):
        self._there: dict[str, Tensor | Callable[[], Tensor]] = (
            dict(tensors._there) if isinstance(tensors, Held) else dict(tensors or {})
        )

    def __getitem__(self, name: str) -> Tensor:
        held = self._there[name]
        return held if isinstance(held, Tensor) else held()

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        self._there[name] = tensor

    def __delitem__(self, name: str) -> None:
        del self._there[name]

    def __contains__(self, name: object) -> bool:
        return name in self._there

    def __iter__(self) -> Iterator[str]:
        return iter(self._there)

    def __len__(self) -> int:
        return len(self._there)

    def same(self, other: Held, name: str) -> bool:
        """Whether both hold what was put there once under `name`; nothing is read for it."""
        return self._there.get(name) is other._there.get(name)

    def pop(self, name: str, default: Any = None) -> Any:
        """Forget a tensor; one that was spilled is not read for it."""
        return self._there.pop(name, default)

    def reader(self, name: str) -> Callable[[], Tensor]:
        """What gives a tensor, without reading it now."""
        held = self._there[name]
        return (lambda: held) if isinstance(held, Tensor) else held

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The shape of a tensor that is in memory, None for one that was spilled."""
        held = self._there[name]
        return tuple(held.shape) if isinstance(held, Tensor) else None

    def spill(self, name: str, read: Callable[[], Tensor]) -> None:
        """Drop the tensor called `name` from memory; `read` gives it again, or another in its place."""
        self._there[name] = read


def digest(tensor: Tensor) -> str:
    """Eight hexadecimal digits of a tensor's bytes."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)  # torch 2.11 views no scalar as bytes
    raw = flat.view(torch.uint8).numpy()
    return hashlib.sha256(raw.tobytes()).hexdigest()[:8]


def nonfinite(tensor: Tensor) -> str:
    """How many NaN and infinite values a float tensor holds, in words; empty where there are none."""
    if not tensor.is_floating_point() or tensor.numel() == 0 or tensor.dtype.itemsize == 1:
        return ""
    low, high = (
        tensor.detach().aminmax()
    )  # both are NaN if any element is; no temporary of the tensor's size
    if bool(torch.isfinite(low)) and bool(torch.isfinite(high)):
        return ""
    nan, inf = int(torch.isnan(tensor).sum()), int(torch.isinf(tensor).sum())
    return f"{nan} NaN and {inf} infinite values of {tensor.numel()}"
