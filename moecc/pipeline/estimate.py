"""What a pipeline would store, before a weight is read: each pass says what it changes, in the order in which they run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from moecc.errors import MoeccError
from moecc.pipeline.bits import per_weight


class Estimating(Protocol):
    """A pass, as far as it is asked here."""

    def estimate(self, found: Estimate) -> None: ...


@dataclass
class Outlook:
    """One projection: E experts, N rows, K columns, and the bits stored for it, at least and at most."""

    path: str
    experts: int
    rows: int
    columns: int
    input_side: bool  # whether it reads the residual stream: gate_up
    low: float
    high: float
    on_top: float = 0.0  # that may come on top, and that no plan of bits includes
    coded: bool = False

    @property
    def weights(self) -> int:
        """E N K."""
        return self.experts * self.rows * self.columns

    def add(self, low: float, high: float | None = None) -> None:
        """Count these bits on top; `high` is `low` if it is left out."""
        self.low, self.high = self.low + low, self.high + (low if high is None else high)


@dataclass
class Matrix:
    """Any other parameter: its shape, its role (`moecc.checkpoint.roles`), and the bits stored for it."""

    shape: tuple[int, ...]
    role: str
    bits: float

    @property
    def weights(self) -> int:
        """Its elements."""
        return math.prod(self.shape)


@dataclass
class Estimate:
    """What passes change. `data` carries what one leaves for later ones, by the fact that it provides."""

    projections: list[Outlook]
    others: dict[str, Matrix]  # by parameter
    data: dict[str, Any] = field(default_factory=dict)
    most: tuple[str, float] | None = (
        None  # a pass and the bits per expert weight that it lets later ones take
    )
    remarks: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)  # passes that do not say what they store

    def run(self, passes: Sequence[Estimating]) -> Estimate:
        """Ask every pass in turn; MoeccError if one allows fewer bits than the others need."""
        for p in passes:
            p.estimate(self)
        if self.most is not None and any(p.coded for p in self.projections):
            name, bits = self.most
            least = per_weight(sum(p.low for p in self.projections), self.weights)
            if least > bits:
                raise MoeccError(
                    f"{name}: too few bits; with scales and codebooks the least is {least:.3f}"
                )
        return self

    @property
    def weights(self) -> int:
        """Weights of the routed experts."""
        return sum(p.weights for p in self.projections)

    @property
    def experts(self) -> tuple[float, float]:
        """Bits of the routed experts, at least and at most."""
        low, high = sum(p.low for p in self.projections), sum(p.high for p in self.projections)
        if self.most is not None and any(p.coded for p in self.projections):
            high = self.most[1] * self.weights
        return low, high + sum(p.on_top for p in self.projections)

    @property
    def coded(self) -> float:
        """Bits of coded experts, at least."""
        return sum(p.low for p in self.projections if p.coded)

    @property
    def rest(self) -> float:
        """Bits of everything else."""
        return sum(m.bits for m in self.others.values())
