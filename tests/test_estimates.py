"""What passes say that they would store, against what they store."""

from __future__ import annotations

import pytest
from pipelines import Tiny, compiled, resolved
from torch import Tensor

from moecc.ir.program import Program
from moecc.passes.absorb import AbsorbLora
from moecc.passes.budget import PlanBits
from moecc.passes.dense import QuantizeDense
from moecc.pipeline.bits import basis_bits, coded_bits, stored_bits
from moecc.pipeline.estimate import Estimate, Matrix, Outlook

REMARK = "a shared mean and basis come on top where they earn their bits"


def started(program: Program) -> Estimate:
    """Return the estimate of a program of tiny layers before any pass: 16 bits per weight."""
    found = []
    for moe in program.moe_layers():
        for p in moe.projections:
            node = p.operand("")
            assert node is not None
            experts, rows, columns = node.meta["val"].shape
            bits = 16 * experts * rows * columns
            found.append(Outlook(p.path, experts, rows, columns, p.input_side, bits, bits, 2, 1))
    return Estimate(found, {})


def wide() -> Estimate:
    """Return the estimate of a layer whose codebooks are small beside its codes."""
    sizes = ("gate_up", 8, 512, 256, True), ("down", 8, 256, 256, False)
    found = [Outlook(*size, 16 * size[1] * size[2] * size[3], 0, 2, 1) for size in sizes]
    return Estimate(found, {})


def estimated(program: Program, text: str) -> Estimate:
    return started(program).run(resolved(text))


@pytest.mark.parametrize(
    "text",
    [
        "klt{rank=2,mean=3},vq{bits=3,rounds=1},affine{offset=on},fold",
        "klt{rank=0,mean=4},vq{bits=4,rounds=1,codebook=layer},affine{offset=off},fold",
        "klt{rank=3,mean=off},vq{bits=2,rounds=1},affine{offset=off},fold",
        "vq{bits=2,rounds=1,codebook=layer},affine{offset=on},fold",
    ],
)
def test_an_estimate_without_a_choice_is_what_is_stored(
    tiny: Tiny, batches: list[Tensor], text: str
) -> None:
    program = tiny("M")
    run = compiled(program, text, batches=batches)
    found, (moe,) = estimated(program, text), run.program.moe_layers()
    assert found.experts == (stored_bits(run.program, moe),) * 2 == (found.coded,) * 2
    assert not found.remarks and not found.unknown


def test_an_estimate_holds_every_choice() -> None:
    """A codebook for the layer and no offset at least; own ones and an offset at most."""
    found = wide().run(resolved("klt,vq{bits=3,codebook=auto},affine,fold"))
    for p in found.projections:
        sizes = p.experts, p.rows, p.columns, 3
        assert p.low == coded_bits(*sizes, books=1)
        assert p.high == coded_bits(*sizes, books=p.experts) + 16 * p.experts * p.rows
    assert found.remarks == [REMARK]
    for text, said in (
        ("klt{rank=0},vq", True),
        ("klt{mean=off},vq", True),
        ("klt{rank=0,mean=2},vq", False),
        ("budget,klt,vq", False),
    ):
        assert (REMARK in wide().run(resolved(text)).remarks) == said, text


@pytest.mark.parametrize("codebook", ["expert", "layer", "auto"])
def test_behind_a_budget_its_codebooks_and_its_bits_are_the_bounds(codebook: str) -> None:
    found = wide().run(resolved(f"budget{{bits=6,codebook={codebook}}},vq{{codebook=layer}}"))
    ends = {"expert": (8, 8), "layer": (1, 1), "auto": (1, 8)}[codebook]
    for p in found.projections:
        sizes = p.experts, p.rows, p.columns, 2
        assert [p.low, p.high] == [coded_bits(*sizes, books=books) for books in ends]
    assert found.most == (str(PlanBits(bits=6.0, codebook=codebook)), 6.0)
    assert found.experts[1] == 6 * found.weights


def test_rows_that_an_adapter_may_add_come_on_top(tiny: Tiny) -> None:
    found = started(tiny("M"))
    AbsorbLora(rank=12).estimate(found)
    for p, rank in zip(found.projections, (12, 12), strict=True):
        sizes = p.experts, p.rows, p.columns
        assert p.on_top == basis_bits(rank, *sizes, input_side=p.input_side)
    AbsorbLora(rank=99).estimate(found)  # both are as wide as the residual stream: 16
    for p in found.projections:
        both = [
            basis_bits(r, p.experts, p.rows, p.columns, input_side=p.input_side) for r in (12, 16)
        ]
        assert p.on_top == sum(both)


def test_matrices_that_every_token_meets_take_bits_and_a_share_of_their_group() -> None:
    shapes = {
        "taken": ((32, 64), "attention"),
        "shared": ((64, 128), "shared expert"),
        "narrow": ((31, 64), "attention"),
        "odd": ((32, 48), "attention"),
        "flat": ((64,), "attention"),
        "router": ((64, 64), "router"),
    }
    others = {name: Matrix(shape, role, 7.0) for name, (shape, role) in shapes.items()}
    QuantizeDense(bits=4, group=32).estimate(Estimate([], others))
    bits = 4 + 24 / 32
    want = {"taken": 32 * 64 * bits, "shared": 64 * 128 * bits}
    assert {name: m.bits for name, m in others.items()} == {**dict.fromkeys(shapes, 7.0), **want}
