"""KBVQ-MoE under one name: `moments,klt,vq,affine,fold`.  arXiv 2602.11184."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from moecc.base import Composite, Pass, option
from moecc.passes.affine import AffineCorrection
from moecc.passes.fold import FoldAffine
from moecc.passes.klt import SharedBasis
from moecc.passes.moments import MeasureMoments
from moecc.passes.vq import VectorQuantize


@dataclass(frozen=True, kw_only=True)
class KBVQ(Composite):
    name: ClassVar[str] = "kbvq"
    provides: ClassVar[frozenset[str]] = frozenset({"moments", "basis", "vq", "affine", "folded"})
    bits: int = option(2, help="bits per weight of codes and signs", choices=(2, 3, 4))
    rank: int | str = option(
        "auto", help="rows of the shared basis, per projection", choices=("auto",), low=0, high=1024
    )
    codebook: str = option("expert", help="one codebook per expert or per layer", choices=("auto", "expert", "layer"))
    offset: str = option("auto", help="affine offset: worth its bits, always, never", choices=("auto", "on", "off"))

    def expand(self) -> list[Pass]:
        return [
            MeasureMoments(), SharedBasis(rank=self.rank, bits=self.bits),
            VectorQuantize(bits=self.bits, codebook=self.codebook), AffineCorrection(offset=self.offset), FoldAffine(),
        ]  # fmt: skip
