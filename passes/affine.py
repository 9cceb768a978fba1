"""KBVQ-MoE, third part: a channel-wise affine correction of each projection's output.  arXiv 2602.11184.

  1. On the tokens routed to an expert, v is the coded part's output (without shared part and bias) and t what it stands for: the
     float projection of the float input minus the stored shared part of the input it will really get (down: hidden units behind
     the coded gate_up).
  2. Each output channel's t is regressed on v, tokens weighted by their squared routing weight: slope and offset, both drawn
     towards 1 and 0 by `_PRIOR` tokens so that an expert with few tokens is not bent to them.
     Where output errors have costs of their own (`sensitivity`), the slopes of all channels are fitted together under them.
  3. Both are fitted on every second token and kept only where they help on the others; then refitted on all. With
     offset=auto the offset must also be worth its 16/K bits per weight (`_code.rate`); behind `budget`, which plans no offsets, none
     is stored.
  4. The audit has what the correction is for: how far the mean of the output was off, and its variance, before and after, over
     the variance of what is wanted.

The paper has the correction, a slope and an offset per channel; that both come of a regression with a prior, and may be left out,
is ours.

Shapes: E experts, N rows; slope and offset [E, N], operands of `moecc::vq_experts` until `fold`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from moecc.errors import MoeccError
from moecc.ir import vq4
from moecc.ir.gates import apply_gate
from moecc.ir.moe import MoE
from moecc.ir.ops import VQ_EXPERTS
from moecc.options import option
from moecc.passes._code.metric import OUTPUT_DAMPING, damped
from moecc.passes._code.moments import Moments, Routed, hidden_units, routed_tokens
from moecc.passes._code.rate import gain
from moecc.pipeline.estimate import Estimate
from moecc.pipeline.passes import Context, Layer, LayerPass

_PRIOR = 32.0
_MOST_TOKENS = 2048  # of one expert, spread over the calibration text


@dataclass
class Sums:
    """Weighted sums over tokens, per output channel, that a line's fit and its error need (float64: errors are differences)."""

    count: int
    w: Tensor  # [] sum of weights
    v: Tensor  # [N] sum of w v, and so on
    t: Tensor
    vv: Tensor
    vt: Tensor
    tt: Tensor

    @classmethod
    def of(cls, v: Tensor, t: Tensor, weight: Tensor) -> Sums:
        """v, t [n, N], weight [n]."""
        w = weight.unsqueeze(-1)
        wv, wt = w * v, w * t
        sums = [
            weight.sum(),
            wv.sum(0),
            wt.sum(0),
            (wv * v).sum(0),
            (wv * t).sum(0),
            (wt * t).sum(0),
        ]
        return cls(len(v), *(x.double() for x in sums))

    @property
    def plain(self) -> Sums:
        return self

    def __add__(self, other: Sums) -> Sums:
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Sums(*(a + b for a, b in pairs))

    def line(self, *, offset: bool = True) -> tuple[Tensor, Tensor]:
        """Least squares t ~ slope * v + offset per channel, drawn towards (1, 0): [N], [N]."""
        total = self.w.clamp(min=1e-30)
        mean_v, mean_t = (self.v / total, self.t / total) if offset else (self.v * 0, self.t * 0)
        spread, joint = self.vv / total - mean_v.square(), self.vt / total - mean_v * mean_t
        trust = self.count / (self.count + _PRIOR)
        fits = spread > 1e-12 * (self.vv / total) + 1e-30
        slope = 1 + trust * torch.where(
            fits, joint / spread.clamp(min=1e-30) - 1, torch.zeros_like(spread)
        )
        return slope, trust * (mean_t - slope * mean_v)

    def error(self, slope: Tensor | float, offset: Tensor | float) -> float:
        """sum of w (t - slope v - offset)^2."""
        a, b = slope, offset
        terms = (
            self.tt
            - 2 * a * self.vt
            - 2 * b * self.t
            + a * a * self.vv
            + 2 * a * b * self.v
            + b * b * self.w
        )
        return float(terms.sum())


