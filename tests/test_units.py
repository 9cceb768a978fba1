"""Units of coding: what they are coded to, however experts are put together, wherever they run."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from coders import BITS, costs, from_blocks, in_blocks
from conftest import tiny_batches, tiny_program
from made import flip
from pipelines import compiled, derive, resolved
from torch import Tensor

from moecc.ir import vq4
from moecc.ir.program import Program
from moecc.ir.tensors import CPU
from moecc.passes import affine, vq
from moecc.passes._code import units
from moecc.passes._code.codebooks import Book, kmeans, rounded
from moecc.passes._code.coded import pad_columns
from moecc.passes._code.coding import encode
from moecc.passes._code.metric import damping, weighted_error
from moecc.passes._code.moments import Common, Expert, Seen
from moecc.passes._code.units import Settings, Unit, begin, code, fit, join
from moecc.passes.vq import Job
from moecc.pipeline.journal import Journal
from moecc.pipeline.passes import Context, Layer, LayerPass, Pass
from moecc.pipeline.run import Hooks, run_passes
from moecc.pipeline.work import BLOCK
from moecc.pipeline.workers.base import Alone
from moecc.pipeline.workers.packed import Packed


def experts(
    count: int, *, rows: int = 8, columns: int = 12, cost: bool = False, block: int = BLOCK
) -> list[Expert]:
    """Return experts with a gate_up of `rows` rows, each with tokens of its own.

    block: rows whose errors count together.
    """
    g = torch.Generator().manual_seed(1)
    a = dict(act="silu", gate="glu", alpha=0.0, limit=0.0)
    x = torch.randn(count, 3 * columns, columns, generator=g) * torch.linspace(0.3, 2, columns)
    up = torch.randn(count, rows, columns, generator=g)
    down = torch.randn(count, columns, rows // 2, generator=g)
    sensitivity = from_blocks(costs(1.0, rows=columns))[0] if cost else None
    common = Common(a, torch.eye(columns), sensitivity, block)
    seen = [Seen(tokens, torch.rand(len(tokens), generator=g)) for tokens in x]
    return [Expert(common, "e", s, s, up[e], down[e], None) for e, s in enumerate(seen)]


def unit(
    some: Sequence[Expert], projection: str = "gate_up", taken: float = 0.0, **settings: Any
) -> Unit:
    """Return a unit of these experts, of whose weights a share has been taken out."""
    weight = torch.stack([e.weight(projection) for e in some]) * (1 - taken)
    given = dict(bits=2, shared=False, rounds=1, feedback=True, seed=5) | settings
    return Unit(projection, tuple(e.bare(projection) for e in some), weight, Settings(**given))


def begun(made: Unit, common: Common) -> Book:
    """Return the codebook that units begin with, from all experts of one."""
    if made.settings.shared:
        return fit(made, common)
    each = [
        replace(made, experts=(e,), stored=made.stored[i : i + 1])
        for i, e in enumerate(made.experts)
    ]
    count, rows, columns = made.stored.shape
    return begin(Alone(), each, made.settings, (count, rows, vq4.padded(columns)), common)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """Assert that two units are coded to the same bits."""
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype and torch.equal(tensor, b[name]), name


# ---- one unit


@pytest.mark.parametrize("projection", ["gate_up", "down"])
@pytest.mark.parametrize(("cost", "block"), [(False, BLOCK), (True, BLOCK), (True, 4)])
@pytest.mark.parametrize(
    "settings", [dict(bits=3, rounds=2), dict(shared=True), dict(bits=4, feedback=False)]
)
def test_a_unit_is_coded_under_the_metric_of_its_experts(
    projection: str, cost: bool, block: int, settings: dict[str, Any]
) -> None:
    """The error is that of the whole weight's output, of which this may be what is left."""
    some = experts(3, cost=cost, block=block)
    made, common = unit(some, projection, 0.75, **settings), some[0].common
    moment = torch.stack([e.moment(projection) for e in some])
    outputs = [e.output(projection) for e in some]
    blocks = {BLOCK: 1, 4: {"gate_up": 2, "down": 3}[projection]}[block]
    assert [0 if o is None else len(o) for o in outputs] == [blocks * cost] * 3
    output = torch.stack([o for o in outputs if o is not None]) if cost else None
    assert torch.equal(made.metric(common)[0], moment)
    padded, wide = pad_columns(made.weight, moment)
    want = encode(padded, wide, output, **{**vars(made.settings)})
    got = code(made, common)
    stored = {n: t for n, t in want.stored().items() if t is not None}
    lost = got.pop("lost")
    same(got, {**stored, "scale": want.scale})
    assert got["scale"].dtype == torch.float32
    d = want.dense()[..., : made.weight.shape[-1]] - made.weight
    for e, expert in enumerate(some):
        error, whole = (
            sum(float(row @ moment[e].double() @ row) for row in w.double())
            for w in (d[e], expert.weight(projection))
        )
        assert float(lost[e]) == pytest.approx(error / whole, rel=1e-4)


