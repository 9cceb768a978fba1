"""KBVQ-MoE, third part: a channel-wise affine correction of each output.  arXiv 2602.11184.

  1. On the tokens that are routed to an expert, let v be the output of the coded part, without
     shared part and bias. Let t be the output that v stands for: the float projection of the float
     input, minus the stored shared part of the input that the projection will really get (for down:
     hidden units behind the coded gate_up).
  2. Regress each output channel's t on v, tokens weighted by their squared routing weight. Draw
     slope and offset towards 1 and 0 by 32 tokens, so that an expert with few tokens is not bent to
     them. If output errors have costs of their own (`sensitivity`), fit the slopes of all channels
     together under these costs (`_code.regression`).
  3. Fit both on every second token and keep them only if they help on the others; then fit again
     on all tokens. With offset=auto the offset must also be worth its 16/K bits per weight
     (`_code.rate`). Behind `budget`, which plans no offsets, store none.
  4. The audit shows the purpose of the correction: how far the mean of the output was off, and its
     variance, before and after, over the variance of the wanted output.

The paper has the correction, a slope and an offset per channel. The regression with a prior, and
the choice to leave either out, are ours.

Cost in bits per weight: none for slopes, which `fold` takes into the scales; 16/K for offsets of a
projection that has no bias.

Shapes: E experts, n tokens, N rows, K columns; slope and offset [E, N], operands of
`moecc::vq_experts` until `fold`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from moecc.errors import MoeccError
from moecc.ir.gates import apply_gate
from moecc.ir.moe import MoE
from moecc.ir.ops import VQ_EXPERTS
from moecc.options import option
from moecc.passes._code.metric import OUTPUT_DAMPING, damped, woven
from moecc.passes._code.moments import Common, Expert, Moments, Routed, hidden_units, routed_tokens
from moecc.passes._code.rate import gain
from moecc.passes._code.regression import Sums, shift, sums_of
from moecc.passes._code.stored import CodedProjection
from moecc.pipeline.estimate import Estimate
from moecc.pipeline.passes import Context, Layer, LayerPass
from moecc.pipeline.work import Scope, Work, factor
from moecc.pipeline.workers.base import Workers
from moecc.types import Json

_MOST_TOKENS = 2048  # of one expert, spread over the calibration text


@dataclass(frozen=True)
class Unit:
    """One expert and its calibration tokens.

    gate_up is fitted on what arrives there; down, if `fit` is given, on what arrives behind it.
    """

    attributes: Json
    x: Tensor  # [n, D]
    weight: Tensor  # [n]: squared routing weights
    expert: Expert | None  # bare; tells what errors of outputs cost; None: all channels alike
    dense: tuple[Tensor, Tensor, Tensor | None]  # the float gate_up, down and gate_up's bias
    gate_up: CodedProjection
    down: CodedProjection
    fit: tuple[Tensor | None, Tensor | None] | None = None  # slope and offset of gate_up, [N]


@dataclass(frozen=True)
class Line:
    """What one expert's tokens say of the correction of a projection."""

    coded: float  # the error on held-out tokens without any
    slope: float  # with a slope
    both: float  # with an offset too
    sums: Sums
    lines: dict[bool, tuple[Tensor, Tensor]]  # slope and offset by whether there is an offset

    @classmethod
    def woven(cls, parts: Sequence[Line], sums: Sums) -> Line:
        """That of all channels from those of each block, as `_code.metric` has blocks."""

        def channels(offset: bool, which: int) -> Tensor:
            return woven(torch.stack([part.lines[offset][which] for part in parts]))

        coded, slope, both = (sum(getattr(p, n) for p in parts) for n in ("coded", "slope", "both"))
        lines = {offset: (channels(offset, 0), channels(offset, 1)) for offset in (True, False)}
        return cls(coded, slope, both, sums, lines)


