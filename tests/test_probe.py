"""The probe finds the gate of an experts module by running it, and refuses an unknown one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from checkpoints import fails
from torch import Tensor, nn

from moecc.frontend import probe
from moecc.ir.gates import apply_gate

Gate = Callable[[Tensor], Tensor]


class Gated(nn.Module):
    """The attributes of an experts module that the probe looks at."""

    has_gate, is_transposed, act_fn = True, False, nn.SiLU()

    def __init__(self, gate: Gate, **attributes: float):
        super().__init__()
        self._apply_gate = gate
        for name, value in attributes.items():
            setattr(self, name, value)


def halves(rows: Tensor) -> tuple[Tensor, Tensor]:
    g, u = rows.chunk(2, dim=-1)
    return g, u


UNKNOWN = {
    "another activation": lambda rows: F.mish(halves(rows)[0]) * halves(rows)[1],
    "swapped halves": lambda rows: F.silu(halves(rows)[1]) * halves(rows)[0],
    "an unseen clamp": lambda rows: F.silu(halves(rows)[0].clamp(max=500.0)) * halves(rows)[1],
    "a constant": lambda rows: F.silu(halves(rows)[0]) * (halves(rows)[1] + 0.01),
    "not a gate": lambda rows: rows,
}


@pytest.mark.parametrize("gate", UNKNOWN.values(), ids=UNKNOWN.keys())
def test_an_unknown_gate_is_an_error(gate: Gate) -> None:
    fails(lambda: probe.probe_gate(Gated(gate)), "Gated", "moecc/ir/gates.py")


def test_a_gate_that_fails_alone_is_an_error() -> None:
    fails(lambda: probe.probe_gate(Gated(lambda rows: rows @ torch.ones(3, 3))), "Gated")


def test_the_probe_reads_rounding_clamp_and_order() -> None:
    limits = {"glu": 0.0, "f32": 0.0, "clamp": 7.0, "clamp_f32": 7.0, "clamp_after": 7.0}
    for name, limit in limits.items():

        def gate(rows: Tensor, name: str = name, limit: float = limit) -> Tensor:
            return apply_gate(rows, "silu", name, 1.0, limit)

        layout = probe.probe_gate(Gated(gate, limit=limit))
        assert layout == probe.Layout("silu", name, 1.0, limit)
    module = Gated(lambda rows: F.silu(rows[..., ::2]) * rows[..., 1::2])
    assert probe.probe_gate(module) == probe.Layout("silu", interleaved=True)


def test_the_probe_leaves_the_random_state_alone() -> None:
    state = torch.random.get_rng_state()
    probe.probe_gate(Gated(lambda rows: F.silu(halves(rows)[0]) * halves(rows)[1]))
    assert torch.equal(state, torch.random.get_rng_state())
