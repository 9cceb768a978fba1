"""A checkpoint with fewer experts: the store of a model from which a pass has taken some out.

Shapes: E experts before, E' kept. A parameter that has an entry per expert has a dimension of E, of
E * m (m rows for each expert, dbrx), or of E + z (a router's z experts that do nothing come last,
longcat_flash).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moecc.ir.tensors import Store


@dataclass(frozen=True)
class Cut:
    """The entries that stay of one parameter: `rows` of dimension `dim`."""

    dim: int
    rows: tuple[int, ...]

    def apply(self, tensor: Tensor) -> Tensor:
        """Return the rows that stay, in a tensor of its own."""
        return tensor.index_select(self.dim, torch.tensor(self.rows, device=tensor.device))


class CutStore:
    """`store` with some of its parameters cut; everything else is as it was."""

    def __init__(self, store: Store, cuts: Mapping[str, Cut]):
        self.store, self.cuts = store, dict(cuts)

    @property
    def tied(self) -> Mapping[str, str]:
        return self.store.tied

    @property
    def missing(self) -> Sequence[str]:
        return self.store.missing

    @property
    def unexpected(self) -> Sequence[str]:
        return self.store.unexpected

    @property
    def ignored(self) -> Sequence[str]:
        return self.store.ignored

    @property
    def nbytes(self) -> int:
        return self.store.nbytes

    def names(self) -> list[str]:
        return self.store.names()

    def __contains__(self, name: object) -> bool:
        return name in self.store

    def sources(self, name: str) -> list[str]:
        return self.store.sources(name)

    def shape(self, name: str) -> tuple[int, ...]:
        shape = tuple(self.store.shape(name))
        cut = self._cut(name)
        if cut is None:
            return shape
        return (*shape[: cut.dim], len(cut.rows), *shape[cut.dim + 1 :])

    def dtype(self, name: str) -> torch.dtype:
        return self.store.dtype(name)

    def read(
        self,
        name: str,
        *,
        dtype: torch.dtype | None = None,
        experts: Sequence[int] | None = None,
    ) -> Tensor:
        """Return the tensor as the store does, without the experts that were taken out.

        Only the experts that stay are read if each is a row of its own. Raise MoeccError as the
        store does.
        """
        cut = self._cut(name)
        if cut is None:
            return self.store.read(name, dtype=dtype, experts=experts)
        if cut.dim == 0 and len(self.shape(name)) > 1:
            rows = cut.rows if experts is None else [cut.rows[e] for e in experts]
            return self.store.read(name, dtype=dtype, experts=rows)
        tensor = cut.apply(self.store.read(name, dtype=dtype))
        return tensor if experts is None else tensor[list(experts)]

    def check(self) -> None:
        self.store.check()

    def digest(self) -> str:
        return self.store.digest()

    def _cut(self, name: str) -> Cut | None:
        return self.cuts.get(self.tied.get(name, name))
