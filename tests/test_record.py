"""The record of a finished layer: it restores the same layer, or nothing."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moecc.checkpoint.files import TensorFile, write_safetensors
from moecc.ir.program import Program
from moecc.ir.tensors import Held
from moecc.passes._tune.low_rank import attach
from moecc.pipeline import record
from moecc.pipeline.journal import _differences
from moecc.types import Json

pytestmark = pytest.mark.usefixtures("traced_once")
STAGE = 1


@pytest.fixture
def noted(compressed: Program) -> tuple[Json, dict[str, Tensor]]:
    """The record of the first MoE layer of `compressed`, and its tensors."""
    tensors = record.made(compressed, STAGE, Held())
    return record.describe(compressed, STAGE, tensors), tensors


def test_a_layer_s_record_holds_what_its_passes_made(
    traced: Program, compressed: Program, noted: tuple[Json, dict[str, Tensor]]
) -> None:
    described, tensors = noted
    path = compressed.moe_layers()[0].path
    assert tensors and all(name.startswith(f"{path}.") for name in tensors)
    assert sorted(tensors) == sorted(n for n in compressed.tensors if n.startswith(f"{path}."))
    assert all(torch.equal(t, compressed.tensors[n]) for n, t in tensors.items())
    assert [(n["name"], n["op"]) for n in described["nodes"]] == [
        ("experts", "moecc.vq_experts.default")
    ]
    assert described["rounded"] == [] and len(described["text"]) == 64
    # what was held before the layer ran is not its own
    held = Held(compressed.tensors)
    assert record.made(compressed, STAGE, held) == {}
    some = next(iter(tensors))
    held[some] = tensors[some].clone()
    assert record.made(compressed, STAGE, held).keys() == {some}


def test_a_rounded_weight_is_restored_as_one(traced: Program, tmp_path: Path) -> None:
    program, name = traced.copy(), "model.layers.0.input_layernorm.weight"
    program.rewrite(name, 2 * program.read(name))
    tensors = record.made(program, STAGE, Held())
    assert tensors.keys() == {name}
    described = record.describe(program, STAGE, tensors)
    assert described["rounded"] == [name]
    back = restored(traced, described, tensors, tmp_path / "x.safetensors")
    assert back is not None and back.rounded == {name} and not traced.rounded
    assert torch.equal(back.read(name), program.read(name))
    assert record.describe(program, STAGE, [])["rounded"] == []


def test_a_change_of_another_layer_is_no_change_of_this_one(
    traced: Program, noted: tuple[Json, dict[str, Tensor]], tmp_path: Path
) -> None:
    program = traced.copy()
    name = "model.layers.1.input_layernorm.weight"
    program.add(name, 2 * program.read(name))
    assert restored(program, *noted, tmp_path / "a.safetensors") is not None
    name = "model.layers.0.input_layernorm.weight"
    program.add(name, 2 * program.read(name))
    assert restored(program, *noted, tmp_path / "b.safetensors") is None


@pytest.mark.parametrize("kind", ["codes", "text", "nodes"])
def test_a_record_that_lacks_something_is_no_layer(
    kind: str, traced: Program, noted: tuple[Json, dict[str, Tensor]], tmp_path: Path
) -> None:
    described, tensors = copy.deepcopy(noted[0]), dict(noted[1])
    if kind == "codes":
        del tensors[next(n for n in tensors if n.endswith("gate_up.codes"))]
    else:
        del described[kind]
    with pytest.raises(KeyError):
        restored(traced, described, tensors, tmp_path / "x.safetensors")


def test_spilled_tensors_are_read_from_the_file(
    compressed: Program, noted: tuple[Json, dict[str, Tensor]], tmp_path: Path
) -> None:
    program, tensors = compressed.copy(), noted[1]
    write_safetensors(tmp_path / "x.safetensors", tensors)
    kept = next(iter(tensors))
    record.spill(
        program,
        [n for n in tensors if n != kept] + ["gone"],
        TensorFile(tmp_path / "x.safetensors"),
    )
    assert [n for n in tensors if program.tensors.in_memory(n) is not None] == [kept]
    assert "gone" not in program.tensors
    assert all(torch.equal(program.tensors[n], t) for n, t in tensors.items())
    assert compressed.tensors.in_memory(kept) is not None


def test_a_weight_that_is_computed_from_others_is_recorded_with_them(
    traced: Program, tmp_path: Path
) -> None:
    program = traced.copy()
    placeholder, name = next(
        (k, w.name)
        for k, w in program.weights.items()
        if w.name.endswith("0.self_attn.q_proj.weight")
    )
    attach(program, placeholder, torch.ones(1, 32), torch.ones(32, 1))
    assert record.made(program, STAGE, Held()).keys() == {f"{name}.lora_a", f"{name}.lora_b"}


def test_differences_of_two_runs_are_told_with_both_values() -> None:
    digest = "0123456789abcdef" * 4
    was = {"seed": 0, "text": "", "same": 1, "model": {"hash": digest, "same": 2}, "old": 3}
    now = {"seed": 1, "text": "a", "same": 1, "model": {"hash": digest[::-1], "same": 2}, "new": 4}
    assert _differences(was, now) == (
        "seed was 0, now 1; text was none, now a; hash was 01234567, now fedcba98; "
        "old was 3, now none; new was none, now 4"
    )
    assert _differences(was, was) == ""
    assert _differences({"a": {"b": 1}}, {"a": 2, "c": "x" * 64}) == (
        "a was {'b': 1}, now 2; c was none, now " + "x" * 64
    )
    assert _differences({"a": "f" * 15}, {"a": "f" * 65}) == f"a was {'f' * 15}, now {'f' * 65}"
    assert _differences({"a": "f" * 16}, {"a": 0}) == "a was ffffffff, now 0"


def restored(
    program: Program, noted: Json, tensors: dict[str, Tensor], file: Path
) -> Program | None:
    write_safetensors(file, tensors)
    return record.restore(program, STAGE, noted, TensorFile(file))


def test_a_recorded_layer_is_restored_as_it_was(
    traced: Program, compressed: Program, noted: tuple[Json, dict[str, Tensor]], tmp_path: Path
) -> None:
    before = traced.text()
    program = restored(traced, *noted, tmp_path / "x.safetensors")
    assert program is not None
    assert program.text(STAGE) == compressed.text(STAGE) != traced.text(STAGE)
    assert traced.text() == before
    program.verify()


def test_a_layer_that_differs_from_its_record_is_not_restored(
    traced: Program, noted: tuple[Json, dict[str, Tensor]], tmp_path: Path
) -> None:
    described, tensors = noted
    wrong_gate, wrong_digest = copy.deepcopy(described), copy.deepcopy(described)
    wrong_gate["nodes"][0]["kwargs"]["act"] = "gelu"
    wrong_digest["text"] = "0" * 64
    name = next(n for n in tensors if n.endswith("gate_up.codes"))
    other_codes = {**tensors, name: tensors[name] ^ torch.ones(1, dtype=torch.uint8)}
    for i, (what, held) in enumerate(
        [(wrong_gate, tensors), (wrong_digest, tensors), (described, other_codes)]
    ):
        assert restored(traced, what, held, tmp_path / f"{i}.safetensors") is None
