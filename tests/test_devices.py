"""A whole run on a device that is not the CPU (`stand_in`): all of it there, the same results."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from adapters import adapter, linear
from conftest import tiny_batches, tiny_program
from families import make
from pipelines import TOKENS, resolved
from stand_in import DEVICE, back, device
from torch import Tensor

from moecc.frontend.trace import trace
from moecc.ir.program import Program
from moecc.passes import vq
from moecc.passes._code import native, units
from moecc.pipeline.passes import Context
from moecc.pipeline.run import run_passes
from moecc.pipeline.stream import run_program
from moecc.pipeline.workers.base import Alone, OnDevice, Workers
from moecc.types import Json


@pytest.fixture(autouse=True)
def _coded_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the CPU code as a device does: by PyTorch, all experts of a projection together."""
    monkeypatch.setattr(native, "compiled", lambda: None)
    monkeypatch.setattr(units, "for_a_unit", lambda device: 1 << 40)
    monkeypatch.setattr(vq, "AT_ONCE", 1 << 40)


def run(program: Program, text: str, workers: Workers) -> Context:
    ctx = Context(workers=workers)
    run_passes(program, resolved(text), ctx, tiny_batches())
    return ctx


# layers and passes, and the difference of outputs: sums over codes have another order there
RUNS = {
    "coding": (
        "M",
        "moments{behind=float},klt{rank=2,mean=3},vq{bits=3,rounds=2},affine{offset=on},fold",
        0.0,
    ),
    "choices": ("S", "sensitivity,budget{bits=5},klt,vq{rounds=1},dense{group=16}", 0.02),
    "tuning layers": ("MM", "vsraq{steps=3,lr=9},kbvq{rank=2,rounds=1}", 1e-3),
    "tuning the model": ("MD", "rilq{steps=2,rank=2,lm=1,lr=9},kbvq{mean=2,rounds=1}", 1e-3),
    "adapters": ("MD", "lora{path=ADAPTER},kbvq{rounds=1},absorb{path=ADAPTER,rank=2}", 0.0),
}


@pytest.mark.parametrize("name", RUNS)
def test_passes_give_on_a_device_what_they_give_on_the_cpu(name: str, tmp_path: Path) -> None:
    kinds, text, most = RUNS[name]
    experts = {"layers.0.lora_A": (2 * 4, 16), "layers.0.lora_B": (16, 2 * 4)}
    shapes = experts | linear("layers.1.linear", 16, 16)
    adapter(tmp_path, shapes, target_parameters=["gate_up"])
    text = text.replace("ADAPTER", str(tmp_path))
    here = tiny_program(kinds)
    there = replace(tiny_program(kinds), device=DEVICE)
    want = run(here, text, Alone())
    with device():
        got = run(there, text, OnDevice())
        output = torch.cat([back(y) for y in run_program(there, tiny_batches())])
    assert got.notes == want.notes and set(there.tensors) == set(here.tensors)
    assert all(type(there.tensors[tensor]) is Tensor for tensor in there.tensors)
    difference = (output - torch.cat(run_program(here, tiny_batches()))).norm() / output.norm()
    assert plain(got.audit) == plain(want.audit) and difference <= most
    if not most:
        assert got.audit == want.audit and there.text() == here.text()  # with digests of tensors


@pytest.mark.parametrize("family", ["afmoe", "phimoe", "longcat_flash"])
def test_models_run_forward_and_backward_on_a_device(family: str) -> None:
    """Attention has other strides there; tensors are made of nothing; a token has an expert twice.

    Gradients of the routers' scores and of the output, which is drawn at random, are compared.
    """
    here = trace(make(family))
    there = replace(here.copy(), device=DEVICE)
    rows = [ids[:, :16] for ids in TOKENS[:2]]
    want, got = Context(), Context(workers=OnDevice())
    run_passes(here, resolved("sensitivity"), want, rows)
    with device():
        run_passes(there, resolved("sensitivity"), got, rows)
        found = {name: back(s) for name, s in got.data["sensitivity"].items()}
    for name, s in want.data["sensitivity"].items():
        torch.testing.assert_close(found.pop(name), s, rtol=1e-3, atol=1e-4 * float(s.abs().max()))
    assert not found


def plain(audit: dict[str, Json]) -> dict[str, Json]:
    """Return what is no measurement."""
    kept = ("fate", "codebook", "rank", "mean", "tokens", "fallback")
    return {n: {k: row[k] for k in kept if k in row} for n, row in audit.items()}
