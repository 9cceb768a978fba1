"""KBVQ-MoE under one name: `moments,klt,vq,affine,fold`, and `budget` for fractions of bits.

The method is that of arXiv 2602.11184, with one difference. By default `klt` decides whether a
layer gets a basis, a shared mean, both or neither: whichever leaves the least error for the bits.
The paper's choice is rank=R,mean=off.

Cost in bits per weight: `bits`, plus scales, codebooks and shared parts (see `vq` and `klt`). If
`bits` is a fraction, it includes these.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from moecc.errors import MoeccError
from moecc.options import option
from moecc.passes.affine import AffineCorrection
from moecc.passes.budget import PlanBits
from moecc.passes.fold import FoldAffine
from moecc.passes.klt import SharedBasis
from moecc.passes.moments import MeasureMoments
from moecc.passes.vq import VectorQuantize
from moecc.pipeline.passes import Composite, Pass


@dataclass(frozen=True, kw_only=True)
class KBVQ(Composite):
    name: ClassVar[str] = "kbvq"
    provides: ClassVar[frozenset[str]] = frozenset({"moments", "basis", "vq", "affine", "folded"})
    parts: ClassVar[tuple[type[Pass], ...]] = (
        PlanBits,
        MeasureMoments,
        SharedBasis,
        VectorQuantize,
        AffineCorrection,
        FoldAffine,
    )
    bits: int | float = option(
        2,
        help="bits per weight of codes and signs; a fraction counts everything that is stored, "
        "and `budget` spends it",
        low=2,
        high=4,
    )
    rank: int | str = option(
        "auto", help="rows of the shared basis, per projection", choices=("auto",), low=0, high=1024
    )
    mean: int | str = option(
        "auto",
        help="bits of a matrix that all experts share as it is; off: none",
        choices=("auto", "off", 2, 3, 4),
    )
    codebook: str = option(
        "auto",
        help="one codebook per expert or per layer; auto: per expert, or as `budget` plans",
        choices=("auto", "expert", "layer"),
    )
    offset: str = option(
        "auto",
        help="affine offset: if worth its bits (never if bits is a fraction), always, never",
        choices=("auto", "on", "off"),
    )

    def stands_for(self) -> list[Pass]:
        plan: list[Pass] = []
        bits, offset = int(self.bits), self.offset
        codebook = "expert" if self.codebook == "auto" else self.codebook
        if bits != self.bits:
            if offset == "on":
                raise MoeccError(
                    "kbvq: offset=on can't be planned; leave it out, or give bits=2, 3 or 4"
                )
            plan = [
                PlanBits(bits=self.bits, rank=self.rank, mean=self.mean, codebook=self.codebook)
            ]
            bits, offset = 2, "off"  # the defaults of the parts, which do as `budget` plans
        return [
            *plan,
            MeasureMoments(),
            SharedBasis(rank=self.rank, mean=self.mean, bits=bits),
            VectorQuantize(bits=bits, codebook=codebook),
            AffineCorrection(offset=offset),
            FoldAffine(),
        ]
