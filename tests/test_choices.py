"""The choices of `klt`, `vq` and `budget`, from costs that a test makes up."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import slow_vq4 as slow
import torch
from coders import drawn
from conftest import tiny_program
from pipelines import Tiny, compiled, derive, resolved
from torch import Tensor

from moecc.ir import vq4
from moecc.ir.moe import Projection
from moecc.ir.program import Program
from moecc.ir.tensors import CPU
from moecc.passes import vq
from moecc.passes._code.coded import pad_columns
from moecc.passes._code.coding import encode
from moecc.passes._code.half import compact
from moecc.passes._code.moments import Common, Moments
from moecc.passes._code.sharing import Case, Choice
from moecc.passes._code.units import Settings, code, join
from moecc.passes.budget import PlanBits, Planned
from moecc.passes.klt import SharedBasis
from moecc.passes.vq import VectorQuantize
from moecc.pipeline.bits import coded_bits
from moecc.pipeline.fate import Fate
from moecc.pipeline.passes import Context, Layer, LayerPass, Pass
from moecc.pipeline.run import run_passes

# ---- klt


class MadeUp(Case):
    """A projection whose costs are drawn at random, as estimated and as measured.

    price: the bits of a bit of a mean; a row of a basis takes as many.
    """

    def __init__(self, seed: int, means: Sequence[int], ranks: Sequence[int], price: int):
        draw = random.Random(seed)
        self.means, self.ranks = means, ranks
        self.asked: list[tuple[int, int]] = []
        self.found, self.measured = {}, {(0, 0): draw.uniform(1, 10)}
        for mean, rank in itertools.product(means, ranks):
            left = draw.uniform(0.2, 1) if mean or rank else 1.0
            self.found[mean, rank] = Choice(mean, rank, left, price * (mean + rank))
            off = draw.choice((0.5, 1, 1.5)) if mean or rank else 1
            self.measured[mean, rank] = self.whole * left * off

    @property
    def whole(self) -> float:
        """The cost of its error if nothing is taken out."""
        return self.measured[0, 0]

    def offers(self, mean: int | str, rank: int | str) -> tuple[Sequence[int], Sequence[int]]:
        assert (mean, rank) == ("off", 7)
        return self.means, self.ranks

    def choices(self, means: Sequence[int], ranks: Sequence[int]) -> Iterator[Choice]:
        assert (means, ranks) == (self.means, self.ranks)
        yield from self.found.values()

    def cost(self, bits: int, mean: int = 0, rank: int = 0) -> float:
        assert bits == 3
        self.asked.append((mean, rank))
        return self.measured[mean, rank]


def most_worth(case: MadeUp, other: float) -> tuple[tuple[int, int], bool]:
    """Return the combination of the most worth by estimate, and whether it keeps it when coded.

    other: the cost of the layer's other projection.
    """

    def worth(key: tuple[int, int], cost: float) -> float:
        """Bits per weight that a smaller error saves, less those that it costs."""
        saved = math.log((case.whole + other) / (cost + other), 4)
        return saved - case.found[key].bits / WEIGHTS

    estimates = {key: case.whole * choice.cost for key, choice in case.found.items()}
    best = max(case.found, key=lambda key: worth(key, estimates[key]))
    first = next(iter(case.found))
    return best, worth(best, case.measured[best]) > worth(first, estimates[first])


WEIGHTS = 4 * (16 * 16 + 16 * 8)  # of both projections of `tiny_program`


@cache
def projections() -> tuple[Projection, Projection]:
    """Return those of a tiny layer."""
    return tiny_program("M").moe_layers()[0].projections


def decided(
    seed: int, offer: tuple[Sequence[int], Sequence[int]], price: int
) -> tuple[list[MadeUp], set[tuple[bool, bool]]]:
    """Return two cases after the choice, which is checked, and what was found best and kept."""
    gate_up, down = projections()
    cases = {p: MadeUp(seed + 100 * i, *offer, price) for i, p in enumerate((gate_up, down))}
    got = SharedBasis(rank=7, mean="off", bits=3).choose(cases)  # type: ignore[arg-type]
    found = set()
    for p, other in ((gate_up, down), (down, gate_up)):
        first = next(iter(cases[p].found))
        best, kept = most_worth(cases[p], cases[other].whole)
        assert got[p] == (best if kept else first), (seed, price)
        found.add((best == first, kept))
    return list(cases.values()), found


OFFERS: dict[str, tuple[Sequence[int], Sequence[int]]] = {
    "all": ((0, 2), (0, 4, 8)),
    "a basis": ((0,), (0, 4, 8)),
    "a mean of 3 bits": ((3,), (0, 1)),
    "a basis of 2 rows": ((0, 1), (2,)),
}


@pytest.mark.parametrize("offer", OFFERS)
def test_klt_takes_the_combination_that_is_most_worth_its_bits_if_it_is_so_when_coded(
    offer: str,
) -> None:
    """Also where it need not code to see that the first is: see below."""
    taken, coded = set(), set()
    for seed in range(80):
        cases, found = decided(seed, OFFERS[offer], 50 * 4 ** (seed % 4))
        taken |= found
        coded.add(any(case.asked for case in cases))
    assert {(False, True), (False, False)} < taken and coded == {True, False}


def test_klt_codes_nothing_if_no_choice_could_be_worth_its_bits_even_alone() -> None:
    """Beside the other projection's errors each saves less."""
    for seed in range(40):
        cases, _ = decided(seed, OFFERS["all"], 50 * 4 ** (seed % 4))
        worth = [
            math.log(1 / c.cost, 4) - c.bits / WEIGHTS for x in cases for c in x.found.values()
        ]
        assert any(case.asked for case in cases) == (max(worth) > 0), seed


