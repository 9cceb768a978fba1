"""KBVQ-MoE, second part: code the rest of each expert with a vector codebook.  arXiv 2602.11184.

  1. Code each projection under its experts' second moments: importance-weighted k-means, error
     feedback, refits of codebook and row scales for fixed codes (`_code.coding`).
  2. codebook=expert gives each expert 256 centroids of its own (1 KiB), codebook=layer one set to
     all; auto takes whichever is worth its bits by its coding error alone. Each expert its own is
     the default: on matrices of real models that costs a thousandth of a bit, and `vsraq` tunes
     these centroids. If the experts of a layer are too large to be in memory together, a layer's
     codebook is fitted to a sample of them.
  3. Store scales as float16, or as bfloat16 if float16's range will not do. The node becomes
     `moecc::vq_experts`. `moecc.ir.vq4` describes the format.

Shapes: E experts, N rows, K columns. Cost in bits per weight: `bits` + 16/K for scales + 8192/(N K)
per expert for codebooks (4096/(N K) at 4 bit).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, fx

from moecc.ir import vq4
from moecc.ir.moe import MoE, Projection
from moecc.ir.ops import EXPERTS, KLT_EXPERTS, VQ_EXPERTS
from moecc.ir.relative import relative
from moecc.options import option
from moecc.passes._code import native
from moecc.passes._code.coded import Coded, pad_columns
from moecc.passes._code.coding import encode_in_parts
from moecc.passes._code.half import compact
from moecc.passes._code.metric import weighted_error
from moecc.passes._code.moments import Moments
from moecc.passes._code.rate import gain
from moecc.pipeline.bits import coded_bits
from moecc.pipeline.estimate import Estimate
from moecc.pipeline.fate import Fate
from moecc.pipeline.passes import Context, Layer, LayerPass

_SAMPLED_EXPERTS = 8  # for codebook=auto


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

    def machinery(self) -> str:
        return native.machinery()

    def estimate(self, found: Estimate) -> None:
        plan = found.data.get("budget")
        chosen = self.codebook if plan is None else plan.codebook
        for p in found.projections:
            sizes = p.experts, p.rows, p.columns, self.bits
            one, own = (coded_bits(*sizes, books=books) for books in (1, p.experts))
            shared = p.low, p.high  # by `klt`, which comes first
            p.low = (own if chosen == "expert" else one) + (shared[0] if p.coded else 0)
            p.high = (one if chosen == "layer" else own) + (shared[1] if p.coded else 0)
            p.coded = True

    def run_layer(self, layer: Layer, ctx: Context) -> bool:
        found = [moe for moe in layer.moe if moe.node.target in (EXPERTS, KLT_EXPERTS)]
        for moe in found:
            self.lower(layer, moe, ctx)
        return bool(found)

    def lower(self, layer: Layer, moe: MoE, ctx: Context) -> None:
        """Code both projections and replace the experts node."""
        moments: Moments = layer.data["moments", moe.path]
        operands: list[fx.Node | None] = []
        for p in moe.projections:
            for name, tensor in self.code(layer, p, moments, ctx).items():
                add = None if tensor is None else layer.program.add(f"{p.path}.{name}", tensor)
                operands.append(add)
            operands += [None, None]  # slope and offset: `affine`
        operands.append(moe.operand("post_norm"))
        starved = {str(e): n for e, n in moments.starved.items()}
        for p in moe.projections:
            ctx.record(p.path, tokens=moments.tokens.tolist(), starved=starved)
        layer.program.replace(moe.node, VQ_EXPERTS, (*moe.node.args[:3], *operands), moe.attributes)

    def code(
        self, layer: Layer, projection: Projection, moments: Moments, ctx: Context
    ) -> dict[str, Tensor | None]:
        """The stored tensors of one projection, by the names of `vq4.TENSORS`."""
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
        side = projection.input_side
        shared = vq4.shared_part(held, weight.shape[-1], torch.float32, input_side=side)
        original = weight if shared is None else weight + shared
        # With a shared part the error of an expert that is next to nothing can be many times it.
        lost = relative(weighted_error(error, moment), weighted_error(original, moment)).clamp(
            max=1
        )
        ctx.record(
            projection.path,
            fate=Fate("coded", bits=self.bits, format="vq4"),
            codebook="layer" if shared_book else "expert",
            in_sample_error=float(lost.mean()),
            expert_in_sample_error=[round(float(r), 6) for r in lost],
        )
        bias = layer.weight(projection, "bias")
        return {**coded.stored(), "bias": None if bias is None else compact(bias), **held}

    def best(
        self, weight: Tensor, moment: Tensor, output: Tensor | None, seed: int
    ) -> tuple[Coded, bool]:
        """The coded projection, and whether its experts share one codebook."""
        weight, moment = pad_columns(weight, moment)
        shared = self.codebook == "layer"
        if self.codebook == "auto":
            shared = self.shares(weight, moment, seed)
        return self.encode(weight, moment, output, shared, seed), shared

    def shares(self, weight: Tensor, moment: Tensor, seed: int) -> bool:
        """Whether one codebook for the layer is the better use of bits.

        Measured on some experts, with all output channels alike.
        """
        book = 8 * vq4.CODEBOOK_SIZE * vq4.group_size(self.bits)
        price = book * (1 - 1 / len(weight)) / weight[0].numel()
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
        """Step 1, with this pass's options."""
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