def test_the_error_of_a_unit_is_a_share_of_its_output_and_at_most_all_of_it() -> None:
    """What is left of an expert that is next to nothing, or of one of zeros, may be far more."""
    some = experts(3)
    some[1] = replace(some[1], gate_up=1e-6 * some[1].gate_up)
    some[2] = replace(some[2], gate_up=torch.zeros_like(some[2].gate_up))
    made = replace(unit(some), stored=experts(3)[0].gate_up.expand(3, -1, -1).clone())
    lost = code(made, some[0].common)["lost"].tolist()
    assert 0 < lost[0] < 0.5 and lost[1] == 1 and lost[2] == 1
    zeros = replace(unit(some[2:]), stored=torch.zeros(1, 8, 12))
    assert code(zeros, some[0].common)["lost"].tolist() == [0]


# ---- many units


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("cost", "block"), [(False, BLOCK), (True, BLOCK), (True, 8)])
@pytest.mark.parametrize("shared", [False, True])
def test_experts_are_coded_to_the_same_in_units_of_any_size(
    bits: int, cost: bool, block: int, shared: bool
) -> None:
    """They begin with one book; a shared one is used as it is."""
    some = experts(6, rows=16, cost=cost, block=block)
    common = some[0].common
    book = begun(unit(some[::2], bits=bits, shared=shared), common)
    found = []
    for size in (1, 2, 4, 6):
        parts = [
            code(replace(unit(some[i : i + size], bits=bits, shared=shared), book=book), common)
            for i in range(0, 6, size)
        ]
        found.append(join(parts, shared=shared))
    for other in found[1:]:
        same(found[0], other)
    assert len(found[0]["codes"]) == len(found[0]["lost"]) == 6
    assert len(found[0]["codebook"]) == (1 if shared else 6)
    assert not shared or torch.equal(found[0]["codebook"], book.integers.to(torch.int8))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("most", [1 << 14, 100])
