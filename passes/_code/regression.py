"""Least-squares lines t ~ slope * v + offset for every output channel of an expert, from sums.

The sums of parts of the tokens add up, so that a fit on one half can be judged on the other and
the fit on all costs no second pass. Slopes are drawn towards 1 and offsets towards 0 by `_PRIOR`
tokens, so that an expert with few tokens is not bent to them.

Shapes: n tokens, N output channels; v, t [n, N]; weights of tokens [n]; slope, offset [N].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch import Tensor

from moecc.ir.relative import relative
from moecc.passes._code.metric import damping

_PRIOR = 32.0


class Regression(Protocol):
    """Sums of some tokens, and the fits and errors that they give."""

    @property
    def plain(self) -> Sums:
        """The sums per channel."""

    def __add__(self, other: Self) -> Self:
        """The sums of both sets of tokens."""

    def line(self, *, offset: bool = True) -> tuple[Tensor, Tensor]:
        """The best slope and offset, [N] each; offset=False: the best line through zero."""

    def error(self, slope: Tensor | float, offset: Tensor | float) -> float:
        """The cost of the residual of a line, summed over tokens."""


@dataclass
class Sums:
    """Weighted sums over tokens per channel, in float64 because errors are small differences."""

    count: int
    w: Tensor  # [] sum of weights
    v: Tensor  # [N] sum of w v; the others likewise
    t: Tensor
    vv: Tensor
    vt: Tensor
    tt: Tensor

    @classmethod
    def of(cls, v: Tensor, t: Tensor, weight: Tensor) -> Sums:
        """The sums of v, t [n, N] under `weight` [n]."""
        w = weight.unsqueeze(-1)
        wv, wt = w * v, w * t
        products = [(wv * v).sum(0), (wv * t).sum(0), (wt * t).sum(0)]
        sums = [weight.sum(), wv.sum(0), wt.sum(0), *products]
        return cls(len(v), *(x.double() for x in sums))

    @property
    def plain(self) -> Sums:
        """Itself."""
        return self

    def __add__(self, other: Sums) -> Sums:
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Sums(*(a + b for a, b in pairs))

    def line(self, *, offset: bool = True) -> tuple[Tensor, Tensor]:
        """Each channel's own least squares, drawn towards (1, 0)."""
        total = self.w.clamp(min=1e-30)
        mean_v, mean_t = (self.v / total, self.t / total) if offset else (self.v * 0, self.t * 0)
        spread, joint = self.vv / total - mean_v.square(), self.vt / total - mean_v * mean_t
        trust = self.count / (self.count + _PRIOR)
        fits = spread > 1e-12 * (self.vv / total) + 1e-30
        beyond = joint / spread.clamp(min=1e-30) - 1
        slope = 1 + trust * torch.where(fits, beyond, torch.zeros_like(spread))
        return slope, trust * (mean_t - slope * mean_v)

    def error(self, slope: Tensor | float, offset: Tensor | float) -> float:
        """sum of w (t - slope v - offset)^2."""
        a, b = slope, offset
        squares = self.tt - 2 * a * self.vt - 2 * b * self.t + a * a * self.vv
        return float((squares + 2 * a * b * self.v + b * b * self.w).sum())


@dataclass
class CoupledSums:
    """The same if an error r [N] of the output costs r^T S r: sums over all pairs of channels.

    Each pair counts by its cost right away, so that one matrix is kept and none for t.
    """

    cost: Tensor  # S [N, N]
    plain: Sums
    vv: Tensor  # [N, N] S times the sum of w v v^T, number by number
    vt: Tensor  # [N] its like for v t^T, added up over the channels of t
    tt: Tensor  # [] for t t^T, added up over all pairs

    @classmethod
    def of(cls, v: Tensor, t: Tensor, weight: Tensor, cost: Tensor) -> CoupledSums:
        """The sums of v, t [n, N] under `weight` [n] and S = `cost` [N, N]."""
        w, costly = weight.unsqueeze(-1), t @ cost.to(t.dtype)
        vt, tt = ((w * x * costly).double().sum(0) for x in (v, t))
        vv = ((w * v).T @ v).double().mul_(cost)
        return cls(cost.double(), Sums.of(v, t, weight), vv, vt, tt.sum())

    def __add__(self, other: CoupledSums) -> CoupledSums:
        names = ("plain", "vv", "vt", "tt")
        return CoupledSums(self.cost, *(getattr(self, n) + getattr(other, n) for n in names))

    def line(self, *, offset: bool = True) -> tuple[Tensor, Tensor]:
        """The slopes that are best together, and the offsets that take out the rest of the mean."""
        p, total = self.plain, self.plain.w.clamp(min=1e-30)
        mean_v, mean_t = (p.v / total, p.t / total) if offset else (p.v * 0, p.t * 0)
        joint = self.vt / total - mean_v * (self.cost @ mean_t)
        spread = self.vv / total
        if offset:
            spread -= self.cost * torch.outer(mean_v, mean_v)
        wanted, diagonal = joint - spread.sum(1), spread.diagonal()
        diagonal += damping(diagonal.unsqueeze(0), 1e-6)[0]
        beyond = _solved(spread, wanted)
        trust = p.count / (p.count + _PRIOR)
        slope = 1 + trust * beyond
        return slope, trust * (mean_t - slope * mean_v)

    def error(self, slope: Tensor | float, offset: Tensor | float) -> float:
        """sum of w r^T S r, with r = t - slope v - offset."""
        p = self.plain
        a, b = (torch.zeros_like(p.v) + x for x in (slope, offset))
        found = self.tt - 2 * a @ self.vt + a @ (self.vv @ a)
        if b.any():
            found += (self.cost @ b) @ (p.w * b - 2 * (p.t - a * p.v))
        return float(found)


def _solved(matrix: Tensor, right: Tensor) -> Tensor:
    """x with matrix x = right; rounding may have left the matrix [N, N] just not positive."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if failed:
        found: Tensor = torch.linalg.solve(matrix, right)
        return found
    return torch.cholesky_solve(right.unsqueeze(-1), factor).squeeze(-1)


def sums_of(v: Tensor, t: Tensor, weight: Tensor, cost: Tensor | None) -> Regression:
    """The sums under costs of output errors [N, N], damped; None: all channels alike."""
    return Sums.of(v, t, weight) if cost is None else CoupledSums.of(v, t, weight, cost)


def shift(
    sums: list[Sums], lines: list[tuple[Tensor | float, Tensor | float]]
) -> dict[str, list[float]]:
    """How far a projection's output is off, before and after a correction, over all experts.

    sums, lines: per expert. Returns the squared error of the output's mean, and its variance, both
    over the variance of the wanted output, as [before, after].
    """
    found: dict[str, list[float]] = {"mean": [], "variance": []}
    wanted = sum(float((s.tt - s.t.square() / s.w.clamp(min=1e-30)).sum()) for s in sums)
    for each in ([(1.0, 0.0)] * len(sums), lines):
        mean = variance = 0.0
        for s, (slope, offset) in zip(sums, each, strict=True):
            total = s.w.clamp(min=1e-30)
            mean += float(((slope * s.v + offset * s.w - s.t).square() / total).sum())
            variance += float((slope * slope * (s.vv - s.v.square() / total)).sum())
        found["mean"].append(float(relative(mean, wanted)))
        found["variance"].append(float(relative(variance, wanted)))
    return found