@dataclass
class CoupledSums:
    """The same where an error r [N] of the output costs r^T S r: sums of products of all pairs of channels, [N, N] each."""

    cost: Tensor  # S
    plain: Sums
    vv: Tensor  # sum of w v v^T, and so on
    vt: Tensor
    tt: Tensor

    @classmethod
    def of(cls, v: Tensor, t: Tensor, weight: Tensor, cost: Tensor) -> CoupledSums:
        wv, wt = (weight.unsqueeze(-1) * x for x in (v, t))
        products = [x.double() for x in (wv.T @ v, wv.T @ t, wt.T @ t)]
        return cls(cost.double(), Sums.of(v, t, weight), *products)

    def __add__(self, other: CoupledSums) -> CoupledSums:
        names = ("plain", "vv", "vt", "tt")
        return CoupledSums(self.cost, *(getattr(self, n) + getattr(other, n) for n in names))

    def line(self, *, offset: bool = True) -> tuple[Tensor, Tensor]:
        """The slopes that are best together, and the offsets that take out what is left of the mean."""
        p, total = self.plain, self.plain.w.clamp(min=1e-30)
        mean_v, mean_t = (p.v / total, p.t / total) if offset else (p.v * 0, p.t * 0)
        joint = self.cost * (self.vt / total - torch.outer(mean_v, mean_t))
        spread = self.cost * (self.vv / total - torch.outer(mean_v, mean_v))
        beyond = torch.linalg.solve(damped(spread.unsqueeze(0), 1e-6)[0], (joint - spread).sum(1))
        trust = p.count / (p.count + _PRIOR)
        slope = 1 + trust * beyond
        return slope, trust * (mean_t - slope * mean_v)

    def error(self, slope: Tensor | float, offset: Tensor | float) -> float:
        """sum of w r^T S r, r = t - slope v - offset."""
        p = self.plain
        a, b = (torch.zeros_like(p.v) + x for x in (slope, offset))
        rr = self.tt - 2 * a.unsqueeze(1) * self.vt + torch.outer(a, a) * self.vv
        rr = rr - 2 * torch.outer(b, p.t - a * p.v) + torch.outer(b, b) * p.w
        return float((self.cost * rr).sum())


class Fit(NamedTuple):
    """Slope and offset [E, N] of a projection, None where they do not help; and the shift of its output before and after."""

    slope: Tensor | None
    offset: Tensor | None
    shift: dict[str, list[float]]


def shift(
    sums: list[Sums], lines: list[tuple[Tensor | float, Tensor | float]]
) -> dict[str, list[float]]:
    """Squared error of the output's mean, and its variance, both over the variance of what is wanted: [before, after]."""
    found: dict[str, list[float]] = {"mean": [], "variance": []}
    wanted = sum(float((s.tt - s.t.square() / s.w.clamp(min=1e-30)).sum()) for s in sums)
    for each in ([(1.0, 0.0)] * len(sums), lines):
        mean = variance = 0.0
        for s, (slope, offset) in zip(sums, each, strict=True):
            total = s.w.clamp(min=1e-30)
            mean += float(((slope * s.v + offset * s.w - s.t).square() / total).sum())
            variance += float((slope * slope * (s.vv - s.v.square() / total)).sum())
        found["mean"].append(mean / max(wanted, 1e-30))
        found["variance"].append(variance / max(wanted, 1e-30))
    return found


