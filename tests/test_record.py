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
from moecc.pipeline import record
from moecc.types import Json

pytestmark = pytest.mark.usefixtures("traced_once")
STAGE = 1


@pytest.fixture
def noted(compressed: Program) -> tuple[Json, dict[str, Tensor]]:
    """The record of the first MoE layer of `compressed`, and its tensors."""
    tensors = record.made(compressed, STAGE, Held())
    return record.describe(compressed, STAGE, tensors), tensors


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
    got, want = (sorted(p.text(STAGE).splitlines()) for p in (program, compressed))
    assert got == want != sorted(traced.text(STAGE).splitlines())
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
