"""The unit of coding: some experts of one projection, coded by a pure function in any process.

Shapes: n experts, N rows, K columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moecc.ir import vq4
from moecc.ir.reference import inverse
from moecc.ir.relative import relative
from moecc.passes._code.codebooks import Book, clustered, drawn, rounded
from moecc.passes._code.coded import pad_columns
from moecc.passes._code.coding import TURNS, encode, fitted_book, start_groups
from moecc.passes._code.metric import apart, damping, together, weighted_error
from moecc.passes._code.moments import Common, Expert, stacked
from moecc.pipeline.device import for_a_unit
from moecc.pipeline.work import costs
from moecc.pipeline.workers.base import Workers

AT_ONCE = 1 << 19  # weights of a unit on a CPU; an expert that has more is a unit of its own
JOINTLY = 1 << 26  # weights of experts that can be given a codebook of all together

_COPIES = 10  # float32 copies of a matrix and of its metric while a GPU codes it


def on_device(experts: int, rows: int, columns: int, device: torch.device, *, blocks: int) -> int:
    """Return how many experts a GPU codes together: equally many in each unit, if it can.

    blocks: of rows whose errors count together; 0: all count alike.
    """
    one = 4 * _COPIES * (columns * (rows + columns) + costs(rows, blocks))
    most = min(experts, max(1, for_a_unit(device) // one))
    units = -(-experts // most)
    return -(-experts // units)


@dataclass(frozen=True)
class Settings:
    """How a projection is coded; see `encode`."""

    bits: int
    shared: bool
    rounds: int
    feedback: bool
    seed: int


@dataclass(frozen=True)
class Unit:
    """Some experts of a projection, and the weights to be coded: all of them or what is left."""

    projection: str
    experts: tuple[Expert, ...]  # bare
    stored: Tensor  # [n, N, K], in any type
    settings: Settings
    book: Book | None = None  # to start with, or, if it is shared, to use as it is

    @property
    def weight(self) -> Tensor:
        """[n, N, K], float32."""
        return self.stored.float()

    def metric(self, common: Common) -> tuple[Tensor, Tensor | None]:
        """Second moments [n, K, K] of the input and costs [n, b, B, B] of output errors, if any."""
        found = [expert.under(common).metric(self.projection) for expert in self.experts]
        outputs = [output for _, output in found if output is not None]
        return stacked([moment for moment, _ in found]), stacked(outputs) if outputs else None


def code(unit: Unit, common: Common) -> dict[str, Tensor]:
    """Code a unit: the tensors of `vq4.CODED`, scales in float32, and `lost`.

    lost: each expert's error under its moments as a share of its output, [n].
    """
    moment, output = unit.metric(common)
    before, s = unit.weight, unit.settings
    weight, padded = pad_columns(before, moment)
    coded = encode(
        weight,
        padded,
        output,
        bits=s.bits,
        shared=s.shared,
        seed=s.seed,
        rounds=s.rounds,
        feedback=s.feedback,
        book=unit.book,
    )
    error = coded.dense()[..., : before.shape[-1]] - before
    original = torch.stack([expert.weight(unit.projection) for expert in unit.experts])
    lost = relative(weighted_error(error, moment), weighted_error(original, moment))
    found = {name: tensor for name, tensor in coded.stored().items() if tensor is not None}
    # With a shared part the error of an expert that is next to nothing can be many times it.
    return found | {"scale": coded.scale, "lost": lost.clamp(max=1)}


@dataclass(frozen=True)
class Beginning:
    """One expert of those that a codebook begins with."""

    unit: Unit
    places: Tensor  # of its groups of weights, [n]


@dataclass(frozen=True)
class Points:
    """Groups of weights to be clustered."""

    found: tuple[Tensor, Tensor]  # see `groups`
    bits: int
    seed: int
    count: int  # of the groups that they were drawn from


def begin(
    workers: Workers,
    units: Iterable[Unit],
    settings: Settings,
    shape: tuple[int, int, int],
    common: Common,
) -> Book:
    """The codebook that all units of a projection begin with, by k-means.

    units: one for each expert of a sample; shape: of the weights of all of these, padded. They give
    no more than what k-means looks at.
    """
    experts, rows, columns = shape
    each = rows * columns // vq4.group_size(settings.bits)
    places = drawn(experts * each, torch.Generator().manual_seed(settings.seed))
    owner = places // each
    parts = (Beginning(unit, places[owner == i] % each) for i, unit in enumerate(units))
    found = list(workers.run(sampled, parts, common))
    back = inverse(owner.argsort(stable=True))
    points, cost = (torch.cat(list(t))[back] for t in zip(*found, strict=True))
    made = Points((points, cost), settings.bits, settings.seed, experts * each)
    (book,) = workers.run(cluster, [made])
    return book


def sampled(part: Beginning, common: Common) -> tuple[Tensor, Tensor]:
    """Those groups of one expert that k-means looks at; see `groups`."""
    unit = part.unit
    (expert,) = unit.experts
    diagonal = expert.under(common).moment(unit.projection).diagonal()
    wide = vq4.padded(len(diagonal))
    importance = F.pad(diagonal, (0, wide - len(diagonal))).unsqueeze(0)
    weight = F.pad(unit.weight, (0, wide - unit.stored.shape[-1]))
    return start_groups(weight, importance + damping(importance), unit.settings.bits, part.places)


def cluster(points: Points) -> Book:
    """The codebook of groups."""
    generator = torch.Generator().manual_seed(points.seed)
    drawn(points.count, generator)  # those that chose the groups
    return rounded(clustered(*points.found, TURNS, generator), points.bits)


def fit(unit: Unit, common: Common) -> Book:
    """The shared codebook of a projection, fitted to evenly spaced rows of some of its experts."""
    s = unit.settings
    moment, output = unit.metric(common)
    weight, moment = pad_columns(unit.weight, moment)
    rows = slice(None, None, max(1, -(-weight.numel() // JOINTLY)))
    blocks = 1 if output is None else output.shape[1]
    some = together(apart(weight, blocks)[..., rows, :])
    coded = encode(
        some,
        moment,
        None if output is None else output[..., rows, rows],
        bits=s.bits,
        shared=True,
        seed=s.seed,
        rounds=s.rounds,
        feedback=s.feedback,
    )
    return fitted_book(coded, some)


def join(parts: Sequence[Mapping[str, Tensor]], *, shared: bool) -> dict[str, Tensor]:
    """The tensors of all experts from those of their units, in order.

    Parts may lie on disk: one of them is read at a time.
    """
    experts = sum(len(part["lost"]) for part in parts)
    found = dict[str, Tensor]()
    for name in parts[0]:
        start = 0
        for part in parts:
            tensor = part[name]
            if name == "codebook" and shared:
                found[name] = tensor
                break
            if name not in found:
                found[name] = tensor.new_empty(experts, *tensor.shape[1:])
            found[name][start : start + len(tensor)] = tensor
            start += len(tensor)
    return found
