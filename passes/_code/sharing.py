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
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Self

import torch
from torch import Tensor

from moecc.errors import MoeccError
from moecc.ir.moe import Projection
from moecc.passes._code.basis import (
    MORE,
    Directions,
    Shared,
    common_mean,
    directions,
    factorize,
    steady,
)
from moecc.passes._code.coded import pad_columns
from moecc.passes._code.coding import encode
from moecc.passes._code.metric import OUTPUT_DAMPING, pivots, weighted_error, woven
from moecc.passes._code.moments import Common, Expert, Moments, evenly
from moecc.passes._code.rate import gain
from moecc.pipeline.bits import basis_bits, coded_bits
from moecc.pipeline.passes import Context, Layer
from moecc.pipeline.work import Experts, Scope, Work, costs, each, factor
from moecc.pipeline.workers.base import Alone, Workers

# bits of a mean -> the cost of its error, as a share of the mean's energy: measured
DISTORTION = {2: 0.06, 3: 0.018, 4: 0.007}
_RANKS = (4, 8, 16, 32, 64)
_SAMPLED_EXPERTS = 4
# experts that a choice is made on, and the numbers that they may have in all
_LEAST_SAMPLE, _MOST_SAMPLE, _IN_SAMPLE = 4, 16, 1 << 26


@dataclass(frozen=True)
class Sampled:
    """One expert of a sample, to be looked at by a worker."""

    projection: str
    expert: Expert  # bare


@dataclass(frozen=True)
class Metric:
    """How errors of a sample's experts count, and how coding spreads them."""

    moment: Tensor  # [E', K, K]
    output: Tensor | None  # [E', b, B, B]: costs of output errors; None: all channels alike
    columns: Tensor  # [E']: the part of an error's cost that is left in a column, on average
    rows: Tensor  # and in each row, [E', N]; [E', 1] if all count alike
    size: Tensor  # [E']: the weights' own cost, tr(W H W^T)

    @classmethod
    def of(cls, weight: Tensor, moment: Tensor, output: Tensor | None) -> Self:
        """The metric of weights [E', N, K]."""
        alike = weight.new_ones(len(weight), 1)
        rows = alike if output is None else woven(pivots(output, OUTPUT_DAMPING))
        size = weighted_error(weight, moment)
        return cls(moment, output, pivots(moment).mean(-1), rows, size)

    @classmethod
    def joined(cls, found: Sequence[Metric], common: Tensor | None) -> Self:
        """That of all experts from those of each. common: the costs that all share, if any."""
        outputs = [m.output for m in found if m.output is not None]
        output = torch.cat(outputs) if outputs else None
        if output is None and common is not None:
            output = common.expand(len(found), *common.shape)
        moment, columns, rows, size = (
            torch.cat([getattr(m, name) for m in found])
            for name in ("moment", "columns", "rows", "size")
        )
        return cls(moment, output, columns, rows, size)


def look(unit: Sampled, common: Common) -> Metric:
    """The metric of one expert, without the costs that all share."""
    expert = unit.expert.under(common)
    moment, output = expert.metric(unit.projection)
    own = None if output is None else output.unsqueeze(0)
    found = Metric.of(expert.weight(unit.projection).unsqueeze(0), moment.unsqueeze(0), own)
    return replace(found, output=None) if output is common.blocks else found


@dataclass(frozen=True)
class Trial:
    """One expert to be coded to see what error is left."""

    weight: Tensor  # [1, N, K]
    moment: Tensor  # [1, K, K]
    output: Tensor | None  # [1, b, B, B]
    bits: int
    seed: int


def attempt(trial: Trial) -> Tensor:
    """The cost of a trial's error, [1]."""
    weight, moment = pad_columns(trial.weight, trial.moment)
    coded = encode(
        weight,
        moment,
        trial.output,
        bits=trial.bits,
        shared=True,
        seed=trial.seed,
        rounds=1,
        turns=5,
    )
    return weighted_error(coded.dense() - weight, moment, trial.output)


@dataclass(frozen=True)
class Pulling:
    """One expert that turns directions."""

    left: Tensor  # what is left of its weights, [1, N, K], in any type
    expert: Expert | None  # bare; None for gate_up, which does without it


@dataclass(frozen=True)
class Pulled:
    """What is turned."""

    span: Tensor  # [D, r]
    common: Common


