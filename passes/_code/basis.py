"""The common part of a projection's experts, which can be taken out before coding.

Two things can be: a matrix that all experts share as it is, and a basis in which each expert has
coefficients of its own.

  mean     1. The experts' mean. Experts that were once one dense layer (Qwen1.5-MoE, Mixtral) still
              resemble it; with the mean taken out, only their differences are left to be coded (as
              with D2-MoE's base weights, arXiv 2502.17298). The mean is coded at bits of its own,
              with all directions alike, because the coding of the rest makes up for its error. It
              is computed once per token, like a shared expert.

The basis is on the residual-stream side of both projections, so that it is applied once per token,
whatever experts the token takes.

  gate_up  2. C = the plain mean of the experts' second moments, C^1/2 its square root (the
              Karhunen-Loeve transform of the input).
           3. V = the top r right singular vectors of the stacked W_e C^1/2: the directions that all
              experts read from. Here and in steps 2 and 5 each expert counts alike, whatever its
              part of the cost (`sharing`).
           4. basis = V^T C^-1/2 [r, D], coef_e = W_e C^1/2 V [N, r].
  down     5. U = the top r left singular vectors of the side-by-side W_e C_e^1/2: the directions
              that all experts write to.
           6. basis = U^T [r, D], coef_e = U^T W_e [r, F].
  both     7. Store the basis in 16 bits, and the coefficients as int8 with a scale per row. The
              coder gets W_e minus the *stored* part, so it makes up for this rounding.

Of many experts, steps 3 and 5 are done on a sample, and all of them turn what is found once
(`Directions.turned`).

Not done: a mean of least squares under the moments. It runs off in directions that few tokens use,
and doubled the divergence. Nor a basis for which experts count by how much they are used: with 16
rows, the divergence of three of four models fell, by 0.3 to 4 %, and that of one rose by 2 %.

Shapes: E experts, N rows, K columns, D hidden, F intermediate, r rows of the basis.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moecc.ir import vq4
from moecc.passes._code.coded import pad_columns
from moecc.passes._code.coding import encode
from moecc.passes._code.half import compact
from moecc.passes._code.metric import damped

MORE, _TURNS = 16, 24  # vectors beside those that are wanted, and products with the matrix
_SMALL = 512  # rows of a matrix whose eigenvectors take no longer than those products
_OWN = ("coef", "coef_scale")  # what each expert has of its own


@dataclass(frozen=True)
class Directions:
    """A basis before it is stored."""

    onto: Tensor  # [D, r]: W_e onto is an expert's coefficients, for down onto^T W_e
    basis: Tensor  # [r, D]

    @classmethod
    def of(cls, vectors: Tensor, root: Tensor | None) -> Directions:
        """Those of `vectors` [D, r]; root: C^1/2, for gate_up."""
        if root is None:
            return cls(vectors, vectors.T)
        basis = torch.linalg.solve_triangular(root, vectors.T, upper=False, left=False)
        return cls(root @ vectors, basis)

    def turned(
        self, pull: Callable[[Tensor], Tensor], root: Tensor | None, rank: int
    ) -> Directions:
        """The `rank` directions that are found if experts turn these once (subspace iteration).

        pull: multiplies [D, r] by the sum of W_e^T W_e; for down, of W_e C_e W_e^T. Nothing else is
        known of the sum (Nystrom's approximation; Tropp et al., arXiv 1706.05736, equation 1.3).
        """
        if root is None:
            span = torch.linalg.qr(self.onto)[0]
            found = pull(span)
        else:
            span = torch.linalg.qr(torch.linalg.solve_triangular(root, self.onto, upper=False))[0]
            found = root.T @ pull(root @ span)
        within = damped((span.mT @ found).unsqueeze(0), 1e-6)[0].double()
        lower = torch.linalg.cholesky((within + within.mT) / 2).to(found)
        half = torch.linalg.solve_triangular(lower.mT, found, upper=True, left=False)
        vectors = torch.linalg.svd(half, full_matrices=False)[0][:, :rank]
        return Directions.of(vectors, root)


@dataclass(frozen=True)
class Shared:
    """The part that is taken out of one projection, as it is stored."""

    tensors: dict[str, Tensor | None]  # by the names of `vq4.SHARED`
    columns: int
    input_side: bool  # whether the projection reads the residual stream: gate_up

    def left_of(self, weight: Tensor) -> Tensor:
        """The remainder of weight [E, N, K]."""
        taken = vq4.shared_part(
            self.tensors, self.columns, torch.float32, input_side=self.input_side
        )
        return weight if taken is None else weight - taken

    def of(self, experts: Sequence[int]) -> Shared:
        """The part of some experts."""
        own = {
            k: t if t is None or k not in _OWN else t[list(experts)]
            for k, t in self.tensors.items()
        }
        return replace(self, tensors=own)

    def first(self, rank: int) -> Shared:
        """The basis cut to its first `rank` rows."""
        basis, coef, scale = (self.tensors[n] for n in ("basis", "coef", "coef_scale"))
        assert basis is not None and coef is not None and scale is not None
        cut = (coef[..., :rank], scale) if self.input_side else (coef[:, :rank], scale[:, :rank])
        return replace(self, tensors={"basis": basis[:rank], "coef": cut[0], "coef_scale": cut[1]})

    def __or__(self, other: Shared) -> Shared:
        return Shared({**self.tensors, **other.tensors}, self.columns, self.input_side)


def common_mean(mean: Tensor, bits: int, seed: int, *, input_side: bool) -> Shared:
    """Step 1: the mean of a projection's experts, [1, N, K], coded at `bits`."""
    alike = torch.eye(mean.shape[-1], device=mean.device).unsqueeze(0)
    stored = encode(*pad_columns(mean, alike), bits=bits, shared=True, seed=seed).stored()
    tensors = {vq4.MEAN + name: tensor for name, tensor in stored.items()}
    return Shared(tensors, mean.shape[2], input_side)


def factorize(weights: Tensor, moments: Tensor, rank: int, *, input_side: bool) -> Shared:
    """Steps 2 to 7 for one projection: weights [E, N, K] under moments [E, K, K]."""
    found = directions(weights, moments, rank, input_side=input_side)
    return stored_basis(weights, weights.shape[-1], found, input_side=input_side)


def directions(weights: Tensor, moments: Tensor, rank: int, *, input_side: bool) -> Directions:
    """Steps 2 to 6: `rank` directions that experts [E, N, K] with moments [E, K, K] share."""
    if input_side:
        root = root_of(added(moments) / len(moments))
        # right singular vectors of the stacked matrix = eigenvectors of the sum of Gram matrices
        gram = added(w.mT @ w for w in weights)
        return Directions.of(largest(root.T @ gram @ root, rank), root)
    pairs = zip(weights, moments, strict=True)
    gram = added(w @ steady(m) @ w.mT for w, m in pairs)
    return Directions.of(largest(gram, rank), None)


def root_of(moment: Tensor) -> Tensor:
    """C^1/2 of step 2, lower triangular: any root gives the same basis. C may be near singular."""
    root: Tensor = torch.linalg.cholesky(steady(moment).double()).float()
    return root


def steady(moment: Tensor) -> Tensor:
    """A moment [K, K] that can be inverted."""
    return damped(moment.unsqueeze(0), 1e-3)[0]


def stored_basis(
    weights: Iterable[Tensor], columns: int, found: Directions, *, input_side: bool
) -> Shared:
    """Step 7: the coefficients of weights [N, K], one expert after the other, and the basis."""
    onto = found.onto
    coef = torch.stack([w @ onto if input_side else onto.T @ w for w in weights])
    scale = compact((coef.abs().amax(-1) / 127).clamp(min=6e-5))
    integers = (coef / scale.float().unsqueeze(-1)).round().clamp(-127, 127).to(torch.int8)
    tensors: dict[str, Tensor | None] = {
        "basis": compact(found.basis),
        "coef": integers,
        "coef_scale": scale,
    }
    return Shared(tensors, columns, input_side)


def added(matrices: Iterable[Tensor]) -> Tensor:
    """Their sum, one after the other."""
    total: Tensor | None = None
    for matrix in matrices:
        total = matrix.clone() if total is None else total.add_(matrix)
    assert total is not None
    return total


def largest(gram: Tensor, rank: int) -> Tensor:
    """The eigenvectors of the `rank` largest eigenvalues, as columns, the largest first.

    gram: symmetric and positive semi-definite, [D, D]. If it is large, vectors that are drawn are
    multiplied by it some times (subspace iteration, Halko et al., arXiv 0909.4061, algorithm 4.4):
    what they miss is little of the energy, though not each is exact.
    """
    drawn = rank + MORE
    if len(gram) <= max(_SMALL, 4 * drawn):
        vectors: Tensor = torch.linalg.eigh(gram)[1]
        return vectors[:, -rank:].flip(-1)
    draw = torch.Generator().manual_seed(0)
    span = torch.randn(len(gram), drawn, generator=draw).to(gram)
    for _ in range(_TURNS):
        span = torch.linalg.qr(gram @ span)[0]
    within: Tensor = torch.linalg.eigh(span.mT @ gram @ span)[1]
    return span @ within[:, -rank:].flip(-1)
