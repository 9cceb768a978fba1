"""`affine` corrects outputs, and `fold` takes its slopes and offsets into the format."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import make
from pipelines import TOKENS, compiled
from torch import Tensor

from moecc.frontend.trace import trace
from moecc.ir.moe import MoE, operand_names
from moecc.ir.ops import VQ_EXPERTS
from moecc.ir.program import Program
from moecc.passes._code.regression import shift
from moecc.pipeline.stream import run_program

pytestmark = pytest.mark.usefixtures("traced_once")


def tensors_of(program: Program, moe: MoE) -> dict[str, Any]:
    """Return the operands of an experts node after its routing, by name; None if one is absent."""
    nodes = {name: moe.operand(name) for name in operand_names(moe.node)[3:]}
    return {name: None if node is None else program.value(node) for name, node in nodes.items()}


@pytest.mark.parametrize(
    ("family", "before"), [("qwen2_moe", ""), ("qwen2_moe", "klt{rank=2,mean=2},"), ("gpt_oss", "")]
)
def test_fold_is_exact_up_to_rounding(family: str, before: str) -> None:
    """Fold one compiled program.

    A new compilation with fold would differ: its second layer is coded for the output of the first
    after rounding.
    """
    start = compiled(trace(make(family)), f"{before}vq{{bits=3}},affine{{offset=on}}").program
    folded = compiled(start, "fold", facts=("affine",)).program
    assert "slope" not in folded.text() and "offset" not in folded.text()
    seen: dict[str, list[Tensor]] = {}
    run_program(start, TOKENS, lambda node, value, _: seen.setdefault(node.name, []).append(value))
    unit = 2**-11  # the largest relative error of rounding to float16
    for old, new in zip(start.moe_layers(), folded.moe_layers(), strict=True):
        was, now = tensors_of(start, old), tensors_of(folded, new)
        corrections = [n for n in was if n.endswith(("slope", "offset"))]
        assert all(was[n] is not None and now[n] is None for n in corrections)
        exact = {n: t for n, t in was.items() if n not in corrections}
        for p in ("gate_up", "down"):
            own = 0 if was[f"{p}_bias"] is None else was[f"{p}_bias"]
            exact |= {f"{p}_scale": was[f"{p}_scale"].double() * was[f"{p}_slope"]}
            exact |= {f"{p}_bias": was[f"{p}_offset"].double() + own}
            assert now[f"{p}_scale"].dtype == now[f"{p}_bias"].dtype == torch.float16
        for name, want in exact.items():
            assert (now[name] is None) == (want is None), name
            if want is not None:
                rounded = want.dtype == torch.float64  # one of the four above
                rtol, atol = (unit, 2**-25) if rounded else (0, 0)
                torch.testing.assert_close(now[name].to(want.dtype), want, rtol=rtol, atol=atol)

        # every token, with its inputs and experts of `start`; `lost` is without one of the tensors
        routed = [torch.cat(seen[n.name]) for n in old.node.args[:3]]
        kinds = [was, now, *({**was, n: None} for n in corrections)]
        wanted, got, *without = [VQ_EXPERTS(*routed, *t.values(), **old.attributes) for t in kinds]
        moved, *lost = [
            float(((y - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max()) for y in (got, *without)
        ]
        # 3: gate, up and down are rounded
        assert moved < 3 * unit < min(lost) / 2


@pytest.mark.parametrize("before", ["", "klt{rank=0,mean=2},"])
def test_affine_removes_the_shift_of_the_mean_and_restores_the_variance(
    traced: Program, before: str
) -> None:
    more = list(torch.randint(0, 64, (8, 2, 64), generator=torch.Generator().manual_seed(0)))
    run = compiled(traced, f"{before}vq{{feedback=false}},affine{{offset=on}}", batches=more)
    for moe in traced.moe_layers():
        for projection in ("gate_up", "down"):
            moved = run.ctx.audit[f"{moe.path}.{projection}"]["output_shift"]
            assert moved["mean"][1] < moved["mean"][0] / 4 and abs(moved["variance"][0] - 1) < 0.2
    assert shift([], []) == {"mean": [0.0, 0.0], "variance": [0.0, 0.0]}