@dataclass(frozen=True, kw_only=True)
class AffineCorrection(LayerPass):
    name: ClassVar[str] = "affine"
    requires: ClassVar[frozenset[str]] = frozenset({"vq"})
    provides: ClassVar[frozenset[str]] = frozenset({"affine"})
    leads_to: ClassVar[frozenset[str]] = frozenset({"folded"})
    needs_data: ClassVar[bool] = True
    offset: str = option("auto", help="store an offset per channel where worth its bits (behind budget: never), always, never",
                         choices=("auto", "on", "off"))  # fmt: skip

    def estimate(self, found: Estimate) -> None:
        for p in found.projections:
            offsets = 16 * p.experts * p.rows
            p.add(offsets * (self.offset == "on"), offsets * (self.offset != "off"))

    def run_layer(self, layer: Layer, ctx: Context) -> bool:
        return any(
            [self.correct(layer, moe, ctx) for moe in layer.moe if moe.node.target is VQ_EXPERTS]
        )

    def correct(self, layer: Layer, moe: MoE, ctx: Context) -> bool:
        planned = "budget" in ctx.data
        if planned and self.offset == "on":
            raise MoeccError("affine: offset=on can't be planned by budget; leave it out")
        routed = layer.data.get(("routed", moe.path)) or routed_tokens(layer, moe)
        coded = {p.name: CodedProjection(layer.stored(p), p.input_side) for p in moe.projections}
        dense = {p.name: layer.original(p) for p in moe.projections}
        dense["gate_up_bias"] = layer.original(moe.gate_up, "bias")
        moments: Moments | None = layer.data.get(("moments", moe.path))
        costs = {p: None if moments is None else moments.output_of(p) for p in coded}
        fits = (replace(self, offset="off") if planned else self).fit(
            moe, routed, coded, dense, costs
        )
        for projection in moe.projections:
            slope, offset, moved = fits[projection.name]
            found = {k: v for k, v in (("slope", slope), ("offset", offset)) if v is not None}
            projection.set_operands(
                {k: layer.program.add(f"{projection.path}.{k}", v) for k, v in found.items()}
            )
            ctx.record(projection.path, affine="+".join(found) or "none", output_shift=moved)
        return any(v is not None for fit in fits.values() for v in (fit.slope, fit.offset))

    def fit(
        self,
        moe: MoE,
        routed: Routed,
        coded: dict[str, CodedProjection],
        dense: dict[str, Tensor | None],
        costs: dict[str, Tensor | None],
    ) -> dict[str, Fit]:
        """The corrections of both projections."""
        gate_up, down, bias = dense["gate_up"], dense["down"], dense["gate_up_bias"]
        assert gate_up is not None and down is not None
        inputs: dict[int, tuple[Tensor, Tensor, Tensor, Tensor]] = {}
        found: dict[str, Fit] = {}
        for e in range(len(gate_up)):
            rows = routed.rows(e)
            rows = rows[:: max(1, -(-len(rows) // _MOST_TOKENS))]
            x, weight = routed.x[rows], routed.weight_of(e, rows).square()
            inputs[e] = (x, gate_up[e], x, weight)
        found["gate_up"] = first = self.regress(coded["gate_up"], inputs, costs["gate_up"])
        for e, (x, w, _, weight) in list(inputs.items()):
            rows_out = coded["gate_up"].apply(e, x, first.slope, first.offset)
            a = moe.attributes
            arrived = apply_gate(rows_out, a["act"], a["gate"], a["alpha"], a["limit"])
            intended = hidden_units(moe, x, w, None if bias is None else bias[e])
            inputs[e] = (intended, down[e], arrived, weight)
        found["down"] = self.regress(coded["down"], inputs, costs["down"])
        return found

    def regress(
        self,
        coded: CodedProjection,
        inputs: dict[int, tuple[Tensor, Tensor, Tensor, Tensor]],
        cost: Tensor | None,
    ) -> Fit:
        coded_error = slope_error = both_error = 0.0
        sums: list[Sums] = []
        lines: dict[bool, list[tuple[Tensor, Tensor]]] = {
            True: [],
            False: [],
        }  # with and without an offset
        for e, (intended, dense, arrived, weight) in inputs.items():
            v, low = coded.parts(e, arrived)
            t = intended @ dense.T - low
            fit, rest = (
                self.sums(v[i::2], t[i::2], weight[i::2], None if cost is None else cost[e])
                for i in (0, 1)
            )
            coded_error += rest.error(1.0, 0.0)
            slope_error += rest.error(fit.line(offset=False)[0], 0.0)
            both_error += rest.error(*fit.line(offset=True))
            both = fit + rest
            sums.append(both.plain)
            for offset, found in lines.items():
                found.append(both.line(offset=offset))
        price = 0.0 if coded.bias is not None else 16 / coded.columns
        worth = gain(min(coded_error, slope_error), both_error, price) > 0
        use_offset = self.offset == "on" or (self.offset == "auto" and worth)
        if not use_offset and slope_error >= coded_error:
            return Fit(None, None, shift(sums, [(1.0, 0.0)] * len(sums)))
        slope, offsets = (
            torch.stack([pair[i] for pair in lines[use_offset]]).float() for i in (0, 1)
        )
        return Fit(slope, offsets if use_offset else None, shift(sums, list(lines[use_offset])))

    def sums(self, v: Tensor, t: Tensor, weight: Tensor, cost: Tensor | None) -> Any:
        if cost is None:
            return Sums.of(v, t, weight)
        return CoupledSums.of(v, t, weight, damped(cost.unsqueeze(0), OUTPUT_DAMPING)[0])


@dataclass
class CodedProjection:
    """One projection's stored tensors, for evaluating it expert by expert."""

    tensors: dict[str, Tensor | None]
    input_side: bool

    @property
    def bias(self) -> Tensor | None:
        return self.tensors["bias"]

    @cached_property
    def mean(self) -> Tensor | None:
        """[1, N, K padded] that all experts share as it is."""
        return vq4.mean_part(self.tensors, self.columns, torch.float32)

    @property
    def columns(self) -> int:
        codes, book = self.tensors["codes"], self.tensors["codebook"]
        assert codes is not None and book is not None
        return codes.shape[-1] * book.shape[-1]

    def parts(self, e: int, x: Tensor) -> tuple[Tensor, Tensor | float]:
        """scale * VQ x, and the shared part of x: [n, K] -> [n, N] each."""
        t = self.tensors
        codes, signs, book, scale = t["codes"], t["signs"], t["codebook"], t["scale"]
        assert codes is not None and book is not None and scale is not None
        one = slice(e, e + 1)
        table = book[one] if len(book) > 1 else book
        weight = vq4.decode(
            codes[one], None if signs is None else signs[one], table, x.shape[-1], torch.float32
        )[0]
        v = (x @ weight.T) * scale[e].float()
        low = None if self.mean is None else self.mean[0, :, : x.shape[-1]]
        if t["basis"] is not None and t["coef"] is not None and t["coef_scale"] is not None:
            coef = (t["coef"][one], t["coef_scale"][one], t["basis"])
            basis = vq4.basis_part(*coef, torch.float32, input_side=self.input_side)[0]
            low = basis if low is None else low + basis
        return v, 0.0 if low is None else x @ low.T

    def apply(self, e: int, x: Tensor, slope: Tensor | None, offset: Tensor | None) -> Tensor:
        v, low = self.parts(e, x)
        y = (v if slope is None else v * slope[e]) + low
        for shift in (self.bias, offset):
            if shift is not None:
                y = y + shift[e].float()
        return y
