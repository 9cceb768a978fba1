"""What a run hands to passes: seeds, kept work, and the tensors of a layer."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from conftest import tiny_batches
from pipelines import derive, resolved
from torch import Tensor

from moecc.errors import MoeccError
from moecc.ir import ops, vq4
from moecc.ir.program import Program
from moecc.pipeline.fate import Fate
from moecc.pipeline.parse import find_pass, parse_passes
from moecc.pipeline.passes import Context, Kept, Layer, LayerPass, Pass
from moecc.pipeline.run import run_passes
from moecc.pipeline.stream import Stream
from moecc.pipeline.workers.base import Alone


def test_a_seed_is_six_bytes_of_the_digest_of_its_key() -> None:
    digest = hashlib.sha256(b"7/vq/layers.0/3").digest()
    assert Context(7).seed_for("vq", "layers.0", 3) == sum(
        byte << 8 * (5 - i) for i, byte in enumerate(digest[:6])
    )
    assert Context(8).seed_for("vq") != Context(7).seed_for("vq") != Context(7).seed_for("vr")


def test_work_is_done_once_and_kept_under_its_key() -> None:
    kept: dict[str, Kept] = {}
    made, other = Kept(facts="made"), Kept(facts="on disk")

    def keep(key: str, work: Kept) -> Kept:
        kept[key] = work
        return other

    ctx = Context(keep=keep, kept=kept.get)
    assert ctx.once("a", lambda: made) is other and kept == {"a": made}
    assert ctx.once("a", lambda: pytest.fail("made twice")) is made
    plain = Context()
    assert plain.once("a", lambda: made) is made is plain.once("a", lambda: made)


def squared(unit: int, more: int = 0) -> dict[str, Tensor]:
    """A unit of work whose result is its square."""
    return {"square": torch.tensor(unit * unit + more)}


def test_only_units_that_no_run_has_kept_are_made_and_all_come_in_order() -> None:
    """A unit is made when it is due, and its result is kept before it is given."""
    kept = {"unit b": Kept(squared(7))}
    log: list[str] = []

    def keep(key: str, work: Kept) -> Kept:
        log.append(f"keep {key}")
        kept[key] = Kept({"square": work.tensors["square"] + 100})  # as it is on disk
        return kept[key]

    def unit(number: int) -> int:
        log.append(f"make {number}")
        return number

    ctx = Context(keep=keep, kept=kept.get)
    units = [(name, partial(unit, i)) for i, name in enumerate("abcd")]
    results = ctx.results(squared, units, 1)
    assert log == []
    first = next(results)
    assert int(first["square"]) == 101 and log == ["make 0", "keep unit a"]
    assert [int(r["square"]) for r in results] == [49, 105, 110]
    assert log[2:] == ["make 2", "keep unit c", "make 3", "keep unit d"]
    log.clear()
    assert [int(r["square"]) for r in ctx.results(squared, units, 1)] == [101, 49, 105, 110]
    assert log == []


def test_units_are_run_by_the_workers_of_the_run() -> None:
    """What all share is given once; without any, the function takes a unit alone."""
    asked: list[tuple[object, list[int], object]] = []

    class Noted(Alone):
        def run(
            self, function: Callable[..., Any], units: Iterable[Any], shared: object = None
        ) -> Iterator[Any]:
            units = list(units)
            asked.append((function, units, shared))
            return super().run(function, units, shared)

    ctx = Context(workers=Noted())
    units = [(str(i), partial(int, i)) for i in (3, 4)]
    for shared, want in ((None, [9, 16]), (5, [14, 21])):
        assert [int(r["square"]) for r in ctx.results(squared, units, shared)] == want
    assert asked == [(squared, [3, 4], None), (squared, [3, 4], 5)]


def test_facts_of_a_weight_add_up() -> None:
    ctx = Context()
    ctx.record("w", fate=Fate("grouped", bits=4, group=16), error=0.5)
    ctx.record("w", error=0.25, by=[1, "a"])
    fate = {"kind": "grouped", "bits": 4, "group": 16}
    for odd in (float("inf"), {1, 2}):
        with pytest.raises(MoeccError) as error:
            ctx.record("w", more=odd, by=1)
        said = str(error.value)
        assert said.startswith("w: can't record ['by', 'more'] (")
        assert said.endswith("); give finite numbers, text, lists or dicts")
    assert ctx.audit == {"w": {"fate": fate, "error": 0.25, "by": [1, "a"]}}


def test_a_layer_gives_the_tensors_of_the_program_and_of_the_float_model(
    tiny: Callable[[str], Program], batches: list[Tensor]
) -> None:
    program = tiny("MM")
    moe = program.moe_layers()[1]
    bias = program.add("layers.1.down_bias", torch.ones(4, 16))
    program.replace(moe.node, ops.EXPERTS, (*moe.node.args[:6], bias, None), moe.attributes)
    reference = program.copy()
    program.add("layers.1.down", 2 * program.read("layers.1.down"))
    program.add("layers.1.down_bias", torch.full((4, 16), 3.0))
    layer = Layer(2, program, reference, Stream(program, batches), Stream(reference, batches))
    (moe,) = layer.moe
    assert moe.path == "layers.1"
    first = reference.read("layers.1.down")
    weight, original = layer.weight(moe.down), layer.original(moe.down)
    assert weight is not None and torch.equal(weight, 2 * first)
    assert original is not None and torch.equal(original, first)
    for get, whole in ((layer.weight, weight), (layer.original, original)):
        some = get(moe.down, experts=[3, 1])
        assert some is not None and torch.equal(some, whole[[3, 1]])
        one = get(moe.down, "bias", [2])
        assert one is not None and one.shape == (1, 16)
        assert get(moe.gate_up, "bias", [2]) is None
    shift, before = layer.weight(moe.down, "bias"), layer.original(moe.down, "bias")
    assert shift is not None and before is not None
    assert float(shift.mean()) == 3 and float(before.mean()) == 1
    assert layer.weight(moe.gate_up, "bias") is None and layer.original(moe.gate_up, "bias") is None


def test_a_layer_gives_the_stored_tensors_of_coded_experts(
    tiny: Callable[[str], Program], batches: list[Tensor]
) -> None:
    program = tiny("M")
    reference = program.copy()
    run_passes(program, resolved("vq{rounds=1,bits=3}"), Context(), batches)
    layer = Layer(1, program, reference, Stream(program, []), Stream(reference, []))
    found = layer.stored(layer.moe[0].down)
    assert tuple(found) == vq4.TENSORS
    there = {name: t for name, t in found.items() if t is not None}
    assert there.keys() == {"codes", "signs", "codebook", "scale"}
    for name, t in there.items():
        assert torch.equal(t, program.read(f"layers.0.down.{name}"))
    original = layer.original(layer.moe[0].down)
    assert original is not None and torch.equal(original, reference.read("layers.0.down"))


def test_the_float_model_goes_through_the_layers_only_for_who_asks(
    tiny: Callable[[str], Program],
) -> None:
    """Whoever asks in a later layer, finds it behind that one; and before a head."""
    wanted = Stream(tiny("MM").copy(), tiny_batches())
    stages: list[int] = []

    def look(self: Pass, layer: Layer, ctx: Context) -> bool:
        stages.append(layer.unmoved.stage)
        if layer.index != 1:
            targets = layer.targets
            while wanted.stage < min(layer.index + 1, 3):
                wanted.advance()
            assert targets is layer.targets and targets.stage == wanted.stage
            for found, want in zip(targets.values, wanted.values, strict=True):
                assert found.keys() == want.keys()
                for name, value in want.items():
                    assert torch.equal(found[name], value)  # type: ignore[arg-type]
        return False

    run_passes(tiny("MM"), [derive(LayerPass, "look", run_layer=look)], Context(), tiny_batches())
    assert stages == [0, 0, 3]


@pytest.mark.parametrize("broken", ["model", "pass"])
def test_a_layer_that_gives_no_numbers_is_the_fault_of_the_model_or_of_a_pass(
    tiny: Callable[[str], Program], broken: str
) -> None:
    """Layer 0 overflows at once, or once a pass has changed them."""

    def spoil(program: Program) -> None:
        program.add("layers.0.down", torch.full((4, 16, 8), 3e38))

    def run_layer(self: Pass, layer: Layer, ctx: Context) -> bool:
        if broken == "pass" and layer.index == 1:
            spoil(layer.program)
        return True

    program = tiny("M")
    if broken == "model":
        spoil(program)
    passes = [derive(LayerPass, "rewrite", run_layer=run_layer)]
    says = {
        "model": "^what layer 0 gives is NaN: the model's own numbers",
        "pass": "^layer 0 no longer runs behind rewrite: what layer 0 gives is NaN",
    }
    with pytest.raises(MoeccError, match=says[broken]):
        run_passes(program, passes, Context(), tiny_batches())


# ---- composites


def test_a_composite_passes_on_the_options_that_it_lacks() -> None:
    (composite,) = parse_passes("kbvq{rounds=8,min_tokens=3}", bits=3)[0]
    assert str(composite) == "kbvq{bits=3,rounds=8,min_tokens=3}"
    texts = [str(p) for p in composite.expand()]  # type: ignore[attr-defined]
    assert "moments{min_tokens=3}" in texts and "vq{bits=3,rounds=8}" in texts
    own = find_pass("kbvq").build_from("bits=2,rounds=8", {"bits": 4, "rank": 5})
    assert str(own) == "kbvq{rank=5,rounds=8}"
    with pytest.raises(MoeccError, match="kbvq stands for"):
        own.run(None, Context())  # type: ignore[arg-type]


# ---- fates


@pytest.mark.parametrize(
    ("fate", "says", "as_json"),
    [
        (Fate("kept"), "as it was", {}),
        (Fate("rewritten"), "rewritten", {}),
        (Fate("coded", bits=3, format="vq4"), "vq4 3 bit", {"bits": 3, "format": "vq4"}),
        (Fate("grouped", bits=4, group=16), "4 bit, groups of 16", {"bits": 4, "group": 16}),
        (Fate("part", of="a"), "in a", {"of": "a"}),
        (Fate("tied", of="a"), "tied to a", {"of": "a"}),
        (Fate("unused"), "left out", {}),
        (Fate("header"), "names, shapes and types", {}),
    ],
)
def test_a_fate_is_words_and_json(fate: Fate, says: str, as_json: dict[str, object]) -> None:
    assert str(fate) == says and fate.as_json() == {"kind": fate.kind, **as_json}
    assert Fate.of_json(fate.as_json()) == fate


def test_a_fate_of_no_kind_is_refused() -> None:
    kinds = "kept, rewritten, coded, grouped, part, tied, unused, header"
    with pytest.raises(ValueError, match=f"^no fate 'lost'; there are {kinds}$"):
        Fate("lost")
