"""Experts that are zero, equal or next to nothing: sane artifacts and sane figures."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from pipelines import Tiny, compiled
from torch import Tensor

from moecc.ir.relative import relative
from moecc.passes import vq

INF, NAN = math.inf, math.nan


@pytest.mark.parametrize(
    ("error", "reference", "share"),
    [
        (1.0, 4.0, 0.25),
        (8.0, 4.0, 2.0),
        (0.0, 4.0, 0.0),
        (0.0, 0.0, 0.0),
        (1e-30, 0.0, 1.0),
        (1e30, 1e-30, 1.0),
        (INF, 1.0, INF),
        (INF, 0.0, INF),
    ],
)
def test_an_error_has_a_share_of_any_reference(
    error: float, reference: float, share: float
) -> None:
    one = torch.tensor([error]), torch.tensor([reference])
    assert relative(*one).tolist() == [share] and relative(*one).dtype == torch.float32
    if abs(error) < 1e30:  # which float64 divides
        assert float(relative(error, reference)) == share


def test_an_error_that_is_no_number_stays_so() -> None:
    assert relative(NAN, 0.0).isnan() and relative(NAN, 1.0).isnan()


def test_a_share_of_nothing_has_a_gradient() -> None:
    error = torch.zeros(2, requires_grad=True)
    relative(error, torch.tensor([0.0, 4.0])).sum().backward()
    assert error.grad is not None and error.grad.tolist() == [0.0, 0.25]


DEAD: dict[str, Callable[[Tensor], Tensor]] = {
    "one is zero": lambda w: torch.cat([torch.zeros_like(w[:1]), w[1:]]),
    "all are zero": torch.zeros_like,
    "all are equal": lambda w: w[:1].expand_as(w).contiguous(),
    "all are constant": lambda w: torch.full_like(w, 0.5),
    "one is next to nothing": lambda w: torch.cat([w[:1] * 1e-18, w[1:]]),
    "all are next to nothing": lambda w: w * 1e-20,
}


def numbers(value: object) -> Iterator[float]:
    """Yield every number in a recorded value."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for entry in value:
            yield from numbers(entry)
    elif isinstance(value, int | float):
        yield value


@pytest.mark.parametrize(
    ("text", "at_once"),
    [
        ("kbvq{rank=2,mean=2}", vq.AT_ONCE),
        ("kbvq{rank=2,mean=2}", 1),
        ("vsraq{steps=2},kbvq{bits=3}", vq.AT_ONCE),
    ],
)
@pytest.mark.parametrize("where", ["gate_up", "down", "both"])
@pytest.mark.parametrize("dead", DEAD)
def test_dead_experts_are_coded_with_sane_figures(
    tiny: Tiny,
    batches: list[Tensor],
    monkeypatch: pytest.MonkeyPatch,
    dead: str,
    where: str,
    text: str,
    at_once: int,
) -> None:
    """Whether all experts are one unit of work or each is one."""
    monkeypatch.setattr(vq, "AT_ONCE", at_once)
    program = tiny("M")
    held = program.store.tensors  # type: ignore[union-attr]
    for name in [n for n in held if n.endswith(("gate_up", "down"))]:
        if where == "both" or name.endswith(where):
            held[name] = DEAD[dead](held[name])
    run = compiled(program, text, batches=batches)
    for row in run.ctx.audit.values():
        assert all(0 <= e <= 1 for e in row["expert_in_sample_error"])
        assert all(abs(n) < 1e4 for n in numbers(row)), row
    assert all(run.program.tensors[n].isfinite().all() for n in run.program.tensors)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_an_expert_of_zeros_stays_exactly_that(
    tiny: Tiny, batches: list[Tensor], bits: int
) -> None:
    program = tiny("M")
    for name, weight in program.store.tensors.items():  # type: ignore[union-attr]
        if name.endswith(("gate_up", "down")):
            program.store.tensors[name] = DEAD["one is zero"](weight)  # type: ignore[union-attr]
    run = compiled(program, f"vq{{bits={bits}}}", batches=batches)
    for p in run.program.moe_layers()[0].projections:
        scale = run.program.value(p.operand("scale"))
        assert not scale[0].any() and scale[1:].all()
        assert run.ctx.audit[p.path]["expert_in_sample_error"][0] == 0
