"""What the experts of a projection have in common: what can be taken out before coding, what it costs, what it leaves.

Two things can be: a matrix that all experts share as it is, and a basis in which each has coefficients of its own.
  mean     1. the experts' mean: experts that were once one dense layer (Qwen1.5-MoE, Mixtral) still resemble it, and only what
              sets them apart is left to be coded (as with D2-MoE's base weights, arXiv 2502.17298). Coded at bits of its own, all
              directions alike, for its own error is made up for with the rest; computed once per token like a shared expert
The basis is on the residual-stream side of both projections, so that it is applied once per token, whatever the experts.
  gate_up  2. C = the plain mean of the experts' second moments, C^1/2 its square root (the Karhunen-Loeve transform of the input)
           3. V = top-r right singular vectors of the stacked W_e C^1/2: what all experts read from. Each expert counts alike, here
              and in 2 and 5, whatever its part of the cost in 8
           4. basis = V^T C^-1/2 [r, D], coef_e = W_e C^1/2 V [N, r]
  down     5. U = top-r left singular vectors of the side-by-side W_e C_e^1/2: what all experts write to
           6. basis = U^T [r, D], coef_e = U^T W_e [r, F]
  both     7. the basis is stored as float16, coefficients as int8 with a scale per row; what is left for coding is W_e minus
              the *stored* part, so rounding here is made up for there
  cost     8. an error after coding is taken for proportional to the remainder's energy: each expert's by how much it is used, and
              columns and rows by what error feedback leaves of the cost of an error there (pivots of the moment and of
              `sensitivity`). The factor is found by coding a few experts. Within 5 % of the error after coding on three models,
              on most projections

Not done: a mean of least squares under the moments. It runs off in directions that few tokens use, and doubled the
divergence. Nor a basis for which experts count by how much they are used: with 16 rows, of four models' divergences three fell, by
0.3 to 4 %, and one rose by 2 %.

Shapes: E experts, N rows, K columns, D hidden, F intermediate.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from moecc.errors import MoeccError
from moecc.ir import vq4
from moecc.ir.moe import Projection
from moecc.passes._code.coding import encode, encode_in_parts, pad_columns
from moecc.passes._code.metric import OUTPUT_DAMPING, damped, pivots, weighted_error
from moecc.passes._code.moments import Moments
from moecc.pipeline.bits import basis_bits, coded_bits
from moecc.pipeline.passes import Context, Layer

DISTORTION = {
    2: 0.06,
    3: 0.018,
    4: 0.007,
}  # of the energy of a mean, what its error then costs, by bits: measured
_RANKS = (4, 8, 16, 32, 64)
_SAMPLED_EXPERTS = 4


@dataclass(frozen=True)
class Choice:
    """A mean of so many bits (0: none) and a basis of so many rows: what the error then costs, and the bits that both take."""

    mean: int
    rank: int
    cost: float
    bits: int


@dataclass(frozen=True)
class Shared:
    """What is taken out of one projection as it is stored: tensors by names of `vq4.SHARED`."""

    tensors: dict[str, Tensor | None]
    columns: int
    input_side: bool

    def left_of(self, weight: Tensor) -> Tensor:
        taken = vq4.shared_part(
            self.tensors, self.columns, torch.float32, input_side=self.input_side
        )
        return weight if taken is None else weight - taken

    def first(self, rank: int) -> Shared:
        """A basis cut to its first rows."""
        basis, coef, scale = (self.tensors[n] for n in ("basis", "coef", "coef_scale"))
        assert basis is not None and coef is not None and scale is not None
        cut = (coef[..., :rank], scale) if self.input_side else (coef[:, :rank], scale[:, :rank])
        return replace(self, tensors={"basis": basis[:rank], "coef": cut[0], "coef_scale": cut[1]})

    def __or__(self, other: Shared) -> Shared:
        return Shared({**self.tensors, **other.tensors}, self.columns, self.input_side)


@dataclass
class Case:
    """One projection: weight [E, N, K] under moments [E, K, K] and costs of output errors [E, N, N] (None: all alike)."""

    projection: Projection
    weight: Tensor
    moment: Tensor
    output: Tensor | None
    used: Tensor  # [E]: how much of the layer an expert is
    unit: float  # what a relative error of the whole output costs; 1 where nothing is known of that
    seed: int

    @classmethod
    def of(cls, layer: Layer, projection: Projection, moments: Moments, ctx: Context) -> Case:
        moe, name = projection.moe, projection.name
        weight, moment = layer.weight(projection), moments.of(name)
        assert weight is not None
        # costs of one projection alone could not be compared with the other's
        output, unit = (moments.output_of(name), 1.0) if len(moments.output) == 2 else (None, 1.0)
        if output is None and (cost := moments.output_of("down")) is not None:
            down = weight if name == "down" else layer.weight(moe.down)
            assert down is not None
            unit = float((moments.mass * weighted_error(down, moments.of("down"), cost)).sum())
        return cls(
            projection,
            weight,
            moment,
            output,
            moments.mass,
            unit,
            ctx.seed_for(moe.path, name),
        )

    @cached_property
    def mass(self) -> Tensor:
        """[E]: how much an expert's error counts."""
        if self.output is not None:
            return self.used
        whole = (self.used * weighted_error(self.weight, self.moment)).sum().clamp(min=1e-30)
        return self.used * self.unit / whole

    @cached_property
    def size(self) -> Tensor:
        """[E, N], [E, 1] where all rows count alike: what energy left in a row costs."""
        rows = torch.ones(1, 1) if self.output is None else pivots(self.output, OUTPUT_DAMPING)
        return (self.mass * pivots(self.moment).mean(-1)).unsqueeze(-1) * rows

    @property
    def input_side(self) -> bool:
        return self.projection.input_side

    @property
    def hidden(self) -> int:
        return self.weight.shape[2] if self.input_side else self.weight.shape[1]

    def energy(self, remainder: Tensor) -> Tensor:
        """Step 8 by experts, but for the factor: [E or 1, N, K] -> [E]."""
        return (remainder.square().sum(-1) * self.size).sum(-1)

    def cost(self, bits: int, mean: int = 0, rank: int = 0) -> float:
        """What the error costs once what mean and basis leave is coded at `bits`; measured on some experts."""
        whole = self.energy(self.weight)
        alive = (
            (whole > 0).nonzero().squeeze(-1)
        )  # an expert without tokens or weights says nothing
        if not len(alive):
            return 0.0
        some = alive[torch.linspace(0, len(alive) - 1, min(len(alive), _SAMPLED_EXPERTS)).long()]
        remainder = self.take(mean, rank).left_of(self.weight)
        energy, output = self.energy(remainder), None if self.output is None else self.output[some]
        padded, moment = pad_columns(remainder[some], self.moment[some])
        coded = encode_in_parts(
            padded, moment, output, bits=bits, shared=True, seed=self.seed, rounds=1, turns=5
        )
        measured = (self.mass[some] * weighted_error(coded.dense() - padded, moment, output)).sum()
        return float(measured * energy.sum() / energy[some].sum().clamp(min=1e-30))

    def choices(self, means: Sequence[int], ranks: Sequence[int], whole: float) -> Iterator[Choice]:
        """What may be taken out, and what the error then costs; `whole`: what it costs where nothing is."""
        experts, rows, columns = self.weight.shape
        average = self.weight.mean(0, keepdim=True)
        unit = whole / float(self.energy(self.weight).sum().clamp(min=1e-30))
        for some in ([m for m in means if not m], [m for m in means if m]):
            if not some:
                continue
            left = self.weight - average if some[0] else self.weight
            basis = self.basis(left, max(ranks)) if max(ranks) else None
            for rank in ranks:
                rest = basis.first(rank).left_of(left) if basis is not None and rank else left
                energy = float(self.energy(rest).sum())
                more = basis_bits(rank, experts, rows, columns, input_side=self.input_side)
                for mean in some:
                    own = DISTORTION[mean] * float(self.energy(average).sum()) if mean else 0.0
                    taken = coded_bits(1, rows, columns, mean) if mean else 0
                    yield Choice(mean, rank, unit * (energy + own), taken + more)

    def offers(self, mean: int | str, rank: int | str) -> tuple[Sequence[int], Sequence[int]]:
        """Bits of a mean and ranks that are worth looking at, the least first, where these options are auto."""
        if rank != "auto" and int(rank) > self.hidden:
            raise MoeccError(
                f"rank={rank} is more than {self.projection.name}'s {self.hidden} dimensions; give a smaller rank"
            )
        means: tuple[int, ...] = (0 if mean in ("auto", "off") else int(mean),)
        if mean == "auto":
            whole, left = (
                float(self.energy(w).sum())
                for w in (self.weight, self.weight - self.weight.mean(0))
            )
            if left < whole * 4 ** (
                -2 / len(self.weight)
            ):  # else not even an exact one would be worth 2 bits
                means = (0, *DISTORTION)
        ranks = (
            (0, *(r for r in _RANKS if r < self.hidden // 4)) if rank == "auto" else (int(rank),)
        )
        return means, ranks

    def take(self, mean: int, rank: int) -> Shared:
        """What is taken out, as it is stored."""
        found = self.mean(mean) if mean else Shared({}, self.weight.shape[2], self.input_side)
        return found | self.basis(found.left_of(self.weight), rank) if rank else found

    def mean(self, bits: int) -> Shared:
        """Step 1."""
        mean = self.weight.mean(0, keepdim=True)
        alike = torch.eye(mean.shape[-1], device=mean.device).unsqueeze(0)
        stored = encode(*pad_columns(mean, alike), bits=bits, shared=True, seed=self.seed).stored()
        return Shared(
            {vq4.MEAN + n: t for n, t in stored.items()}, self.weight.shape[2], self.input_side
        )

    def basis(self, weight: Tensor, rank: int) -> Shared:
        return factorize(weight, self.moment, rank, input_side=self.input_side)


def square_root(moment: Tensor) -> tuple[Tensor, Tensor]:
    """C^1/2 and C^-1/2 of a symmetric positive semi-definite C [..., K, K], small eigenvalues raised to 1e-6 of the largest."""
    values, vectors = torch.linalg.eigh(moment)
    values = values.clamp(min=values.amax(-1, keepdim=True) * 1e-6 + 1e-20)
    root = values.sqrt().unsqueeze(-2)
    return (vectors * root) @ vectors.mT, (vectors / root) @ vectors.mT


def factorize(weight: Tensor, moment: Tensor, rank: int, *, input_side: bool) -> Shared:
    """Steps 2 to 7 for one projection: weight [E, N, K], moments [E, K, K]. Every expert counts alike."""
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
    tensors: dict[str, Tensor | None] = {
        "basis": basis.contiguous(),
        "coef": integers,
        "coef_scale": scale,
    }
    return Shared(tensors, weight.shape[2], input_side)
