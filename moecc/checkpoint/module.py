"""The weights of a module in memory, through the interface of `moecc.checkpoint.store`."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake

from moecc.checkpoint.files import as_bytes
from moecc.checkpoint.values import kept_dtype, require_finite, require_squares
from moecc.errors import MoeccError


class ModuleStore:
    """The interface of `CheckpointStore` over the tensors of a module in memory."""

    missing: list[str]
    unexpected: list[str] = []
    ignored: list[str] = []

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._tensors: dict[str, Tensor] = model.state_dict(keep_vars=True)
        owners: dict[int, str] = {}
        shared = {
            name: owners.setdefault(id(tensor), name) for name, tensor in self._tensors.items()
        }
        self.tied = {name: owner for name, owner in shared.items() if name != owner}
        self.missing = [
            name for name, tensor in self._tensors.items() if tensor.is_meta or is_fake(tensor)
        ]

    def names(self) -> list[str]:
        return [name for name in self._tensors if name in self]

    def __contains__(self, name: object) -> bool:
        return name in self._tensors and name not in self.missing

    def sources(self, name: str) -> list[str]:
        return [self.tied.get(name, name)]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensor(name).shape)

    def dtype(self, name: str) -> torch.dtype:
        return self._tensor(name).dtype

    @property
    def nbytes(self) -> int:
        return sum(self._tensors[name].nbytes for name in self.names() if name not in self.tied)

    def read(
        self,
        name: str,
        *,
        dtype: torch.dtype | None = None,
        experts: Sequence[int] | None = None,
    ) -> Tensor:
        """Return a copy, so that a pass that writes to it leaves the module alone.

        Raise MoeccError if the tensor holds NaN or infinity."""
        tensor = self._tensor(name)
        to = tensor.dtype if dtype is None else kept_dtype(self.model, name, tensor, dtype)
        rows = tensor.detach() if experts is None else tensor.detach()[list(experts)]
        for require in (require_finite, require_squares):
            require(rows, f"'{name}' of the {type(self.model).__name__}")
        return rows.to(device="cpu", dtype=to, copy=True)

    def _tensor(self, name: str) -> Tensor:
        if name not in self:
            raise MoeccError(f"the {type(self.model).__name__} has no tensor for '{name}'")
        return self._tensors[name]

    def check(self) -> None:
        """Raise MoeccError if a tensor has no values."""
        if self.missing:
            raise MoeccError(
                f"'{self.missing[0]}' has no values (a meta tensor); "
                "load the model's weights before tracing"
            )

    def digest(self) -> str:
        """Return SHA-256 over every name, dtype, shape and byte."""
        sha = hashlib.sha256()
        for name in sorted(self.names()):
            tensor = self._tensors[name]
            sha.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
            sha.update(as_bytes(tensor.cpu().contiguous()))
        return sha.hexdigest()
