"""Weights and activations of any size: coded as at an ordinary size, or refused in a sentence."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import tiny_batches, tiny_program
from pipelines import Run, compiled, expert_errors
from refusals import Refused, edit_tensors
from torch import Tensor

from moecc.errors import MoeccError

torch.set_num_threads(1)

KLT = "klt{rank=2,mean=3},vq,affine{offset=on},fold"
RILQ = "kbvq,rilq{steps=2},merge"
VSRAQ = "vsraq{steps=2},kbvq"
BUDGET = "kbvq{bits=3.5}"


@cache
def run(pipeline: str, part: str = "", size: float = 1.0) -> Run:
    """Compile a tiny program, the weights with `part` in their names `size` times as large."""
    program = tiny_program("MD")
    held = program.store.tensors  # type: ignore[union-attr]
    for name in [n for n in held if part and part in n]:
        held[name] = held[name] * size
    return compiled(program, pipeline, batches=tiny_batches())


@pytest.mark.parametrize("size", [1e-10, 1e10, 1e14])
@pytest.mark.parametrize("pipeline", [KLT, RILQ])
def test_experts_of_other_units_are_coded_as_well(pipeline: str, size: float) -> None:
    """The output is linear in down, so the share that coding loses is the same in any unit."""
    wanted, found = (expert_errors(run(pipeline, *how)) for how in ((), ("down", size)))
    for path, errors in wanted.items():
        assert min(errors) > 0
        assert sum(found[path]) == pytest.approx(sum(errors), rel=0.2), path


OUTPUT = r"failed in layer 0.*: layers\.0\.{}: squared errors of its output may reach {}"
GRADIENTS = "sensitivity failed: the output of layer 1: squared gradients of kl there reach inf"
NAN = "{} is NaN: the model's own numbers leave the range of float32; check its weights"
LARGE = [
    ("gate_up", 1e14, KLT, OUTPUT.format("down", "inf")),
    ("gate_up", 1e14, RILQ, OUTPUT.format("down", "inf")),
    ("gate_up", 1e14, VSRAQ, OUTPUT.format("gate_up", r"8e\+60")),
    ("gate_up", 1e14, BUDGET, r"budget.* failed.*squared errors of its output may reach 8e\+60"),
    ("embed", 1e20, KLT, OUTPUT.format("gate_up", "inf")),
    ("embed", 1e20, "dense{group=16}", NAN.format("what layer 0 gives")),
    ("embed", 1e20, BUDGET, NAN.format("sensitivity failed: what the head gives")),
    ("head", 1e25, VSRAQ, GRADIENTS),
]


@pytest.mark.parametrize(("part", "size", "pipeline", "says"), LARGE)
def test_what_float32_cannot_add_up_is_refused_with_its_place(
    part: str, size: float, pipeline: str, says: str
) -> None:
    with pytest.raises(MoeccError, match=says) as found:
        run(pipeline, part, size)
    assert "Error: " not in str(found.value)


@pytest.mark.usefixtures("traced_once")
def test_a_model_that_gives_no_numbers_is_refused_without_calibration_too(
    refused: Refused, model: Path
) -> None:
    def enlarge(tensors: dict[str, Tensor]) -> None:
        for name in [n for n in tensors if "norm" in n]:
            tensors[name] = tensors[name] * 1e20

    edit_tensors(model, enlarge)
    assert NAN.format("what layer 0 gives") in refused(model, passes="dense{group=16}")
