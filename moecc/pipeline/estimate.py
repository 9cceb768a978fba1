"""Estimate the bits that a pipeline would store, before any weight is read.

Each pass, in the order in which they run, changes the estimate as it would change the model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from moecc.errors import MoeccError, naming
from moecc.pipeline.bits import per_weight


class Estimating(Protocol):
    """A pass with an estimate."""

    def estimate(self, found: Estimate) -> None: ...


@dataclass
class Outlook:
    """One projection [E, N, K] and the bits that it takes, at least (low) and at most (high)."""

    path: str
    experts: int
    rows: int
    columns: int
    input_side: bool  # gate_up, which reads the residual stream
    low: float
    high: float
    top_k: int  # experts per token
    groups: int  # of neighbouring experts, from which the router chooses first
    on_top: float = 0.0  # bits that may come on top, outside any budget
    coded: bool = False

    @property
    def weights(self) -> int:
        """Number of weights, E N K."""
        return self.experts * self.rows * self.columns

    def add(self, low: float, high: float | None = None) -> None:
        """Add bits to both bounds; `high` defaults to `low`."""
        self.low, self.high = self.low + low, self.high + (low if high is None else high)


@dataclass
class Matrix:
    """Any other parameter: shape, role (`moecc.checkpoint.roles`) and the bits that it takes."""

    shape: tuple[int, ...]
    role: str
    bits: float

    @property
    def weights(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass
class Estimate:
    """The estimate that passes change, one after the other."""

    projections: list[Outlook]
    others: dict[str, Matrix]  # by parameter
    # data that a pass leaves for later ones, by the fact that it provides
    data: dict[str, Any] = field(default_factory=dict)
    # a pass, and the bits per expert weight to which it limits later ones
    most: tuple[str, float] | None = None
    remarks: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)  # passes without an estimate

    def run(self, passes: Sequence[Estimating]) -> Estimate:
        """Apply every pass in turn.

        Raise MoeccError if a pass allows fewer bits than the others need.
        """
        for p in passes:
            with naming(p):
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
        """Number of weights of the routed experts."""
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
        """Bits of the coded experts, at least."""
        return sum(p.low for p in self.projections if p.coded)

    @property
    def rest(self) -> float:
        """Bits of everything else."""
        return sum(m.bits for m in self.others.values())