def pull(unit: Pulling, near: Pulled) -> Tensor:
    """Multiply by the expert's part of what `Directions.turned` asks for, [D, r]."""
    weight, span = unit.left[0].float(), near.span
    if unit.expert is None:
        return weight.mT @ (weight @ span)
    moment = steady(unit.expert.under(near.common).moment("down"))
    return weight @ (moment @ (weight.mT @ span))


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
    metric: Metric
    used: Tensor  # [E']: how much of the layer's output they stand for
    some: list[int]  # the experts of the sample
    experts: int  # of the layer, E
    everyone: Callable[[], Tensor]  # gives the mean of all experts, [1, N, K]
    seed: int
    workers: Workers = field(default_factory=Alone)

    @classmethod
    def of(cls, layer: Layer, projection: Projection, moments: Moments, ctx: Context) -> Case:
        """The case of `projection` as it is in `layer`'s program."""
        name, (experts, rows, columns) = projection.name, projection.shape
        some = sample(moments.mass, _numbers(rows, columns, moments.blocks(projection)))
        weight = layer.weight(projection, experts=some)
        assert weight is not None
        seen = (Sampled(name, moments.expert(e).bare(name)) for e in some)
        found = list(ctx.workers.run(look, seen, moments.common))
        mass = moments.mass[some]
        everyone = partial(mean_of, layer, projection)
        if len(some) == experts:
            everyone = partial(weight.mean, 0, keepdim=True)
        return cls(
            projection,
            weight,
            Metric.joined(found, moments.common.blocks),
            mass * moments.mass.sum() / mass.sum().clamp(min=1e-30),
            some,
            experts,
            everyone,
            ctx.seed_for(projection.moe.path, name),
            ctx.workers,
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
        if self.metric.output is not None:
            return self.used
        return self.used / (self.used * self.metric.size).sum().clamp(min=1e-30)

    @cached_property
    def size(self) -> Tensor:
        """The cost of energy that is left in a row, [E', N]; [E', 1] if all rows count alike."""
        return (self.mass * self.metric.columns).unsqueeze(-1) * self.metric.rows

    @property
    def whole(self) -> bool:
        """Whether the sample is all experts of the layer."""
        return len(self.some) == self.experts

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
        energy, output = self.energy(remainder), self.metric.output
        trials = (
            Trial(
                remainder[e : e + 1],
                self.metric.moment[e : e + 1],
                None if output is None else output[e : e + 1],
                bits,
                self.seed,
            )
            for e in some.tolist()
        )
        errors = torch.cat(list(self.workers.run(attempt, trials)))
        measured = float((self.mass[some] * errors).sum())
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
        """Whether a basis of all experts earns its bits, next to `plain` without it.

        bits: per weight of both projections; the other one's errors are left out, as if there were
        none.
        """
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
        return factorize(weight, self.metric.moment, rank, input_side=self.input_side)

    def directions(self, weight: Tensor, rank: int) -> Directions:
        """That basis before it is stored; it may have fewer rows."""
        rank = min(rank, self.hidden)
        return directions(weight, self.metric.moment, rank, input_side=self.input_side)


def sample_size(experts: int, numbers: int) -> int:
    """How many experts a choice is made on, if one of them has so many numbers."""
    return min(experts, max(_LEAST_SAMPLE, min(_MOST_SAMPLE, _IN_SAMPLE // numbers)))


def _numbers(rows: int, columns: int, blocks: int) -> int:
    """Numbers of an expert's weights and metric."""
    return rows * columns + columns**2 + rows**2 // max(blocks, 1)


def _in_cases(layer: Experts, *, weighted: bool) -> int:
    """Numbers of the cases of a layer's projections, which are looked at together."""
    total = 0
    for (rows, columns), blocks in zip(layer.shapes, layer.blocks, strict=True):
        some = sample_size(layer.experts, _numbers(rows, columns, blocks * weighted))
        total += some * (rows * columns + columns**2 + costs(rows, blocks * weighted))
    return total


def choosing(scope: Scope) -> Work:
    """The work of a choice in every layer, and of a basis of all experts."""
    held = (_in_cases(layer, weighted=scope.weighted) for layer in {*scope.layers})
    # each is there twice while it is joined
    done = Work(memory=scope.states + 2 * 4 * max(held, default=0))
    for layer, rows, columns, blocks, tokens in each(scope):
        some = sample_size(layer.experts, _numbers(rows, columns, blocks))
        share = some / layer.experts
        done.products += share * tokens * (columns**2 + layer.rows * layer.hidden)
        done.products += some * rows * columns**2
        done.factors += some * factor(columns)
        done.factors += some * factor(rows, blocks) if blocks else 0
        done.here += some * rows * columns**2
        done.here += 2 * max(columns, layer.hidden) ** 3
        if some == layer.experts:
            continue
        done.products += 2 * layer.experts * rows * columns * (_RANKS[-1] + MORE)
        if columns == layer.hidden:  # gate_up, for `Moments.typical`
            done.here += scope.tokens * columns**2
        if columns == layer.intermediate:
            done.products += tokens * (columns**2 + layer.rows * layer.hidden)
    return done


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
