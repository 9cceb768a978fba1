"""The choices of `klt`, `vq` and `budget`, from costs that a test makes up."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
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
from moecc.passes import vq
from moecc.passes._code.coding import encode_in_parts
from moecc.passes._code.half import compact
from moecc.passes._code.moments import Moments
from moecc.passes._code.sharing import Case, Choice
from moecc.passes.budget import PlanBits, Planned
from moecc.passes.klt import SharedBasis
from moecc.passes.vq import VectorQuantize
from moecc.pipeline.bits import coded_bits
from moecc.pipeline.fate import Fate
from moecc.pipeline.passes import Context, Layer, LayerPass, Pass
from moecc.pipeline.run import run_passes

# ---- klt


class MadeUp(Case):
    """A projection whose costs are drawn at random, as estimated and as measured."""

    def __init__(self, seed: int, means: Sequence[int], ranks: Sequence[int]):
        draw = random.Random(seed)
        self.weight = torch.zeros(draw.choice((2, 3)), 4, 8)
        self.means, self.ranks = means, ranks
        self.whole = draw.uniform(1, 10)
        self.found, self.measured = {}, {}
        for mean, rank in itertools.product(means, ranks):
            left = draw.uniform(0.2, 1) if mean or rank else 1
            bits = mean * 8 + rank * 5
            self.found[mean, rank] = Choice(mean, rank, self.whole * left, bits)
            off = draw.choice((0.5, 1, 1.5)) if mean or rank else 1
            self.measured[mean, rank] = self.whole * left * off

    def offers(self, mean: int | str, rank: int | str) -> tuple[Sequence[int], Sequence[int]]:
        assert (mean, rank) == ("off", 7)
        return self.means, self.ranks

    def choices(self, means: Sequence[int], ranks: Sequence[int], whole: float) -> Iterator[Choice]:
        assert (means, ranks, whole) == (self.means, self.ranks, self.whole)
        yield from self.found.values()

    def cost(self, bits: int, mean: int = 0, rank: int = 0) -> float:
        assert bits == 3
        return self.measured[mean, rank]


def most_worth(case: MadeUp, other: float, weights: int) -> tuple[tuple[int, int], bool]:
    """Return the combination of the most worth by estimate, and whether it keeps it when coded.

    other: the cost of the layer's other projection. weights: of both.
    """

    def worth(key: tuple[int, int], cost: float) -> float:
        """Bits per weight that a smaller error saves, less those that it costs."""
        saved = math.log((case.whole + other) / (cost + other), 4)
        return saved - case.found[key].bits / weights

    best = max(case.found, key=lambda key: worth(key, case.found[key].cost))
    first = next(iter(case.found))
    return best, worth(best, case.measured[best]) > worth(first, case.found[first].cost)


def test_klt_takes_the_combination_that_is_most_worth_its_bits_if_it_is_so_when_coded() -> None:
    gate_up, down = tiny_program("M").moe_layers()[0].projections
    taken = set()
    for seed in range(60):
        cases = {gate_up: MadeUp(seed, (0, 2), (0, 4, 8)), down: MadeUp(seed + 100, (0, 3), (2, 4))}
        for case in cases.values():
            case.measured[0, 0] = case.whole
        weights = sum(case.weight.numel() for case in cases.values())
        got = SharedBasis(rank=7, mean="off", bits=3).choose(cases)  # type: ignore[arg-type]
        for p, other in ((gate_up, down), (down, gate_up)):
            first = next(iter(cases[p].found))
            best, kept = most_worth(cases[p], cases[other].whole, weights)
            assert got[p] == (best if kept else first), seed
            taken.add((best == first, kept))
    assert {(False, True), (False, False)} < taken


def test_klt_measures_nothing_if_nothing_is_to_be_decided() -> None:
    gate_up, down = tiny_program("M").moe_layers()[0].projections
    cases = {gate_up: MadeUp(0, (3,), (2,)), down: MadeUp(1, (0,), (5,))}
    for case in cases.values():
        case.measured = {}
    got = SharedBasis(rank=7, mean="off", bits=3).choose(cases)  # type: ignore[arg-type]
    assert got == {gate_up: (3, 2), down: (0, 5)}


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
    weight, moment = drawn(experts=experts, rows=16, columns=64)
    some = [0, 1, 3, 4, 6, 7, 9, 11] if experts == 12 else list(range(experts))
    calls: list[tuple[bool, int]] = []
    sizes = {True: 1.0, False: 1.0}

    def encode(
        self: VectorQuantize, w: Tensor, m: Tensor, output: None, shared: bool, seed: int
    ) -> Off:
        assert torch.equal(w, weight[some]) and torch.equal(m, moment[some]) and output is None
        assert seed == 5 and self.bits == bits
        calls.append((shared, self.rounds))
        return Off(w, sizes[shared])

    monkeypatch.setattr(VectorQuantize, "encode", encode)
    entries = 256 * (2 if bits == 4 else 4)
    # every expert but one has a codebook more, of 8 bits an entry
    price = 8 * entries * (experts - 1) / weight.numel()
    for rounds in (1, 4):
        found = VectorQuantize(bits=bits, rounds=rounds, codebook="auto")
        for share in (0.98, 1.02):
            sizes[False] = 1 / 2 ** (share * price)  # errors fall by a factor of 4 per bit
            own = share > 1 and experts > 1
            assert found.shares(weight, moment, 5) == (not own if experts > 1 else False)
    assert calls == ([(s, r) for r in (1, 2) for _ in range(2) for s in (True, False)]) * (
        experts > 1
    )


def test_own_codebooks_that_cost_next_to_nothing_are_not_weighed() -> None:
    """One of 1024 bytes more for two experts: 0.0039 bits per weight, and 0.0078."""
    moment = torch.zeros(2, 1024, 1024)
    assert VectorQuantize().shares(torch.zeros(2, 1024, 1024), moment, 0) is False
    small = VectorQuantize(rounds=1)
    seen: list[bool] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            VectorQuantize,
            "encode",
            lambda self, w, m, output, shared, seed: seen.append(shared) or Off(w, 1.0),
        )
        assert small.shares(torch.ones(2, 512, 1024), moment, 0) is True
    assert seen == [True, False]


@pytest.mark.parametrize("codebook", ["expert", "layer", "auto"])
@pytest.mark.parametrize("feedback", [True, False])
def test_experts_are_coded_with_the_options_of_the_pass(codebook: str, feedback: bool) -> None:
    weight, moment = drawn(rows=8, columns=12)
    output = torch.eye(8).expand(2, -1, -1) * torch.linspace(1, 5, 8)
    found = VectorQuantize(bits=3, rounds=2, feedback=feedback, codebook=codebook)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VectorQuantize, "shares", lambda self, w, m, seed: seed == 5)
        got, shared = found.best(weight, moment, output, 5)
    assert shared == (codebook != "expert")
    padded, wide = vq.pad_columns(weight, moment)
    want = encode_in_parts(
        padded, wide, output, bits=3, shared=shared, seed=5, rounds=2, feedback=feedback
    )
    for name, value in vars(want).items():
        assert torch.equal(vars(got)[name], value), name


@pytest.mark.parametrize("planned", [None, (3, "expert"), (4, "layer")])
def test_what_vq_stores_and_tells_of_a_projection(planned: tuple[int, str] | None) -> None:
    """Ten columns are padded to 16. A plan goes before the options."""
    experts, rows, columns = 3, 8, 10
    weight, moment = drawn(experts=experts, rows=rows, columns=columns)
    bias = torch.randn(experts, rows)
    mean = slow.draw(2, experts=1, rows=rows, columns=columns, bits=3)
    held = {f"mean_{n}": t for n, t in slow.tensors(mean).items() if n in slow.CODED}
    (p, _) = tiny_program("M").moe_layers()[0].projections
    layer = SimpleNamespace(
        weight=lambda p, part="": {"": weight, "bias": bias}[part],
        stored=lambda p: {"codes": None, **dict.fromkeys(vq4.SHARED), **held},
    )
    moments = SimpleNamespace(of=lambda name: moment, output_of=lambda name: None)
    ctx = Context(seed=3)
    if planned is not None:
        ctx.data["budget"] = {p.path: Planned(*planned, 0, 0, 0.0, 0)}
    bits, codebook = planned or (2, "layer")
    got = VectorQuantize(codebook="layer", rounds=1).code(layer, p, moments, ctx)  # type: ignore[arg-type]
    padded, wide = vq.pad_columns(weight, moment)
    want = encode_in_parts(
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
        found = got[name]
        assert (found is None) == (tensor is None), name
        assert found is None or tensor is None or torch.equal(found, tensor), name
    row = ctx.audit[p.path]
    assert row["codebook"] == codebook
    assert str(Fate.of_json(row["fate"])) == f"vq4 {bits} bit"
    d, lost = want.dense()[..., :columns] - weight, []
    alone = slow.dense({**dict.fromkeys(slow.NAMES), **mean}, columns, input_side=True)
    whole = weight + torch.from_numpy(alone).float()
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
        experts, rows, columns = case.weight.shape
        for c in case.choices((0, 2, 3, 4), (2,), case.cost(2)):
            for bits, error in ((2, 1.0), (3, 0.23), (4, 0.075)):
                for book, books, factor in (("expert", experts, 1.0), ("layer", 1, 1.06)):
                    if codebook in ("auto", book):
                        stored = c.bits + coded_bits(experts, rows, columns, bits, books=books)
                        yield bits, book, c.mean, c.rank, c.cost * error * factor, stored

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
