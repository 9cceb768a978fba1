"""KBVQ-MoE, first part: a shared basis takes out what the experts of a layer have in common.  arXiv 2602.11184.

The basis is on the residual-stream side of both projections, so that it is applied once per token, whatever the experts.
  gate_up  1. C = the layer's mean second moment, C^1/2 its square root (the Karhunen-Loeve transform of the input)
           2. V = top-r right singular vectors of the stacked W_e C^1/2: what all experts read from
           3. basis = V^T C^-1/2 [r, D], coef_e = W_e C^1/2 V [N, r]
  down     4. U = top-r left singular vectors of the side-by-side W_e C_e^1/2: what all experts write to
           5. basis = U^T [r, D], coef_e = U^T W_e [r, F]
  both     6. the basis is stored as float16, coefficients as int8 with a scale per row; what is left for coding is W_e minus
              the *stored* part, so rounding here is made up for there
  rank     7. auto: the rank whose error *after coding* is worth its bits (`_rate`), measured on a sample of experts; 0 allowed.
              Errors of both projections count, relative to their outputs: where one is far the smaller, bits do not go there

Shapes: E experts, N rows, D hidden, F intermediate. Cost in bits per weight of gate_up: 8 r / D + 16 / D + 16 r / (E N).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from moecc import vq4
from moecc.base import Context, Layer, LayerPass, MoeccError, option
from moecc.ir import MoE
from moecc.ops import EXPERTS, KLT_EXPERTS
from moecc.passes._coding import damped, encode, pad_columns, weighted_error
from moecc.passes._moments import Moments
from moecc.passes._rate import gain

_CANDIDATES = (4, 8, 16, 32, 64)
_SAMPLED_EXPERTS = 8


@dataclass
class Basis:
    """One projection's shared part as it is stored (shapes in `moecc.vq4`)."""

    basis: Tensor
    coef: Tensor
    coef_scale: Tensor
    input_side: bool

    def dense(self) -> Tensor:
        return vq4.basis_part(self.coef, self.coef_scale, self.basis, torch.float32, input_side=self.input_side)

    def bits(self) -> int:
        return vq4.stored_bits({"basis": self.basis, "coef": self.coef, "coef_scale": self.coef_scale})


