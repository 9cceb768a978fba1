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

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, fx

from moecc.ir import vq4
from moecc.ir.moe import MoE, Projection
from moecc.ir.ops import EXPERTS, KLT_EXPERTS, VQ_EXPERTS
from moecc.options import option
from moecc.passes._code.codebooks import Book
from moecc.passes._code.coded import pad_columns
from moecc.passes._code.coding import encode
from moecc.passes._code.half import compact
from moecc.passes._code.machinery import coding_by
from moecc.passes._code.metric import weighted_error
from moecc.passes._code.moments import Moments, evenly
from moecc.passes._code.rate import gain
from moecc.passes._code.units import (
    AT_ONCE,
    JOINTLY,
    Settings,
    Unit,
    begin,
    code,
    fit,
    join,
    on_device,
)
from moecc.pipeline.bits import coded_bits
from moecc.pipeline.estimate import Estimate
from moecc.pipeline.fate import Fate
from moecc.pipeline.passes import Context, Layer, LayerPass
from moecc.pipeline.work import Coding, Scope, Work, each, factor
from moecc.pipeline.workers.base import Workers

_SAMPLED_EXPERTS = 8  # for codebook=auto, and for the codebook that units begin with


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

    def machinery(self, device: torch.device) -> str:
        return coding_by(device)

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

    def widths(self) -> Collection[int]:
        return (self.bits,)

    def work(self, scope: Scope) -> Work:
        done = Work()
        for layer, rows, columns, blocks, tokens in each(scope):
            done.products += tokens * (columns**2 + layer.rows * layer.hidden)
            done.factors += layer.experts * factor(columns)
            if blocks:
                done.factors += layer.experts * factor(rows, blocks)
                done.products += tokens * (rows**2 / blocks + layer.rows * layer.hidden)
                done.products += layer.experts * layer.hidden**2 * layer.intermediate
            coupled, code = rows // blocks if blocks else 0, partial(self.trial, blocks > 0)
            coded = Coding(layer.experts, rows, columns, coupled, str(self), code)
            done.coded.append(coded)
        return done

    def trial(self, weighted: bool, rows: int, columns: int) -> None:
        """Code a random matrix [rows, columns], for the time that it takes."""
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(1, rows, columns, generator=generator)
        moment = torch.eye(columns).unsqueeze(0)
        output = torch.eye(rows).view(1, 1, rows, rows) if weighted else None
        bits, rounds = self.bits, self.rounds
        encode(weight, moment, output, bits=bits, shared=False, seed=0, rounds=rounds)

    def run_layer(self, layer: Layer, ctx: Context) -> bool:
        found = [moe for moe in layer.moe if moe.node.target in (EXPERTS, KLT_EXPERTS)]
        for moe in found:
            self.lower(layer, moe, ctx)
        return bool(found)

    def lower(self, layer: Layer, moe: MoE, ctx: Context) -> None:
        """Code both projections and replace the experts node."""
        moments: Moments = layer.data["moments", moe.path]
        jobs = [self.job(layer, p, moments, ctx) for p in moe.projections]
        for job in jobs:
            job.begin(ctx.workers)
        units = [unit for job in jobs for unit in job.units()]
        results = ctx.results(code, units, moments.common)
        operands: list[fx.Node | None] = []
        for job in jobs:
            coded = join([next(results) for _ in job.parts], shared=job.settings.shared)
            for name, tensor in self.stored(layer, job, coded, ctx).items():
                add = None if tensor is None else layer.program.add(f"{job.path}.{name}", tensor)
                operands.append(add)
            operands += [None, None]  # slope and offset: `affine`
        operands.append(moe.operand("post_norm"))
        starved = {str(e): n for e, n in moments.starved.items()}
        for p in moe.projections:
            ctx.record(p.path, tokens=moments.tokens.tolist(), starved=starved)
        layer.program.replace(moe.node, VQ_EXPERTS, (*moe.node.args[:3], *operands), moe.attributes)

    def job(self, layer: Layer, projection: Projection, moments: Moments, ctx: Context) -> Job:
        """How one projection is coded: with this pass's options, or as `budget` has planned."""
        planned = ctx.data.get("budget", {}).get(projection.path)
        own = self
        if planned is not None:
            own = replace(self, bits=planned.bits, codebook=planned.codebook)
        seed = ctx.seed_for(projection.moe.path, projection.name)
        shared = own.codebook == "layer"
        if own.codebook == "auto":
            some = sample(moments)
            weight = layer.weight(projection, experts=some)
            assert weight is not None
            moment = partial(moments.of, projection.name, some)
            shared = own.shares(weight, moment, seed, experts=projection.shape[0])
        settings = Settings(own.bits, shared, own.rounds, own.feedback, seed)
        return Job(layer, projection, moments, settings)

    def stored(
        self, layer: Layer, job: Job, coded: dict[str, Tensor], ctx: Context
    ) -> dict[str, Tensor | None]:
        """The stored tensors of one projection, by the names of `vq4.TENSORS`."""
        projection, lost = job.projection, coded["lost"]
        ctx.record(
            projection.path,
            fate=Fate("coded", bits=job.settings.bits, format="vq4"),
            codebook="layer" if job.settings.shared else "expert",
            in_sample_error=float(lost.mean()),
            expert_in_sample_error=[round(float(r), 6) for r in lost],
        )
        bias = layer.weight(projection, "bias")
        held = {n: t for n, t in layer.stored(projection).items() if n in vq4.SHARED}
        found = {name: coded.get(name) for name in vq4.CODED} | {"scale": compact(coded["scale"])}
        return {**found, "bias": None if bias is None else compact(bias), **held}

    def shares(self, weight: Tensor, moment: Callable[[], Tensor], seed: int, experts: int) -> bool:
        """Whether one codebook for the layer of so many experts is the better use of bits.

        Measured on some of them, weight [n, N, K] under their moments [n, K, K], with all output
        channels alike.
        """
        book = 8 * vq4.CODEBOOK_SIZE * vq4.group_size(self.bits)
        price = book * (1 - 1 / experts) / weight[0].numel()
        if price < 0.005:  # next to nothing
            return False
        weight, under = pad_columns(weight, moment())
        quick = min(self.rounds, 2)
        coded = (
            encode(
                weight,
                under,
                bits=self.bits,
                shared=shared,
                seed=seed,
                rounds=quick,
                feedback=self.feedback,
            )
            for shared in (True, False)
        )
        one, own = (float(weighted_error(c.dense() - weight, under).sum()) for c in coded)
        return gain(one, own, price) <= 0


