"""KBVQ-MoE under one name: `moments,klt,vq,affine,fold`; behind `budget` where bits is no whole number.  arXiv 2602.11184.

Unlike in the paper, by default a layer may get no basis at all, and a shared mean instead or neither, as leaves the least error for
the bits (`klt`); rank=R,mean=off is the paper's choice.
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
        2, help="bits per weight of codes and signs; a fraction: of all that is stored, spent by `budget`", low=2, high=4
    )  # fmt: skip
    rank: int | str = option(
        "auto", help="rows of the shared basis, per projection", choices=("auto",), low=0, high=1024
    )
    mean: int | str = option(
        "auto",
        help="bits of a matrix that all experts share as it is; off: none",
        choices=("auto", "off", 2, 3, 4),
    )
    codebook: str = option(
        "auto", help="one codebook per expert or per layer; auto: per expert, where bits is a fraction what `budget` finds",
        choices=("auto", "expert", "layer"),
    )  # fmt: skip
    offset: str = option(
        "auto",
        help="affine offset: worth its bits (off where bits is a fraction), always, never",
        choices=("auto", "on", "off"),
    )

    def stands_for(self) -> list[Pass]:
        budget: list[Pass] = []
        bits, offset = int(self.bits), self.offset
        codebook = "expert" if self.codebook == "auto" else self.codebook
        if bits != self.bits:
            if self.offset == "on":
                raise MoeccError(
                    "kbvq: offset=on can't be planned; leave it out, or give bits=2, 3 or 4"
                )
            budget = [
                PlanBits(bits=self.bits, rank=self.rank, mean=self.mean, codebook=self.codebook)
            ]
            bits, offset = 2, "off"
        return [
            *budget, MeasureMoments(), SharedBasis(rank=self.rank, mean=self.mean, bits=bits),
            VectorQuantize(bits=bits, codebook=codebook), AffineCorrection(offset=offset), FoldAffine(),
        ]  # fmt: skip