class Fit(NamedTuple):
    """Slope and offset [E, N] of a projection, None if they do not help; its `shift`."""

    slope: Tensor | None
    offset: Tensor | None
    shift: dict[str, list[float]]


@dataclass(frozen=True, kw_only=True)
class AffineCorrection(LayerPass):
    name: ClassVar[str] = "affine"
    requires: ClassVar[frozenset[str]] = frozenset({"vq"})
    provides: ClassVar[frozenset[str]] = frozenset({"affine"})
    leads_to: ClassVar[frozenset[str]] = frozenset({"folded"})
    needs_data: ClassVar[bool] = True
    offset: str = option(
        "auto",
        help="store an offset per channel: if worth its bits (behind budget: never), always, never",
        choices=("auto", "on", "off"),
    )

    def estimate(self, found: Estimate) -> None:
        for p in found.projections:
            offsets = 16 * p.experts * p.rows
            p.add(offsets * (self.offset == "on"), offsets * (self.offset != "off"))

    def work(self, scope: Scope) -> Work:
        done = Work()
        for layer in scope.layers:
            seen = min(_MOST_TOKENS, scope.tokens * layer.top_k / layer.experts)
            done.products += layer.experts * seen * 5 * layer.weights
            if scope.weighted:
                sizes = list(zip((layer.rows, layer.hidden), layer.blocks, strict=True))
                done.products += layer.experts * sum(2 * seen * n**2 / b for n, b in sizes)
                # solved in float64, three times
                done.factors += layer.experts * sum(3 * factor(n, b) for n, b in sizes)
        return done

    def run_layer(self, layer: Layer, ctx: Context) -> bool:
        return any(
            [self.correct(layer, moe, ctx) for moe in layer.moe if moe.node.target is VQ_EXPERTS]
        )

    def correct(self, layer: Layer, moe: MoE, ctx: Context) -> bool:
        """Fit and store the corrections of one layer's experts; return whether there are any."""
        planned = "budget" in ctx.data
        if planned and self.offset == "on":
            raise MoeccError("affine: offset=on can't be planned by budget; leave it out")
        fits = (replace(self, offset="off") if planned else self).fit(layer, moe, ctx.workers)
        for projection in moe.projections:
            slope, offset, moved = fits[projection.name]
            found = {k: v for k, v in (("slope", slope), ("offset", offset)) if v is not None}
            projection.set_operands(
                {k: layer.program.add(f"{projection.path}.{k}", v) for k, v in found.items()}
            )
            ctx.record(projection.path, affine="+".join(found) or "none", output_shift=moved)
        return any(v is not None for fit in fits.values() for v in (fit.slope, fit.offset))

    def fit(self, layer: Layer, moe: MoE, workers: Workers) -> dict[str, Fit]:
        """The corrections of both projections, by name; down's is fitted behind gate_up's."""
        units = _Units(layer, moe)
        first = self.chosen(units.gate_up, list(workers.run(regress, units.each(), units.common)))
        behind = list(workers.run(regress, units.each(first), units.common))
        return {"gate_up": first, "down": self.chosen(units.down, behind)}

    def chosen(self, coded: CodedProjection, found: list[Line]) -> Fit:
        """Step 3 for one projection, from the lines of its experts."""
        coded_error, slope_error, both_error = (
            sum(getattr(line, name) for line in found) for name in ("coded", "slope", "both")
        )
        price = 0.0 if coded.bias is not None else 16 / coded.columns
        worth = gain(min(coded_error, slope_error), both_error, price) > 0
        use_offset = self.offset == "on" or (self.offset == "auto" and worth)
        sums = [line.sums for line in found]
        if not use_offset and slope_error >= coded_error:
            return Fit(None, None, shift(sums, [(1.0, 0.0)] * len(sums)))
        lines = [line.lines[use_offset] for line in found]
        slope, offsets = (torch.stack([line[i] for line in lines]).float() for i in (0, 1))
        return Fit(slope, offsets if use_offset else None, shift(sums, list(lines)))


