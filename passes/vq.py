"""KBVQ-MoE, second part: what is left of each expert is coded with a vector codebook.  arXiv 2602.11184; format: `moecc.ir.vq4`.

  1. `_code.coding.encode` codes each projection under its experts' second moments: importance-weighted k-means, error feedback,
     codebook and row scales refit for fixed codes
  2. codebook=expert gives each expert its own 256 centroids (1 KiB), layer one for all; auto takes what is worth its bits by its
     coding error alone. An expert's own is the default: on matrices of real models it costs a thousandth of a bit, and it is what
     `vsraq` has to tune. A layer's is fitted to a sample where its experts are too large to be in memory together
  3. scales are stored as float16 (bfloat16 where float16's range would not do); the node becomes `moecc::vq_experts`

Cost in bits per weight: `bits` + 16/K for scales + 8192/(N K) per expert for codebooks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, fx

from moecc.ir import vq4
from moecc.ir.moe import MoE, Projection
from moecc.ir.ops import EXPERTS, KLT_EXPERTS, VQ_EXPERTS
from moecc.options import option
from moecc.passes._code.coding import Coded, encode_in_parts, pad_columns
from moecc.passes._code.half import compact
from moecc.passes._code.metric import weighted_error
from moecc.passes._code.moments import Moments
from moecc.passes._code.rate import gain
from moecc.pipeline.bits import coded_bits
from moecc.pipeline.estimate import Estimate
from moecc.pipeline.fate import Fate
from moecc.pipeline.passes import Context, Layer, LayerPass

_SAMPLED_EXPERTS = 8


@dataclass(frozen=True, kw_only=True)
class VectorQuantize(LayerPass):
    name: ClassVar[str] = "vq"
    requires: ClassVar[frozenset[str]] = frozenset({"moments"})
    after: ClassVar[frozenset[str]] = frozenset({"basis", "budget"})
    provides: ClassVar[frozenset[str]] = frozenset({"vq"})
    bits: int = option(2, help="bits per weight of codes and signs", choices=(2, 3, 4))
    codebook: str = option(
        "expert", help="one codebook per expert or per layer", choices=("auto", "expert", "layer")
    )
    rounds: int = option(4, help="refits of codebook, scales and codes", low=1, high=50)
    feedback: bool = option(
        True, help="error feedback and refits; false is plain k-means, for ablation"
    )

    def estimate(self, found: Estimate) -> None:
        plan = found.data.get("budget")
        chosen = self.codebook if plan is None else plan.codebook
        for p in found.projections:
            one, own = (
                coded_bits(p.experts, p.rows, p.columns, self.bits, books=books)
                for books in (1, p.experts)
            )
            p.low = (own if chosen == "expert" else one) + (p.low if p.coded else 0)
            p.high = (one if chosen == "layer" else own) + (p.high if p.coded else 0)
            p.coded = True

    def run_layer(self, layer: Layer, ctx: Context) -> bool:
        found = [moe for moe in layer.moe if moe.node.target in (EXPERTS, KLT_EXPERTS)]
        for moe in found:
            self.lower(layer, moe, ctx)
        return bool(found)

    def lower(self, layer: Layer, moe: MoE, ctx: Context) -> None:
        moments: Moments = layer.data["moments", moe.path]
        operands: list[fx.Node | None] = []
        for projection in moe.projections:
            tensors = self.code(layer, projection, moments, ctx)
            operands += [
                None if t is None else layer.program.add(f"{projection.path}.{n}", t)
                for n, t in tensors.items()
            ]
            operands += [None, None]  # slope and offset: `affine`
        operands.append(moe.operand("post_norm"))
        for projection in moe.projections:
            ctx.record(
                projection.path,
                tokens=moments.tokens.tolist(),
                starved={str(e): n for e, n in moments.starved.items()},
            )
        layer.program.replace(moe.node, VQ_EXPERTS, (*moe.node.args[:3], *operands), moe.attributes)

    def code(
        self, layer: Layer, projection: Projection, moments: Moments, ctx: Context
    ) -> dict[str, Tensor | None]:
        """The stored tensors of one projection."""
        planned = ctx.data.get("budget", {}).get(projection.path)
        if planned is not None and (planned.bits, planned.codebook) != (self.bits, self.codebook):
            own = replace(self, bits=planned.bits, codebook=planned.codebook)
            return own.code(layer, projection, moments, ctx)
        weight = layer.weight(projection)
        assert weight is not None
        moment, output = moments.of(projection.name), moments.output_of(projection.name)
        held = {n: t for n, t in layer.stored(projection).items() if n in vq4.SHARED}
        seed = ctx.seed_for(projection.moe.path, projection.name)
        coded, shared_book = self.best(weight, moment, output, seed)
        error = coded.dense()[..., : weight.shape[-1]] - weight
        shared = vq4.shared_part(
            held, weight.shape[-1], torch.float32, input_side=projection.input_side
        )
        original = weight if shared is None else weight + shared
        relative = weighted_error(error, moment) / weighted_error(original, moment).clamp(min=1e-20)
        ctx.record(
            projection.path,
            fate=Fate("coded", bits=self.bits, format="vq4"),
            codebook="layer" if shared_book else "expert",
            error=float(relative.mean()),
            expert_error=[round(float(r), 6) for r in relative],
        )
        bias = layer.weight(projection, "bias")
        return {**coded.stored(), "bias": None if bias is None else compact(bias), **held}

    def best(
        self, weight: Tensor, moment: Tensor, output: Tensor | None, seed: int
    ) -> tuple[Coded, bool]:
        """The coded projection and whether its experts share one codebook."""
        weight, moment = pad_columns(weight, moment)
        shared = (
            self.shares(weight, moment, seed)
            if self.codebook == "auto"
            else self.codebook == "layer"
        )
        return self.encode(weight, moment, output, shared, seed), shared

    def shares(self, weight: Tensor, moment: Tensor, seed: int) -> bool:
        """Whether one codebook for the layer is better at its bits, measured on some experts, all output channels alike."""
        price = (
            8
            * vq4.CODEBOOK_SIZE
            * vq4.group_size(self.bits)
            * (1 - 1 / len(weight))
            / weight[0].numel()
        )
        if price < 0.005:  # next to nothing
            return False
        some = torch.linspace(0, len(weight) - 1, min(len(weight), _SAMPLED_EXPERTS)).long()
        weight, moment = weight[some], moment[some]
        quick = replace(self, rounds=min(self.rounds, 2))
        coded = [quick.encode(weight, moment, None, shared, seed) for shared in (True, False)]
        one, own = (float(weighted_error(c.dense() - weight, moment).sum()) for c in coded)
        return gain(one, own, price) <= 0

    def encode(
        self, weight: Tensor, moment: Tensor, output: Tensor | None, shared: bool, seed: int
    ) -> Coded:
        return encode_in_parts(
            weight,
            moment,
            output,
            bits=self.bits,
            shared=shared,
            seed=seed,
            rounds=self.rounds,
            feedback=self.feedback,
        )
