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
from moecc.pipeline.stream import Stream, run_program

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
