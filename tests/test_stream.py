"""Running programs: stage by stage, and as exported programs."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import make
from pipelines import Tiny
from torch import Tensor, fx

from moecc.errors import MoeccError
from moecc.ir.graph import run_nodes
from moecc.ir.program import Program, stage_nodes
from moecc.pipeline.stream import (
    StageWeights,
    Stream,
    first_tokens,
    fits_in_memory,
    require_squares,
    run_program,
)

IDS = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(0))


def test_a_program_computes_the_logits_of_its_model(traced: Program) -> None:
    with torch.no_grad():
        want = make("qwen2_moe")(IDS).logits
    torch.testing.assert_close(run_program(traced, [IDS])[0], want, rtol=1e-5, atol=1e-5)


def test_a_stream_taps_without_advancing_and_keeps_values_for_later_stages(
    tiny: Tiny, batches: list[Tensor]
) -> None:
    program = tiny("MD")
    seen: dict[str, list[Tensor]] = {}

    def see(node: fx.Node, value: Tensor, batch: int) -> None:
        seen.setdefault(node.name, []).append(value)

    run_program(program, batches, see)
    stream = Stream(program, batches)
    stream.advance()
    for name in ("linear", "experts"):
        tapped = stream.tap(1, [name])[name]
        assert all(torch.equal(a, b) for a, b in zip(tapped, seen[name], strict=True))
    assert stream.stage == 1
    stream.advance()
    assert set(stream.values[0]) == {"add"} <= stream.needed_after(1)
    with pytest.raises(AssertionError, match="stands before stage 2, not 1"):
        stream.tap(1, ["linear"])
    with pytest.raises(AssertionError, match="has not reached the end"):
        stream.output()


@pytest.mark.parametrize(
    ("weight", "place"),
    [
        ("embed.weight", "the embedding"),
        ("layers.0.down", "layer 0"),
        ("layers.1.linear.weight", "layer 1"),
        ("head.weight", "the head"),
    ],
)
def test_what_is_no_number_is_named_by_its_place(
    weight: str, place: str, tiny: Tiny, batches: list[Tensor]
) -> None:
    program = tiny("MD")
    program.add(weight, torch.full_like(program.read(weight), torch.nan))
    with pytest.raises(MoeccError, match=f"^what {place} gives is NaN: "):
        run_program(program, batches)
    if place == "layer 0":
        stream = Stream(program, batches)
        stream.advance()
        with pytest.raises(MoeccError, match=r"^experts in layer 0 is NaN: "):
            stream.tap(1, ["experts"])


def test_squares_must_add_up_in_float32() -> None:
    require_squares(torch.full((3,), 1e19), "it")
    require_squares(torch.full((3,), 1e4, dtype=torch.float16), "it")  # of itself it could not
    with pytest.raises(MoeccError, match=r"^it has squares of more than float32 holds: "):
        require_squares(torch.full((4,), 1e19), "it")


@pytest.mark.parametrize(("tokens", "count"), [(0, 1), (12, 1), (23, 1), (24, 2), (47, 3), (99, 4)])
def test_so_many_tokens_are_in_so_many_batches(tokens: int, count: int) -> None:
    batches = [torch.full((2, 6), i) for i in range(4)]
    found = first_tokens(batches, tokens)
    assert [int(b[0, 0]) for b in found] == list(range(count))


def test_weights_fit_if_they_are_less_than_half_of_the_room(tiny: Tiny) -> None:
    program = tiny("M")
    experts, router, ends = 4 * (16 * 16 + 16 * 8), 4 * 16, 2 * 16 * 16
    nbytes = 4 * (experts + router + ends)
    for room, fits in ((2 * nbytes + 2, True), (2 * nbytes + 1, False), (0, False)):
        assert fits_in_memory(program, room) is fits


def test_weights_are_read_once_and_may_be_overridden(tiny: Tiny) -> None:
    program, read = tiny("M"), []
    names = {w.name: placeholder for placeholder, w in program.weights.items()}
    reading = program.read
    program.read = lambda name: read.append(name) or reading(name)  # type: ignore[method-assign]
    base, mine = StageWeights(program), torch.zeros(2)
    over = StageWeights.sharing(base, {names["head.weight"]: mine})
    assert over[names["head.weight"]] is mine and not read
    down = over[names["layers.0.down"]]
    assert base[names["layers.0.down"]] is over[names["layers.0.down"]] is down
    assert torch.equal(base[names["head.weight"]], reading("head.weight"))
    assert read == ["layers.0.down", "head.weight"]
    assert list(over) == list(base) == list(program.weights) and len(over) == len(base) == 5


def test_a_node_that_fails_is_named(tiny: Tiny) -> None:
    program = tiny("M")
    values = {"ids": torch.full((1, 6), 99)}  # there is no such token
    weights = {n: program.read(w.name) for n, w in program.weights.items()}
    with pytest.raises(MoeccError, match=r"node %embedding \(aten.embedding\) in stage 0 failed: "):
        list(run_nodes(stage_nodes(program, 0), values, weights))


@pytest.mark.parametrize("which", ["traced", "compressed"])
@torch.no_grad()
def test_exported_programs_run_compile_and_survive_a_file(
    which: str, request: pytest.FixtureRequest
) -> None:
    program: Program = request.getfixturevalue(which)
    exported = program.exported()
    module = exported.module()
    same_logits(module, program, IDS)
    same_logits(torch.compile(module, backend="aot_eager"), program, IDS)
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for ids in (IDS, IDS[:, :5].repeat(2, 1)):
        same_logits(loaded, program, ids)


def same_logits(module: Callable[..., object], program: Program, ids: Tensor) -> None:
    """Assert that an exported module computes the program's logits."""
    want = run_program(program, [ids])[0]
    torch.testing.assert_close(first(module(input_ids=ids)), want, rtol=1e-5, atol=1e-5)


def first(result: Any) -> Tensor:
    """Return the logits of whatever an exported module returns."""
    if isinstance(result, (list, tuple)):
        result = result[0]
    value = result if isinstance(result, Tensor) else result.logits
    assert isinstance(value, Tensor)
    return value


def test_exporting_leaves_the_program_as_it_was(compressed: Program) -> None:
    before = compressed.text()
    compressed.exported()
    assert compressed.text() == before
    compressed.verify()
