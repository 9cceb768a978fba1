"""What a mean and a basis would save: the cost of coding a projection with and without them.

  1. Take the error after coding as proportional to the energy of the remainder (`Case.energy`).
     Each expert counts by how much it is used. Each column and row counts by the part of an
     error's cost that error feedback leaves there (pivots of the moment and of `sensitivity`).
  2. Find the factor by coding a few experts (`Case.cost`).
  3. A mean is coded too, so its own error comes on top: a share of its energy, `DISTORTION`.

The estimate is within 5 % of the error after coding on three models, for most projections.

  4. If a layer has many experts, all of this is done on a sample of them.

Shapes: E experts, E' of them in the sample, N rows, K columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

from moecc.errors import MoeccError
from moecc.ir.moe import Projection
from moecc.passes._code.basis import Shared, common_mean, factorize
from moecc.passes._code.coded import pad_columns
from moecc.passes._code.coding import encode
from moecc.passes._code.metric import OUTPUT_DAMPING, pivots, weighted_error
from moecc.passes._code.moments import Moments, evenly, stacked
from moecc.passes._code.rate import gain
from moecc.pipeline.bits import basis_bits, coded_bits
from moecc.pipeline.passes import Context, Layer

# bits of a mean -> the cost of its error, as a share of the mean's energy: measured
DISTORTION = {2: 0.06, 3: 0.018, 4: 0.007}
_RANKS = (4, 8, 16, 32, 64)
_SAMPLED_EXPERTS = 4
# experts that a choice is made on, and the numbers that they may have in all
_LEAST_SAMPLE, _MOST_SAMPLE, _IN_SAMPLE = 4, 16, 1 << 26


@dataclass(frozen=True)
class Choice:
    """A mean and a basis, the cost of the error behind them, and the bits that both take."""

    mean: int  # bits, 0: none
    rank: int
    cost: float  # as a share of what it is if nothing is taken out
    bits: int


@dataclass
class Case:
    """One projection whose mean and basis are to be chosen, seen through a sample of its experts.

    Shapes: E' experts of the sample; of few experts it is all.
    """

    projection: Projection
    weight: Tensor  # [E', N, K]
    moment: Tensor  # [E', K, K]
    output: Tensor | None  # [E', N, N]: costs of output errors; None: all channels alike
    used: Tensor  # [E']: how much of the layer's output they stand for
    some: list[int]  # the experts of the sample
    experts: int  # of the layer, E
    everyone: Callable[[], Tensor]  # gives the mean of all experts, [1, N, K]
    seed: int

    @classmethod
    def of(cls, layer: Layer, projection: Projection, moments: Moments, ctx: Context) -> Case:
        """The case of `projection` as it is in `layer`'s program."""
        name, (experts, rows, columns) = projection.name, projection.shape
        some = sample(moments.mass, rows * columns + columns**2 + rows**2)
        weight = layer.weight(projection, experts=some)
        assert weight is not None
        metrics = [moments.expert(e).metric(name) for e in some]
        outputs = [output for _, output in metrics if output is not None]
        mass = moments.mass[some]
        everyone = partial(mean_of, layer, projection)
        if len(some) == experts:
            everyone = partial(weight.mean, 0, keepdim=True)
        return cls(
            projection,
            weight,
            torch.stack([moment for moment, _ in metrics]),
            stacked(outputs) if outputs else None,
            mass * moments.mass.sum() / mass.sum().clamp(min=1e-30),
            some,
            experts,
            everyone,
            ctx.seed_for(projection.moe.path, name),
        )

    @cached_property
    def average(self) -> Tensor:
        """The mean of all experts, [1, N, K]."""
        return self.everyone()

    @cached_property
    def mass(self) -> Tensor:
        """How much each expert's error counts, [E'].

        Where output errors have no costs, it is a share of the projection's whole output.
        """
        if self.output is not None:
            return self.used
        whole = (self.used * weighted_error(self.weight, self.moment)).sum().clamp(min=1e-30)
        return self.used / whole

    @cached_property
    def size(self) -> Tensor:
        """The cost of energy that is left in a row, [E, N]; [E, 1] if all rows count alike."""
        rows = torch.ones(1, 1) if self.output is None else pivots(self.output, OUTPUT_DAMPING)
        return (self.mass * pivots(self.moment).mean(-1)).unsqueeze(-1) * rows

    @property
    def input_side(self) -> bool:
        """Whether the projection reads the residual stream: gate_up."""
        return self.projection.input_side

    @property
    def hidden(self) -> int:
        """The width of the residual stream, D."""
        return self.weight.shape[2] if self.input_side else self.weight.shape[1]

    def energy(self, remainder: Tensor) -> Tensor:
        """Step 1 by experts, without the factor: [E or 1, N, K] -> [E]."""
        return (remainder.square().sum(-1) * self.size).sum(-1)

    def cost(self, bits: int, mean: int = 0, rank: int = 0) -> float:
        """Step 2: the cost of the error once the rest is coded at `bits`, measured on some experts.

        The rest is the remainder behind a mean of `mean` bits and a basis of `rank` rows; 0: none.
        """
        whole = self.energy(self.weight)
        # An expert without tokens or weights says nothing about the factor.
        alive = (whole > 0).nonzero().squeeze(-1)
        if not len(alive):
            return 0.0
        some = alive[evenly(len(alive), _SAMPLED_EXPERTS)]
        remainder = self.take(mean, rank).left_of(self.weight)
        energy, output = self.energy(remainder), None if self.output is None else self.output[some]
        padded, moment = pad_columns(remainder[some], self.moment[some])
        measured = 0.0
        for i, e in enumerate(some):
            costs = None if output is None else output[i : i + 1]
            w, m = padded[i : i + 1], moment[i : i + 1]
            coded = encode(w, m, costs, bits=bits, shared=True, seed=self.seed, rounds=1, turns=5)
            measured += float(self.mass[e] * weighted_error(coded.dense() - w, m, costs))
        return float(measured * energy.sum() / energy[some].sum().clamp(min=1e-30))

    def choices(self, means: Sequence[int], ranks: Sequence[int]) -> Iterator[Choice]:
        """Every combination of `means` and `ranks` with its cost, those without a mean first."""
        experts, (rows, columns) = self.experts, self.weight.shape[1:]
        whole = float(self.energy(self.weight).sum().clamp(min=1e-30))
        for some in ([m for m in means if not m], [m for m in means if m]):
            if not some:
                continue
            left = self.weight - self.average if some[0] else self.weight
            basis = self.basis(left, max(ranks)) if max(ranks) else None
            for rank in ranks:
                rest = basis.first(rank).left_of(left) if basis is not None and rank else left
                energy = float(self.energy(rest).sum())
                more = basis_bits(rank, experts, rows, columns, input_side=self.input_side)
                for mean in some:
                    own = DISTORTION[mean] * float(self.energy(self.average).sum()) if mean else 0.0
                    taken = coded_bits(1, rows, columns, mean) if mean else 0
                    yield Choice(mean, rank, (energy + own) / whole, taken + more)

    def offers(self, mean: int | str, rank: int | str) -> tuple[Sequence[int], Sequence[int]]:
        """The bits of a mean and the ranks that the options allow, the least first.

        An option that is "auto" allows all that are worth looking at. Raise MoeccError if the rank
        is more than the projection's dimensions.
        """
        if rank != "auto" and int(rank) > self.hidden:
            raise MoeccError(
                f"rank={rank} is more than {self.projection.name}'s {self.hidden} dimensions; "
                "give a smaller rank"
            )
        means: tuple[int, ...] = (0 if mean in ("auto", "off") else int(mean),)
        if mean == "auto" and self.siblings():
            means = (0, *DISTORTION)
        if rank != "auto":
            return means, (int(rank),)
        return means, (0, *(r for r in _RANKS if r < self.hidden // 4))

    def siblings(self) -> bool:
        """Whether even an exact mean would be worth 2 bits."""
        apart = self.weight - self.average
        whole, left = (float(self.energy(w).sum()) for w in (self.weight, apart))
        return left < whole * 4 ** (-2 / self.experts)

    def earns(self, plain: Shared, basis: Shared, bits: float) -> bool:
        """Whether a basis of all experts earns its bits per weight, next to `plain` without it."""
        before, after = (
            float(self.energy(shared.of(self.some).left_of(self.weight)).sum())
            for shared in (plain, basis)
        )
        return gain(before, after, bits) > 0

    def take(self, mean: int, rank: int) -> Shared:
        """The mean of `mean` bits and the basis of `rank` rows of the sample, as they are stored.

        0: none.
        """
        side = self.input_side
        found = Shared({}, self.weight.shape[2], side)
        if mean:
            found = common_mean(self.average, mean, self.seed, input_side=side)
        return found | self.basis(found.left_of(self.weight), rank) if rank else found

    def basis(self, weight: Tensor, rank: int) -> Shared:
        """A basis of `rank` rows for the sample's experts, or their remainders, [E', N, K]."""
        return factorize(weight, self.moment, rank, input_side=self.input_side)


def sample_size(experts: int, numbers: int) -> int:
    """How many experts a choice is made on, if one of them has so many numbers."""
    return min(experts, max(_LEAST_SAMPLE, min(_MOST_SAMPLE, _IN_SAMPLE // numbers)))


def sample(mass: Tensor, numbers: int) -> list[int]:
    """The experts that a choice is made on: all, or evenly spaced ones among those with tokens.

    mass: how much of the layer each of them is, [E].
    """
    most = sample_size(len(mass), numbers)
    if most == len(mass):
        return list(range(most))
    alive = mass.nonzero().squeeze(-1) if mass.any() else torch.arange(len(mass))
    return alive[evenly(len(alive), most)].tolist()


def mean_of(layer: Layer, projection: Projection) -> Tensor:
    """The mean of a projection's experts, [1, N, K]; one of them in memory at a time."""
    experts, total = projection.shape[0], None
    for e in range(experts):
        weight = layer.weight(projection, experts=[e])
        assert weight is not None
        total = weight if total is None else total.add_(weight)
    assert total is not None
    return total / experts