class Job:
    """One projection that is to be coded, in units of some experts each."""

    def __init__(self, layer: Layer, projection: Projection, moments: Moments, settings: Settings):
        self.layer, self.projection, self.moments = layer, projection, moments
        self.settings, self.path = settings, projection.path
        self.book: Book | None = None
        experts = projection.shape[0]
        together = settings.shared and projection.weights <= JOINTLY
        step = experts if together else self._step()
        self.parts = [range(i, min(i + step, experts)) for i in range(0, experts, step)]

    def _step(self) -> int:
        """How many experts a unit has."""
        experts, rows, columns = self.projection.shape
        device = self.layer.program.device
        if device.type == "cpu":
            return max(1, AT_ONCE // (rows * columns))
        blocks = self.moments.blocks(self.projection)
        return on_device(experts, rows, columns, device, blocks=blocks)

    def begin(self, workers: Workers) -> None:
        """Find the codebook that units begin with; a single one makes its own."""
        if len(self.parts) == 1:
            return
        common, some = self.moments.common, sample(self.moments)
        if self.settings.shared:
            (self.book,) = workers.run(fit, [self.unit(some)], common)
            return
        _, rows, columns = self.projection.shape
        shape = len(some), rows, vq4.padded(columns)
        each = (self.unit([e]) for e in some)
        self.book = begin(workers, each, self.settings, shape, common)

    def units(self) -> Iterator[tuple[str, Callable[[], Unit]]]:
        """Every unit's name, and a function that reads it."""
        for part in self.parts:
            yield f"{self.path} {part.start}-{part.stop - 1}", partial(self.unit, part)

    def unit(self, experts: Sequence[int]) -> Unit:
        """Some experts as they are now."""
        node, name = self.projection.operand(), self.projection.name
        assert node is not None
        stored = self.layer.program.value(node, experts)
        seen = tuple(self.moments.expert(e).bare(name) for e in experts)
        return Unit(name, seen, stored, self.settings, self.book)


def sample(moments: Moments) -> list[int]:
    """Evenly spaced experts among those with tokens, not more than `_SAMPLED_EXPERTS`."""
    seen = moments.tokens.nonzero().squeeze(-1)
    seen = seen if len(seen) else torch.arange(len(moments.tokens))
    return seen[evenly(len(seen), _SAMPLED_EXPERTS)].tolist()