@pytest.mark.parametrize("columns", [32, 28])
def test_units_begin_with_the_codebook_of_kmeans_over_all_experts_of_a_sample(
    bits: int, most: int, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though each expert gives no more than the groups of weights that k-means looks at."""
    monkeypatch.setattr("moecc.passes._code.codebooks._SAMPLE", most)
    some = experts(3, rows=64, columns=columns)
    common, made = some[0].common, unit(some, bits=bits)
    weight, moment = pad_columns(made.weight, made.metric(common)[0])
    importance = moment.diagonal(dim1=-2, dim2=-1)
    importance = importance + damping(importance)
    size = weight.square().mean(-1, keepdim=True).sqrt()
    importance = importance / importance.mean(-1, keepdim=True)
    want = rounded(kmeans(weight / size, importance, bits=bits, seed=5, turns=15), bits)
    got = begun(made, common)
    torch.testing.assert_close(got.integers, want.integers, rtol=0, atol=1)
    torch.testing.assert_close(got.step, want.step, rtol=1e-5, atol=0)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("cost", [False, True])
def test_a_shared_codebook_of_a_sample_serves_all(
    bits: int, cost: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is fitted to evenly spaced rows, here to every second one."""
    some = experts(12, rows=256, columns=32, cost=cost)
    weight, common = torch.stack([e.gate_up for e in some]), some[0].common
    together = code(unit(some, bits=bits, shared=True, rounds=3), common)
    monkeypatch.setattr(units, "JOINTLY", weight.numel() // 3)
    book = fit(unit(some[::2] + some[9:], bits=bits, shared=True, rounds=3), common)
    alone = [unit([e], bits=bits, shared=True, rounds=3) for e in some]
    got = join([code(replace(u, book=book), common) for u in alone], shared=True)
    metric = unit(some).metric(common)
    errors = [
        float(weighted_error(decoded(found, 32) - weight, *metric).sum())
        for found in (together, got)
    ]
    assert errors[1] < 1.1 * errors[0]


def decoded(found: dict[str, Tensor], columns: int) -> Tensor:
    """Return the weights of coded experts."""
    values = vq4.decode(
        found["codes"], found.get("signs"), found["codebook"], columns, torch.float32
    )
    return values * found["scale"].unsqueeze(-1)


@pytest.mark.parametrize(("numel", "block"), [(1, BLOCK), (5, BLOCK), (8, BLOCK), (5, 4)])
def test_a_shared_codebook_begins_with_as_many_rows_as_can_be_coded_together(
    numel: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every second, every third of each block of costs: those whose weights fit."""
    some = experts(8, rows=12, columns=16, cost=True, block=block)
    made = unit(some, bits=3, shared=True, rounds=2)
    common = some[0].common
    moment, output = made.metric(common)
    monkeypatch.setattr(units, "JOINTLY", numel * 12 * 16)
    assert output is not None
    step, blocks = {1: 8, 5: 2, 8: 1}[numel], output.shape[1]
    assert blocks == (1 if block == BLOCK else 3)
    rows = [n for n in range(12) if n // blocks % step == 0]
    want = encode(
        made.weight[:, rows],
        moment,
        in_blocks(from_blocks(output)[:, rows][:, :, rows], blocks),
        **{**vars(made.settings)},
    )
    book = fit(made, common)
    assert torch.equal(book.integers, want.codebook) and book.step.shape == (1, 1)
    size = made.weight[:, rows].square().mean(-1).sqrt()
    assert float(book.step) == pytest.approx(float((want.scale / size).median()), rel=1e-5)


@pytest.mark.parametrize("shared", [False, True])
def test_a_beginning_with_experts_that_see_nothing_serves_all(shared: bool) -> None:
    """Second moments of zero, as of units that no token activates: all columns count alike."""
    some = experts(4)
    common = replace(some[0].common, average=torch.zeros(12, 12))
    dead = [replace(e, seen=Seen(e.seen.x * 0, None)) for e in some[:2]]
    assert not dead[0].under(common).moment("gate_up").any()
    book = begun(unit([*dead, *some[2:]], shared=shared), common)
    assert bool(book.integers.isfinite().all() and book.step.isfinite().all())
    for e in [*dead, *some[2:]]:
        found = code(replace(unit([e], shared=shared), book=book), common)
        error = decoded(found, 12)[0] - e.gate_up
        assert float(error.square().sum() / e.gate_up.square().sum()) < 0.3


@pytest.mark.parametrize("how", ["pickled", "packed"])
@pytest.mark.parametrize(("cost", "block"), [(False, BLOCK), (True, BLOCK), (True, 4)])
def test_a_unit_is_coded_to_the_same_in_another_process(how: str, cost: bool, block: int) -> None:
    """Whether or not a matrix of it is computed already."""
    some = experts(6, cost=cost, block=block)
    common = some[0].common

    def sent(value: Any) -> Any:
        return pickle.loads(pickle.dumps(value)) if how == "pickled" else arrived(value)

    for made in (unit(some[2:4]), unit(some[2:4], shared=True, bits=3)):
        fresh = replace(made, experts=tuple(replace(e, made={}) for e in made.experts))
        book, other = begun(made, common), begun(sent(fresh), sent(common))
        assert torch.equal(book.integers, other.integers) and torch.equal(book.step, other.step)
        want = code(replace(made, book=book), common)
        for again in (fresh, made):
            same(want, code(sent(replace(again, book=book)), sent(common)))


@pytest.mark.parametrize("sensitive", [True, False])
@pytest.mark.parametrize("projection", ["gate_up", "down"])
def test_a_unit_carries_nothing_of_other_experts_and_what_all_share_only_once(
    projection: str, sensitive: bool
) -> None:
    """Matrices travel in the type that they are stored in, and down where it matters."""
    some = experts(40, cost=sensitive)
    up, down = (torch.stack([getattr(e, n) for e in some]).bfloat16() for n in ("gate_up", "down"))
    made = [replace(e, gate_up=up[i], down=down[i]) for i, e in enumerate(some)]
    stored = torch.stack([getattr(e, projection) for e in made[2:4]])
    tensors = Packed.of(replace(unit(made[2:4], projection), stored=stored)).tensors
    matrices = 2 * (8 * 12 + 8 * 12)
    if projection == "down":
        matrices = 2 * (12 * 4 + 8 * 12 + 12 * 4)
    elif sensitive:
        matrices += 2 * 12 * 4
    tokens = 2 * (36 * 12 + 36)
    assert sum(t.nbytes for t in tensors) == 2 * matrices + 4 * tokens
    assert not any(t.shape == (12, 12) for t in tensors)


def arrived(value: Any) -> Any:
    """Return an object as a worker gets it."""
    return Packed.of(value).copy().unpacked()


# ---- the units of a layer


@pytest.mark.parametrize(
    ("shared", "at_once", "jointly", "parts"),
    [
        (False, 1, 10**9, [1] * 5),
        (False, 2 * 128, 1, [2, 2, 1]),
        (False, 3 * 128 - 1, 1, [2, 2, 1]),
        (False, 5 * 128, 1, [5]),
        (True, 1, 5 * 128, [5]),
        (True, 2 * 128, 5 * 128 - 1, [2, 2, 1]),
    ],
)
def test_a_projection_is_divided_into_units_of_whole_experts(
    monkeypatch: pytest.MonkeyPatch, shared: bool, at_once: int, jointly: int, parts: list[int]
) -> None:
    """All that share a codebook are one, if they fit; a single one makes its own book."""
    monkeypatch.setattr(vq, "AT_ONCE", at_once)
    monkeypatch.setattr(vq, "JOINTLY", jointly)
    monkeypatch.setattr(vq, "_SAMPLED_EXPERTS", 3)
    weight, some = torch.randn(5, 8, 16), experts(5, columns=16)
    members = {"value": lambda self, node, experts: weight[list(experts)], "device": CPU}
    layer: Any = type("L", (), {"program": type("G", (), members)()})()
    moments: Any = type(
        "M",
        (),
        {
            "expert": lambda self, e: some[e],
            "tokens": torch.ones(len(some)),
            "common": some[0].common,
        },
    )()
    sizes = {"shape": (5, 8, 16), "weights": 5 * 128, "operand": lambda self: "a node"}
    p: Any = type("P", (), {"path": "a.gate_up", "name": "gate_up", **sizes})()
    job = Job(layer, p, moments, Settings(2, shared, 1, True, 0))
    names, made = zip(*((name, make()) for name, make in job.units()), strict=True)
    ends = [sum(parts[: i + 1]) for i in range(len(parts))]
    assert list(names) == [f"a.gate_up {b - n}-{b - 1}" for n, b in zip(parts, ends, strict=True)]
    assert [len(u.experts) for u in made] == parts
    seen = [e.gate_up for u in made for e in u.experts]
    assert all(a is e.gate_up for a, e in zip(seen, some, strict=True))
    assert torch.equal(torch.cat([u.weight for u in made]), weight)
    assert {(u.projection, u.settings, u.book) for u in made} == {("gate_up", job.settings, None)}
    job.begin(Alone())
    if len(parts) == 1:
        assert job.book is None
        return
    want = begun(replace(made[0], experts=tuple(some[::2]), stored=weight[::2]), some[0].common)
    assert job.book is not None and torch.equal(job.book.integers, want.integers)
    assert {id(u().book) for _, u in job.units()} == {id(job.book)}


def test_books_begin_with_evenly_spaced_experts_that_see_tokens() -> None:
    tokens = torch.zeros(30, dtype=torch.int64)
    for seen, some in (
        (range(30), [0, 4, 8, 12, 16, 20, 24, 29]),
        (range(1, 30, 2), [1, 5, 9, 13, 17, 21, 25, 29]),
        ([7, 9], [7, 9]),
        ([], [0, 4, 8, 12, 16, 20, 24, 29]),
    ):
        moments: Any = SimpleNamespace(tokens=tokens.clone())
        moments.tokens[list(seen)] = 5
        assert vq.sample(moments) == some


@pytest.mark.parametrize("text", ["vq{bits=3,rounds=2}", "klt{rank=2,mean=3},vq,affine{offset=on}"])
def test_a_layer_is_stored_the_same_in_units_of_any_size(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = []
    for size in (1, 2, 3):
        monkeypatch.setattr(vq, "AT_ONCE", size * 16 * 8)  # of down; half as many of gate_up
        run = compiled(tiny_program("MM"), text, batches=tiny_batches())
        stored.append((run.program.text(), run.ctx.audit))
    assert stored[0] == stored[1] == stored[2]


# ---- units that an interrupted run kept


class Counted(Alone):
    """Notes the units that are run, and stops before one more than `most`."""

    def __init__(self, most: int = 10**9) -> None:
        self.most, self.ran = most, 0

    def run(
        self, function: Callable[..., Any], units: Iterable[Any], shared: object = None
    ) -> Iterator[Any]:
        def noted() -> Iterator[Any]:
            for unit in units:
                if function is code:
                    self.ran += 1
                    if self.ran > self.most:
                        raise KeyboardInterrupt
                yield unit

        return super().run(function, noted(), shared)


def kept(folder: Path) -> list[Path]:
    return sorted(folder.glob("kept-*"))


def run(folder: Path, workers: Counted, said: list[str]) -> tuple[Program, Context]:
    """Run `vq` over two layers of four experts each, with a journal."""
    program, journal = tiny_program("MM"), Journal(folder, {}, said.append, [{}, {}])
    ctx = Context(keep=journal.keep, kept=journal.kept, workers=workers)
    hooks = Hooks(
        before_group=journal.begin, after_layer=journal.save, restore_layer=journal.restore
    )
    run_passes(program, resolved("vq{rounds=1}"), ctx, tiny_batches(), hooks)
    return program, ctx


def test_an_interrupted_layer_goes_on_with_the_units_that_are_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each expert is a unit; eight make a layer. A damaged one is made again, and this is said."""
    monkeypatch.setattr(vq, "AT_ONCE", 1)
    said: list[str] = []
    program, ctx = run(tmp_path / "whole", whole := Counted(), said)
    assert whole.ran == 16 and said == [] and kept(tmp_path / "whole") == []

    folder = tmp_path / "journal"
    with pytest.raises(KeyboardInterrupt):
        run(folder, Counted(5), said)
    names = [f"kept-0-unit%20layers.0.gate_up%20{e}-{e}.safetensors" for e in range(4)]
    names.append("kept-0-unit%20layers.0.down%200-0.safetensors")
    assert [file.name for file in kept(folder)] == sorted(names)

    damaged = folder / names[2]
    damaged.write_bytes(flip(damaged.read_bytes()))
    with pytest.raises(KeyboardInterrupt):
        run(folder, Counted(1 + 3 + 2), said)  # the layer is finished, and the next one begun
    assert said == [f"note: {damaged} does not match its digest; its work is done again"]
    there = [f"kept-0-unit%20layers.1.gate_up%20{e}-{e}.safetensors" for e in range(2)]
    assert [file.name for file in kept(folder)] == there

    said.clear()
    again, found = run(folder, last := Counted(), said)
    assert last.ran == 6 and said == [] and kept(folder) == []
    assert again.text() == program.text()
    assert (found.audit, found.notes) == (ctx.audit, ctx.notes)


def test_units_are_kept_until_the_layer_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that ends just before goes on without running any again."""
    monkeypatch.setattr(vq, "AT_ONCE", 1)
    saved, save = [False], Journal.save

    def stopping(self: Journal, *args: Any) -> None:
        if not saved[0]:
            raise KeyboardInterrupt
        save(self, *args)

    monkeypatch.setattr(Journal, "save", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Counted(), [])
    assert len(kept(tmp_path)) == 8
    saved[0] = True
    run(tmp_path, workers := Counted(), [])
    assert workers.ran == 8 and kept(tmp_path) == []


# ---- units of corrections


@pytest.mark.parametrize("sensitive", [True, False])
def test_a_correction_is_fitted_to_the_same_in_another_process(sensitive: bool) -> None:
    """A unit holds what is stored for its expert and nothing of the others."""
    seen: list[affine.Unit] = []
    shared: list[Common | None] = []

    def run_layer(self: Pass, layer: Layer, ctx: Context) -> bool:
        for moe in layer.moe:
            made = affine._Units(layer, moe)
            fit = affine.AffineCorrection().fit(layer, moe, ctx.workers)["gate_up"]
            seen.extend((*made.each(), *made.each(fit)))
            shared.append(made.common)
        return False

    def run(self: Pass, program: Program, ctx: Context) -> bool:
        ctx.data["sensitivity"] = {"layers.0": costs(1.0, rows=16)[0, 0]} if sensitive else {}
        return False

    first, look = derive(Pass, "costs", run=run), derive(LayerPass, "look", run_layer=run_layer)
    passes = [first, *resolved("klt{rank=2,mean=3},vq{bits=3,rounds=1}"), look]
    run_passes(tiny_program("I"), passes, Context(), tiny_batches())
    assert len(seen) == 2 * 64 and [u.fit is not None for u in seen] == [False] * 64 + [True] * 64
    for made in seen[::16]:
        want = affine.regress(made, shared[0])
        got = affine.regress(arrived(made), arrived(shared[0]))
        assert (want.coded, want.slope, want.both) == (got.coded, got.slope, got.both)
        for offset in (True, False):
            pairs = zip(want.lines[offset], got.lines[offset], strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)
        # 64 experts have 24 KiB of float weights alone
        sizes = [t.nbytes for t in Packed.of(made).tensors]
        assert sum(sizes) < 24 << 10
