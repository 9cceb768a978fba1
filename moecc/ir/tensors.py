"""A program's tensors: `Weight` names one, `Store` reads the checkpoint's, `Held` has the others.

A held tensor is in memory, whatever device made it, or spilled to disk and read on demand.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, fx

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Weight:
    """The tensor behind a placeholder, by name; `recipe` computes a derived one from `sources`."""

    name: str
    recipe: fx.GraphModule | None = None
    sources: tuple[str, ...] = ()


class Store(Protocol):
    """The source of a model's plain weights: a checkpoint (`moecc.checkpoint.store`) or a module.

    Names are the model's own (`state_dict` keys). `tied` maps a name to the name whose tensor it
    shares. The checkpoint lacks the `missing` names. No parameter takes the `unexpected` tensors.
    The `ignored` tensors are left out because the family says so.
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
    def nbytes(self) -> int:
        """Bytes of the weights as they are stored."""

    def names(self) -> list[str]:
        """Return every name that can be read, tied ones included, in the model's order."""

    def __contains__(self, name: object) -> bool: ...

    def sources(self, name: str) -> list[str]:
        """Return the names of the stored tensors that make `name`."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape that the model has for `name`."""

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype that `name` is stored in."""

    def read(
        self, name: str, *, dtype: torch.dtype | None = None, experts: Sequence[int] | None = None
    ) -> Tensor:
        """Return the tensor of `name`, as a copy that the caller owns.

        dtype: by default the stored one. experts: rows of [E, ...] to read, in that order. Raise
        MoeccError for a name without a tensor, and for NaN or infinity.
        """

    def check(self) -> None:
        """Raise MoeccError if the weights don't fit the model; no weight is read."""

    def digest(self) -> str:
        """Return a SHA-256 that tells the weights from others."""


@dataclass(frozen=True)
class Reader:
    """A held tensor that is not in memory: how to read it, and some of its rows [E, ...] alone."""

    whole: Callable[[], Tensor]
    some: Callable[[Sequence[int]], Tensor] | None = None  # None: by reading all

    def rows(self, experts: Sequence[int]) -> Tensor:
        """Return the rows `experts`."""
        return self.whole()[list(experts)] if self.some is None else self.some(experts)


class Held(MutableMapping[str, Tensor]):
    """Held tensors by name. A spilled tensor stays on disk and is read at every access."""

    def __init__(self, tensors: Mapping[str, Tensor] | None = None):
        self._there: dict[str, Tensor | Reader] = (
            dict(tensors._there) if isinstance(tensors, Held) else dict(tensors or {})
        )

    def __getitem__(self, name: str) -> Tensor:
        held = self._there[name]
        return held if isinstance(held, Tensor) else held.whole()

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        self._there[name] = tensor.to(CPU)

    def __delitem__(self, name: str) -> None:
        del self._there[name]

    def __contains__(self, name: object) -> bool:
        return name in self._there

    def __iter__(self) -> Iterator[str]:
        return iter(self._there)

    def __len__(self) -> int:
        return len(self._there)

    def same(self, other: Held, name: str) -> bool:
        """Return whether both hold the very same tensor under `name`; nothing is read."""
        return self._there.get(name) is other._there.get(name)

    def pop(self, name: str, default: Any = None) -> Any:
        """Drop a tensor; unlike a plain mapping's `pop`, this reads no spilled one."""
        return self._there.pop(name, default)

    def reader(self, name: str) -> Reader:
        """Return what reads the tensor; nothing is read now."""
        held = self._there[name]
        if isinstance(held, Reader):
            return held
        return Reader(lambda: held, lambda experts: held[list(experts)])

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Return the shape of a tensor in memory; None if it was spilled."""
        held = self.in_memory(name)
        return None if held is None else tuple(held.shape)

    def in_memory(self, name: str) -> Tensor | None:
        """Return the tensor if it is in memory; None if it was spilled or is not held."""
        held = self._there.get(name)
        return held if isinstance(held, Tensor) else None

    def spill(
        self,
        name: str,
        read: Callable[[], Tensor],
        some: Callable[[Sequence[int]], Tensor] | None = None,
    ) -> None:
        """Drop the tensor from memory; from now on `read` gives it, or its replacement.

        some: gives only the rows of some experts.
        """
        self._there[name] = Reader(read, some)


def digest(tensor: Tensor) -> str:
    """Return the first eight hexadecimal digits of the SHA-256 of a tensor's bytes."""
    # torch 2.11 cannot view a scalar as bytes
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    raw = flat.view(torch.uint8).numpy()
    return hashlib.sha256(raw.tobytes()).hexdigest()[:8]


def nonfinite(tensor: Tensor) -> str:
    """Count NaN and infinite values of a float tensor, in words; return "" if there are none."""
    if not tensor.is_floating_point() or tensor.numel() == 0 or tensor.dtype.itemsize == 1:
        return ""
    # no temporary of the tensor's size; both are NaN if any element is
    low, high = tensor.detach().aminmax()
    if bool(torch.isfinite(low)) and bool(torch.isfinite(high)):
        return ""
    nan, inf = int(torch.isnan(tensor).sum()), int(torch.isinf(tensor).sum())
    return f"{nan} NaN and {inf} infinite values of {tensor.numel()}"