def test_klt_measures_nothing_if_nothing_is_to_be_decided() -> None:
    gate_up, down = projections()
    cases = {gate_up: MadeUp(0, (3,), (2,), 1), down: MadeUp(1, (0,), (5,), 1)}
    got = SharedBasis(rank=7, mean="off", bits=3).choose(cases)  # type: ignore[arg-type]
    assert got == {gate_up: (3, 2), down: (0, 5)}
    assert not any(case.asked for case in cases.values())


# ---- vq


class Off:
    """Stands for coded experts: they are off by `size` in every weight."""

    def __init__(self, weight: Tensor, size: float):
        self.weight, self.size = weight, size

    def dense(self) -> Tensor:
        return self.weight + self.size


@pytest.mark.parametrize(("experts", "bits"), [(12, 2), (3, 4), (1, 3)])
def test_a_codebook_is_shared_unless_own_ones_save_more_bits_than_they_take(
    experts: int, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, moment = drawn(experts=min(experts, 8), rows=16, columns=64)
    calls: list[tuple[bool, int]] = []
    sizes = {True: 1.0, False: 1.0}

    def encode(w: Tensor, m: Tensor, *, shared: bool, rounds: int, **options: object) -> Off:
        assert w is weight and m is moment
        assert options == {"bits": bits, "seed": 5, "feedback": True}
        calls.append((shared, rounds))
        return Off(w, sizes[shared])

    monkeypatch.setattr(vq, "encode", encode)
    entries = 256 * (2 if bits == 4 else 4)
    # every expert but one has a codebook more, of 8 bits an entry
    price = 8 * entries * (experts - 1) / (experts * 16 * 64)
    for rounds in (1, 4):
        found = VectorQuantize(bits=bits, rounds=rounds, codebook="auto")
        for share in (0.98, 1.02):
            sizes[False] = 1 / 2 ** (share * price)  # errors fall by a factor of 4 per bit
            own = share > 1 and experts > 1
            got = found.shares(weight, lambda: moment, 5, experts)
            assert got == (not own if experts > 1 else False)
    assert calls == ([(s, r) for r in (1, 2) for _ in range(2) for s in (True, False)]) * (
        experts > 1
    )


def test_own_codebooks_that_cost_next_to_nothing_are_not_weighed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One of 1024 bytes more for two experts: 0.0039 bits per weight, and 0.0078."""
    moment = torch.zeros(2, 1024, 1024)
    asked: list[Tensor] = []

    def computed() -> Tensor:
        asked.append(moment)
        return moment

    assert VectorQuantize().shares(torch.zeros(2, 1024, 1024), computed, 0, 2) is False
    assert not asked
    seen: list[bool] = []

    def encode(w: Tensor, m: Tensor, *, shared: bool, **options: object) -> Off:
        seen.append(shared)
        return Off(w, 1.0)

    monkeypatch.setattr(vq, "encode", encode)
    small = VectorQuantize(rounds=1)
    assert small.shares(torch.ones(2, 512, 1024), computed, 0, 2) is True
    assert seen == [True, False]


@dataclass
class Stored:
    """A projection of a layer: its weights [E, N, K], what else it holds, and its moments."""

    weights: Tensor
    moment: Tensor
    bias: Tensor | None = None
    held: Mapping[str, Tensor | None] = field(default_factory=dict)

    @property
    def tokens(self) -> Tensor:
        return torch.ones(len(self.weights))

    @property
    def program(self) -> Any:
        def read(node: object, experts: Sequence[int]) -> Tensor:
            return self.weights[list(experts)]

        return SimpleNamespace(value=read, device=CPU)

    def weight(
        self, p: Projection, part: str = "", experts: Sequence[int] | None = None
    ) -> Tensor | None:
        if part:
            return {"bias": self.bias}[part]
        return self.weights if experts is None else self.weights[list(experts)]

    def stored(self, p: Projection) -> dict[str, Tensor | None]:
        return {"codes": None, **dict.fromkeys(vq4.SHARED), **self.held}

    def of(self, name: str, experts: Sequence[int]) -> Tensor:
        return self.moment[list(experts)]

    def expert(self, e: int) -> Any:
        """What calibration says of an expert: all output channels count alike."""
        found = SimpleNamespace(
            metric=lambda name: (self.moment[e], None), weight=lambda name: self.weights[e]
        )
        found.bare = found.under = lambda _: found
        return found


def projection(experts: int, rows: int, columns: int) -> Projection:
    """Return the gate_up projection of a tiny layer, of other sizes."""
    (p, _) = tiny_program("M").moe_layers()[0].projections
    p.operand("").meta["val"] = torch.empty(experts, rows, columns, device="meta")  # type: ignore[union-attr]
    p.moe.node.args[0].meta["val"] = torch.empty(6, columns, device="meta")  # type: ignore[union-attr]
    assert p.shape == (experts, rows, columns)
    return p


@pytest.mark.parametrize("experts", [3, 12])
@pytest.mark.parametrize("codebook", ["expert", "layer", "auto"])
def test_a_projection_is_coded_with_the_options_of_the_pass(
    codebook: str, experts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With auto it is weighed on a sample of eight."""
    p, made = projection(experts, 8, 12), Stored(*drawn(experts=experts, rows=8, columns=12))
    some = [0, 1, 3, 4, 6, 7, 9, 11] if experts == 12 else [0, 1, 2]
    ctx, asked = Context(seed=3), []

    def shares(
        self: VectorQuantize, w: Tensor, m: Callable[[], Tensor], seed: int, experts: int
    ) -> bool:
        assert torch.equal(w, made.weights[some]) and torch.equal(m(), made.moment[some])
        assert seed == ctx.seed_for(p.moe.path, p.name)
        asked.append(experts)
        return True

    monkeypatch.setattr(VectorQuantize, "shares", shares)
    found = VectorQuantize(bits=3, rounds=2, feedback=False, codebook=codebook)
    job = found.job(made, p, made, ctx)  # type: ignore[arg-type]
    seed = ctx.seed_for(p.moe.path, p.name)
    assert job.settings == Settings(3, codebook != "expert", 2, False, seed)
    assert asked == ([experts] if codebook == "auto" else [])


@pytest.mark.parametrize("planned", [None, (3, "expert"), (4, "layer")])
def test_what_vq_stores_and_tells_of_a_projection(planned: tuple[int, str] | None) -> None:
    """Ten columns are padded to 16. A plan goes before the options."""
    experts, rows, columns = 3, 8, 10
    mean = slow.draw(2, experts=1, rows=rows, columns=columns, bits=3)
    held = {f"mean_{n}": t for n, t in slow.tensors(mean).items() if n in slow.CODED}
    bias = torch.randn(experts, rows)
    layer = Stored(*drawn(experts=experts, rows=rows, columns=columns), bias, held)
    weight, moment = layer.weights, layer.moment
    alone = slow.dense({**dict.fromkeys(slow.NAMES), **mean}, columns, input_side=True)
    whole = weight + torch.from_numpy(alone).float()
    moments: Any = Stored(whole, moment)
    p, ctx = projection(experts, rows, columns), Context(seed=3)
    if planned is not None:
        ctx.data["budget"] = {p.path: Planned(*planned, 0, 0, 0.0, 0)}
    bits, codebook = planned or (2, "layer")
    found = VectorQuantize(codebook="layer", rounds=1)
    job = found.job(layer, p, moments, ctx)  # type: ignore[arg-type]
    parts = [code(make(), Common({}, moment, None)) for _, make in job.units()]
    coded = join(parts, shared=codebook == "layer")
    got = found.stored(layer, job, coded, ctx)  # type: ignore[arg-type]
    padded, wide = pad_columns(weight, moment)
    want = encode(
        padded,
        wide,
        bits=bits,
        shared=codebook == "layer",
        seed=ctx.seed_for(p.moe.path, p.name),
        rounds=1,
    )
    expected = {**dict.fromkeys(vq4.SHARED), **want.stored(), "bias": compact(bias), **held}
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        stored = got[name]
        assert (stored is None) == (tensor is None), name
        assert stored is None or tensor is None or torch.equal(stored, tensor), name
    row = ctx.audit[p.path]
    assert row["codebook"] == codebook
    assert str(Fate.of_json(row["fate"])) == f"vq4 {bits} bit"
    d, lost = want.dense()[..., :columns] - weight, []
    for e in range(experts):
        cost, all_of_it = (sum(float(row @ moment[e] @ row) for row in x) for x in (d[e], whole[e]))
        lost.append(min(cost / all_of_it, 1))
    assert row["expert_in_sample_error"] == pytest.approx(lost, rel=1e-3, abs=1e-6)
    assert row["in_sample_error"] == pytest.approx(sum(lost) / experts, rel=1e-3)


def test_vq_and_klt_change_the_layers_that_have_experts(tiny: Tiny, batches: list[Tensor]) -> None:
    for kinds, changed in (("MD", True), ("D", False)):
        run = compiled(
            tiny(kinds), "klt{rank=1},vq{rounds=1},affine{offset=on},fold", batches=batches
        )
        told = {r.text.partition("{")[0]: r.changed for r in run.reports}
        assert told == {"moments": False, **dict.fromkeys(("klt", "vq", "affine", "fold"), changed)}


# ---- budget


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("codebook", ["auto", "layer"])
def test_a_plan_chooses_among_all_ways_to_code_a_projection(
    tiny: Tiny, batches: list[Tensor], known: bool, codebook: str
) -> None:
    cost = torch.diag(torch.linspace(1, 3, 16))
    plan = PlanBits(codebook=codebook, rank=2, mean="auto")
    seen: dict[str, tuple[int, list[Planned]]] = {}
    want: dict[str, list[tuple[Any, ...]]] = {}

    def run(self: Pass, program: Program, ctx: Context) -> bool:
        ctx.data["sensitivity"] = {"layers.0": cost} if known else {}
        return False

    def run_layer(self: Pass, layer: Layer, ctx: Context) -> bool:
        for moe in layer.moe:
            seen.update(plan.offers(layer, moe, ctx, known=known))
            moments: Moments = layer.data["moments", moe.path]
            for p in moe.projections:
                case = Case.of(layer, p, moments, ctx)
                want[p.path] = list(ways(p, case))
        return False

    def ways(p: Projection, case: Case) -> Iterator[tuple[Any, ...]]:
        experts, rows, columns = p.shape
        for c in case.choices((0, 2, 3, 4), (2,)):
            for bits, error in ((2, 1.0), (3, 0.23), (4, 0.075)):
                for book, books, factor in (("expert", experts, 1.0), ("layer", 1, 1.06)):
                    if codebook in ("auto", book):
                        stored = c.bits + coded_bits(experts, rows, columns, bits, books=books)
                        cost = case.cost(2) * c.cost * error * factor
                        yield bits, book, c.mean, c.rank, cost, stored

    look = derive(LayerPass, "look", run_layer=run_layer)
    first = derive(Pass, "costs", run=run)
    run_passes(tiny("S"), [first, *resolved("moments"), look], Context(), batches)
    weights = {"layers.0.gate_up": 64 * 16 * 16, "layers.0.down": 64 * 16 * 8}
    assert {path: found[0] for path, found in seen.items()} == weights
    for path, (_, offers) in seen.items():
        got = [tuple(vars(o).values()) for o in offers]
        assert len(got) == 4 * 3 * (2 if codebook == "auto" else 1)
        for a, b in zip(got, want[path], strict=True):
            assert a[:4] == b[:4] and a[5] == b[5] and a[4] == pytest.approx(b[4], rel=1e-6)


def test_a_bias_is_paid_for_in_a_plan(tiny: Tiny, batches: list[Tensor]) -> None:
    """16 bits for each of its numbers."""
    bits: list[list[int]] = []

    def run_layer(self: Pass, layer: Layer, ctx: Context) -> bool:
        for moe in layer.moe:
            p = moe.gate_up
            case = Case.of(layer, p, layer.data["moments", moe.path], ctx)
            offers = PlanBits(rank=0, mean="off")._offers_of
            biased = replace(p)
            bits.append([o.stored for o in offers(p, case)])
            object.__setattr__(biased, "operand", lambda name: name == "bias" or None)
            bits.append([o.stored for o in offers(biased, case)])
        return False

    look = derive(LayerPass, "look", run_layer=run_layer)
    run_passes(tiny("M"), [*resolved("moments"), look], Context(), batches)
    assert [b - a for a, b in zip(*bits, strict=True)] == [16 * 4 * 16] * 6
