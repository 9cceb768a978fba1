"""Bits, counted tensor by tensor: what is predicted, what is held and what lies on disk agree."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import slow_vq4 as slow
import torch
from pipelines import Tiny, resolved
from torch import Tensor

from moecc.ir.program import Program
from moecc.pipeline.bits import (
    basis_bits,
    coded_bits,
    everything_bits,
    experts_bits,
    per_weight,
    stored_bits,
)
from moecc.pipeline.passes import Context
from moecc.pipeline.run import run_passes

EXPERTS, HIDDEN, INTERMEDIATE, VOCABULARY = 4, 16, 8, 16  # of `tiny`
GATE_UP, DOWN = EXPERTS * 2 * INTERMEDIATE * HIDDEN, EXPERTS * HIDDEN * INTERMEDIATE
MODEL = GATE_UP + DOWN + EXPERTS * HIDDEN + 2 * VOCABULARY * HIDDEN


def bits_of(tensors: Iterable[Tensor | None]) -> int:
    return sum(8 * t.numel() * t.element_size() for t in tensors if t is not None)


@pytest.mark.parametrize("columns", [8, 10, 16, 17])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_coded_bits_are_those_of_the_stored_tensors(bits: int, shared: bool, columns: int) -> None:
    p = slow.draw(0, experts=3, rows=5, columns=columns, bits=bits, shared=shared)
    tensors = slow.tensors(p)
    want = bits_of(tensors[name] for name in slow.CODED)
    assert coded_bits(3, 5, columns, bits, books=1 if shared else 3) == want
    if shared:
        assert coded_bits(3, 5, columns, bits) == want


@pytest.mark.parametrize("input_side", [True, False])
@pytest.mark.parametrize("rank", [1, 3])
def test_basis_bits_are_those_of_the_stored_tensors(rank: int, input_side: bool) -> None:
    p = slow.draw(0, experts=3, rows=5, columns=7, bits=2, rank=rank, input_side=input_side)
    tensors = slow.tensors(p)
    want = bits_of(tensors[name] for name in ("basis", "coef", "coef_scale"))
    assert basis_bits(rank, 3, 5, 7, input_side=input_side) == want
    assert basis_bits(0, 3, 5, 7, input_side=input_side) == 0


def test_bits_per_weight_of_nothing_are_zero() -> None:
    assert (per_weight(12, 8), per_weight(12, 0), per_weight(0, 0)) == (1.5, 0.0, 0.0)


def in_bfloat16(program: Program) -> Program:
    """Let the checkpoint hold bfloat16; the program still computes in float32."""
    store = program.store
    store.tensors = {name: t.bfloat16() for name, t in store.tensors.items()}
    return program


def test_a_changed_weight_takes_the_program_s_type_unless_it_was_rounded(tiny: Tiny) -> None:
    program = in_bfloat16(tiny("M"))
    moe = program.moe_layers()[0]
    name = program.weights[moe.operand("down").name].name
    assert stored_bits(program, moe) == 16 * (GATE_UP + DOWN)
    program.rewrite(name, 2 * program.read(name))
    assert stored_bits(program, moe) == 16 * (GATE_UP + DOWN)
    program.add(name, program.read(name))
    assert stored_bits(program, moe) == 16 * GATE_UP + 32 * DOWN
    assert experts_bits(program) == (16 * GATE_UP + 32 * DOWN) / (GATE_UP + DOWN)


def test_without_a_checkpoint_weights_count_as_they_are_traced(tiny: Tiny) -> None:
    program = tiny("M")
    program.store = None
    assert stored_bits(program, program.moe_layers()[0]) == 32 * (GATE_UP + DOWN)


def run(program: Program, text: str, batches: list[Tensor]) -> Program:
    run_passes(program, resolved(text), Context(), batches)
    return program


def test_a_remainder_counts_as_sixteen_bits_and_parts_as_they_are(
    tiny: Tiny, batches: list[Tensor]
) -> None:
    program = run(tiny("M"), "klt{rank=2,mean=off}", batches)
    moe = program.moe_layers()[0]
    held = {n: program.tensors[n] for n in program.tensors}
    remainders = [n for n in held if n.endswith("remainder")]
    parts = bits_of(t for n, t in held.items() if n not in remainders)
    assert len(remainders) == 2 and all(held[n].dtype == torch.float32 for n in remainders)
    assert stored_bits(program, moe) == 16 * (GATE_UP + DOWN) + parts


def test_bits_of_everything_count_what_is_on_disk(tiny: Tiny, batches: list[Tensor]) -> None:
    reference = tiny("M")
    assert everything_bits(reference, reference) == 32
    program = run(tiny("M"), "vq{bits=3},affine{offset=on},fold", batches)
    held = bits_of(program.tensors[n] for n in program.tensors)
    rest = 32 * (MODEL - GATE_UP - DOWN)
    assert everything_bits(program, reference) == (held + rest) / MODEL
    assert experts_bits(program, reference) == held / (GATE_UP + DOWN)


def test_a_tied_tensor_counts_once_and_an_unread_one_too(tiny: Tiny) -> None:
    program, reference = tiny("M"), in_bfloat16(tiny("M"))
    store = reference.store
    store.tensors["unread"] = torch.zeros(100, dtype=torch.float64)
    store.tied = {"head.weight": "embed.weight"}
    stored = 16 * (MODEL - VOCABULARY * HIDDEN) + 64 * 100
    weights = MODEL - VOCABULARY * HIDDEN + 100
    assert everything_bits(reference, reference) == stored / weights
    assert everything_bits(program, reference) == 32 * MODEL / weights


def test_a_weight_that_a_pass_changed_counts_in_the_type_that_is_held(tiny: Tiny) -> None:
    program, reference = in_bfloat16(tiny("M")), in_bfloat16(tiny("M"))
    name = program.weights[program.moe_layers()[0].operand("down").name].name
    program.add(name, program.read(name).double())
    assert everything_bits(program, reference) == 16 + 48 * DOWN / MODEL


def test_bits_are_per_weight_of_the_reference(tiny: Tiny) -> None:
    one, two = tiny("M"), tiny("MM")
    assert experts_bits(one, two) == 16 and experts_bits(two, one) == 64
    assert experts_bits(tiny("D")) == 0