@dataclass(frozen=True, kw_only=True)
class SharedBasis(LayerPass):
    name: ClassVar[str] = "klt"
    requires: ClassVar[frozenset[str]] = frozenset({"moments"})
    provides: ClassVar[frozenset[str]] = frozenset({"basis"})
    leads_to: ClassVar[frozenset[str]] = frozenset({"vq"})
    rank: int | str = option(
        "auto", help="rows of the shared basis, per projection", choices=("auto",), low=0, high=1024
    )
    bits: int = option(2, help="bits that coding will use, for rank=auto", choices=(2, 3, 4))

    def run_layer(self, layer: Layer, ctx: Context) -> bool:
        done = [self.factor(layer, moe, ctx) for moe in layer.moe if moe.node.target is EXPERTS]
        return any(done)

    def factor(self, layer: Layer, moe: MoE, ctx: Context) -> bool:
        moments: Moments = layer.data["moments", moe.path]
        program, remainder = layer.program, {}
        parts: list[Basis | None] = []
        cases = {p: Case.of(layer, moe, p, moments, ctx) for p in ("gate_up", "down")}
        base = {p: self.coded_error(case, None) if self.rank == "auto" else 0.0 for p, case in cases.items()}
        for projection, case in cases.items():
            stored = self.choose(case, base[projection], sum(base.values()) - base[projection], cases)
            parts.append(stored)
            ctx.record(f"{moe.path}.{projection}", rank=0 if stored is None else len(stored.basis))
            remainder[projection] = case.weight if stored is None else case.weight - stored.dense()
        if parts == [None, None]:
            return False
        operands: list[fx.Node | None] = [program.add(f"{moe.path}.{p}.remainder", r) for p, r in remainder.items()]
        for projection, stored in zip(("gate_up", "down"), parts, strict=True):
            names = ("basis", "coef", "coef_scale")
            operands += [
                None if stored is None else program.add(f"{moe.path}.{projection}.{n}", getattr(stored, n))
                for n in names
            ]
        operands += [moe.operand(n) for n in ("gate_up_bias", "down_bias", "post_norm")]
        program.replace(moe.node, KLT_EXPERTS, (*moe.node.args[:3], *operands), moe.attributes)
        return True

    def choose(self, case: Case, base: float, other: float, cases: dict[str, Case]) -> Basis | None:
        """The stored basis of a projection, None where rank 0 is best. `base`: its error at rank 0; `other`: the other one's."""
        weight, hidden = case.weight, case.hidden
        if self.rank != "auto":
            rank = int(self.rank)
            if rank > hidden:
                raise MoeccError(
                    f"klt: rank={rank} is more than {case.projection}'s {hidden} dimensions; give a smaller rank"
                )
            return factorize(weight, case.moment, rank, input_side=case.input_side) if rank else None
        total = sum(c.weight.numel() for c in cases.values())
        best, best_gain = None, 0.0
        for rank in (r for r in _CANDIDATES if r < hidden // 4):
            stored = factorize(weight, case.moment, rank, input_side=case.input_side)
            worth = gain(base + other, self.coded_error(case, stored) + other, stored.bits() / total)
            if worth > best_gain:
                best, best_gain = stored, worth
            elif worth < best_gain - 0.02:
                break  # a larger rank costs more still
        return best

    def coded_error(self, case: Case, stored: Basis | None) -> float:
        """Relative error of some experts' output after coding what `stored` leaves."""
        some = torch.linspace(0, len(case.weight) - 1, min(len(case.weight), _SAMPLED_EXPERTS)).long()
        weight, moment = case.weight[some], case.moment[some]
        remainder = weight if stored is None else (case.weight - stored.dense())[some]
        padded, padded_moment = pad_columns(remainder, moment)
        coded = encode(padded, padded_moment, bits=self.bits, shared=True, seed=case.seed, rounds=1)
        error = coded.dense() - padded
        return float(weighted_error(error, padded_moment).sum() / weighted_error(weight, moment).sum().clamp(min=1e-20))


@dataclass
class Case:
    """One projection to factor: weight [E, N, K] under moments [E, K, K]."""

    projection: str
    weight: Tensor
    moment: Tensor
    seed: int

    @classmethod
    def of(cls, layer: Layer, moe: MoE, projection: str, moments: Moments, ctx: Context) -> Case:
        weight = layer.weight(moe, projection)
        assert weight is not None
        return cls(projection, weight, moments.of(projection), ctx.seed_for(moe.path, projection))

    @property
    def input_side(self) -> bool:
        return self.projection == "gate_up"

    @property
    def hidden(self) -> int:
        return self.weight.shape[2] if self.input_side else self.weight.shape[1]


def square_root(moment: Tensor) -> tuple[Tensor, Tensor]:
    """C^1/2 and C^-1/2 of a symmetric positive semi-definite C [..., K, K], small eigenvalues raised to 1e-6 of the largest."""
    values, vectors = torch.linalg.eigh(moment)
    values = values.clamp(min=values.amax(-1, keepdim=True) * 1e-6 + 1e-20)
    root = values.sqrt().unsqueeze(-2)
    return (vectors * root) @ vectors.mT, (vectors / root) @ vectors.mT


def factorize(weight: Tensor, moment: Tensor, rank: int, *, input_side: bool) -> Basis:
    """Steps 1 to 6 for one projection: weight [E, N, K], moments [E, K, K]."""
    if input_side:
        root, inverse = square_root(damped(moment.mean(0, keepdim=True), 1e-3)[0])
        scaled = weight @ root
        # top right singular vectors of the stacked matrix = top eigenvectors of the sum of Gram matrices
        vectors = torch.linalg.eigh((scaled.mT @ scaled).sum(0))[1][:, -rank:].flip(-1)
        basis, coef = (vectors.T @ inverse).half(), scaled @ vectors
    else:
        gram = (weight @ damped(moment, 1e-3) @ weight.mT).sum(0)
        vectors = torch.linalg.eigh(gram)[1][:, -rank:].flip(-1)
        basis, coef = vectors.T.contiguous().half(), vectors.T @ weight
    scale = (coef.abs().amax(-1) / 127).clamp(min=6e-5).half()
    integers = (coef / scale.float().unsqueeze(-1)).round().clamp(-127, 127).to(torch.int8)
    return Basis(basis.contiguous(), integers, scale, input_side)