def regress(unit: Unit, common: Common | None = None) -> Line:
    """Steps 1 and 2 for one expert's projection."""
    gate_up, down, bias = unit.dense
    coded, arrived, intended, dense, name = unit.gate_up, unit.x, unit.x, gate_up, "gate_up"
    if unit.fit is not None:
        a, name = unit.attributes, "down"
        rows = unit.gate_up.apply(0, unit.x, *(None if f is None else f[None] for f in unit.fit))
        coded, arrived = unit.down, apply_gate(rows, a["act"], a["gate"], a["alpha"], a["limit"])
        intended, dense = hidden_units(a, unit.x, gate_up, bias), down
    v, low = coded.parts(0, arrived)
    t = intended @ dense.T - low
    cost = None
    if unit.expert is not None and common is not None:
        cost = unit.expert.under(common).output(name)
    return judged(v, t, unit.weight, cost)


def judged(v: Tensor, t: Tensor, weight: Tensor, cost: Tensor | None) -> Line:
    """The line of channels v, t [n, N] under costs [b, B, B] of their errors, if any."""
    if cost is None:
        return _judged(v, t, weight)
    blocks = damped(cost.unsqueeze(0), OUTPUT_DAMPING)[0]
    some = (slice(i, None, len(blocks)) for i in range(len(blocks)))
    parts = [_judged(v[:, n], t[:, n], weight, b) for n, b in zip(some, blocks, strict=True)]
    return Line.woven(parts, Sums.of(v, t, weight))


def _judged(v: Tensor, t: Tensor, weight: Tensor, cost: Tensor | None = None) -> Line:
    fit, rest = (sums_of(v[i::2], t[i::2], weight[i::2], cost) for i in (0, 1))
    coded_error, slope_error = rest.error(1.0, 0.0), rest.error(fit.line(offset=False)[0], 0.0)
    both = fit + rest
    lines = {offset: both.line(offset=offset) for offset in (True, False)}
    both_error = rest.error(*fit.line(offset=True))
    return Line(coded_error, slope_error, both_error, both.plain, lines)


class _Units:
    """The experts of a layer, one unit each."""

    def __init__(self, layer: Layer, moe: MoE):
        self.layer, self.moe = layer, moe
        self.routed: Routed = layer.data.get(("routed", moe.path)) or routed_tokens(layer, moe)
        self.moments: Moments | None = layer.data.get(("moments", moe.path))
        self.gate_up, self.down = (
            CodedProjection(layer.stored(p), p.input_side) for p in moe.projections
        )

    @property
    def common(self) -> Common | None:
        """What experts share of the costs of errors."""
        return None if self.moments is None else self.moments.common

    def each(self, gate_up: Fit | None = None) -> Iterator[Unit]:
        """A unit of each expert for gate_up or, behind its correction, for down."""
        for e in range(self.moe.sizes[0]):
            rows = self.routed.rows(e)
            rows = rows[:: max(1, -(-len(rows) // _MOST_TOKENS))]
            moments = self.moments
            fit, name = None, "gate_up"
            if gate_up is not None:
                slope, offset = (None if f is None else f[e] for f in gate_up[:2])
                fit, name = (slope, offset), "down"
            yield Unit(
                self.moe.attributes,
                self.routed.x[rows],
                self.routed.weight_of(e, rows).square(),
                moments.expert(e).bare(name) if moments is not None and moments.weighted else None,
                self.dense(e),
                self.gate_up.of_expert(e),
                self.down.of_expert(e),
                fit,
            )

    def dense(self, e: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """The float model's gate_up and down of an expert, and gate_up's bias."""
        parts = ((self.moe.gate_up, ""), (self.moe.down, ""), (self.moe.gate_up, "bias"))
        found = [self.layer.original(p, part, [e]) for p, part in parts]
        gate_up, down, bias = (None if t is None else t[0] for t in found)
        assert gate_up is not None and down is not None
        return gate_up, down, bias
