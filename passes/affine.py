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

from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from moecc.errors import MoeccError
from moecc.ir.gates import apply_gate
from moecc.ir.moe import MoE
from moecc.ir.ops import VQ_EXPERTS
from moecc.options import option
from moecc.passes._code.moments import Moments, Routed, hidden_units, routed_tokens
from moecc.passes._code.rate import gain
from moecc.passes._code.regression import Sums, shift, sums_of
from moecc.passes._code.stored import CodedProjection
from moecc.pipeline.estimate import Estimate
from moecc.pipeline.passes import Context, Layer, LayerPass

_MOST_TOKENS = 2048  # of one expert, spread over the calibration text


class Seen(NamedTuple):
    """The calibration tokens of one expert at one of its projections."""

    intended: Tensor  # [n, K]: the float model's input
    dense: Tensor  # [N, K]: the float weight
    arrived: Tensor  # [n, K]: the input behind the coded projections before
    weight: Tensor  # [n]


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

    def run_layer(self, layer: Layer, ctx: Context) -> bool:
        return any(
            [self.correct(layer, moe, ctx) for moe in layer.moe if moe.node.target is VQ_EXPERTS]
        )

    def correct(self, layer: Layer, moe: MoE, ctx: Context) -> bool:
        """Fit and store the corrections of one layer's experts; return whether there are any."""
        planned = "budget" in ctx.data
        if planned and self.offset == "on":
            raise MoeccError("affine: offset=on can't be planned by budget; leave it out")
        fits = (replace(self, offset="off") if planned else self).fit(layer, moe)
        for projection in moe.projections:
            slope, offset, moved = fits[projection.name]
            found = {k: v for k, v in (("slope", slope), ("offset", offset)) if v is not None}
            projection.set_operands(
                {k: layer.program.add(f"{projection.path}.{k}", v) for k, v in found.items()}
            )
            ctx.record(projection.path, affine="+".join(found) or "none", output_shift=moved)
        return any(v is not None for fit in fits.values() for v in (fit.slope, fit.offset))

    def fit(self, layer: Layer, moe: MoE) -> dict[str, Fit]:
        """The corrections of both projections, by name; down's is fitted behind gate_up's."""
        routed = layer.data.get(("routed", moe.path)) or routed_tokens(layer, moe)
        moments: Moments | None = layer.data.get(("moments", moe.path))
        coded = {p.name: CodedProjection(layer.stored(p), p.input_side) for p in moe.projections}
        costs = {p: None if moments is None else moments.output_of(p) for p in coded}
        seen = _entering(layer, moe, routed)
        first = self.regress(coded["gate_up"], seen, costs["gate_up"])
        behind = _between(layer, moe, coded["gate_up"], seen, first)
        return {"gate_up": first, "down": self.regress(coded["down"], behind, costs["down"])}

    def regress(self, coded: CodedProjection, seen: list[Seen], cost: Tensor | None) -> Fit:
        """Steps 2 and 3 for one projection; cost [E, N, N], None if all channels count alike."""
        coded_error = slope_error = both_error = 0.0
        sums: list[Sums] = []
        # by whether there is an offset
        lines: dict[bool, list[tuple[Tensor, Tensor]]] = {True: [], False: []}
        for e, (intended, dense, arrived, weight) in enumerate(seen):
            v, low = coded.parts(e, arrived)
            t = intended @ dense.T - low
            own = None if cost is None else cost[e]
            fit, rest = (sums_of(v[i::2], t[i::2], weight[i::2], own) for i in (0, 1))
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
        slope, offsets = (torch.stack([x[i] for x in lines[use_offset]]).float() for i in (0, 1))
        return Fit(slope, offsets if use_offset else None, shift(sums, list(lines[use_offset])))


def _entering(layer: Layer, moe: MoE, routed: Routed) -> list[Seen]:
    """Each expert's tokens in front of gate_up."""
    gate_up, found = layer.original(moe.gate_up), []
    assert gate_up is not None
    for e in range(len(gate_up)):
        rows = routed.rows(e)
        rows = rows[:: max(1, -(-len(rows) // _MOST_TOKENS))]
        x = routed.x[rows]
        found.append(Seen(x, gate_up[e], x, routed.weight_of(e, rows).square()))
    return found


def _between(
    layer: Layer, moe: MoE, gate_up: CodedProjection, entering: list[Seen], fit: Fit
) -> list[Seen]:
    """The same tokens in front of down, behind the corrected gate_up."""
    down, bias = layer.original(moe.down), layer.original(moe.gate_up, "bias")
    assert down is not None
    a, found = moe.attributes, []
    for e, (x, w, _, weight) in enumerate(entering):
        rows = gate_up.apply(e, x, fit.slope, fit.offset)
        arrived = apply_gate(rows, a["act"], a["gate"], a["alpha"], a["limit"])
        intended = hidden_units(moe, x, w, None if bias is None else bias[e])
        found.append(Seen(intended, down[e], arrived, weight))
    return found
