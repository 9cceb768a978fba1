"""`--device`: which device it names, what is refused, and that a run belongs to its device."""

from __future__ import annotations

import os
import warnings
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from made import Command, Compile, content, interrupt, stop
from pipelines import Tiny, resolved
from refusals import Refused
from stand_in import DEVICE, device

from moecc.errors import MoeccError
from moecc.ir.tensors import CPU
from moecc.passes._code import machinery, units
from moecc.passes._code.machinery import coding_by
from moecc.pipeline import device as devices
from moecc.pipeline import plan
from moecc.pipeline.device import device_called, kind_of, repeatable
from moecc.pipeline.pace import total
from moecc.pipeline.plan import planned
from moecc.pipeline.workers.base import OnDevice
from moecc.pipeline.workers.choice import require_one, workers_for

pytestmark = pytest.mark.usefixtures("traced_once")
GIB = 1 << 30


@pytest.fixture
def two_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    """A torch that is built for CUDA and finds two cards."""
    card = SimpleNamespace(name="NVIDIA H200", total_memory=139 * GIB + 5)
    ones = torch.ones
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3_000_000_000)
    monkeypatch.setattr(devices.torch, "ones", lambda size, device: ones(size))


# ---------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("name", "found"),
    [("cpu", "cpu"), ("cuda", "cuda:0"), ("cuda:1", "cuda:1"), ("auto", "cuda:0")],
)
def test_a_name_is_that_of_a_device(name: str, found: str, two_cards: None) -> None:
    assert device_called(name) == torch.device(found)


def test_auto_is_the_cpu_where_no_gpu_can_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_called("auto") == CPU


@pytest.mark.parametrize(
    "name", ["gpu", "mps", "", "cuda:", "cuda:x", "cuda:-1", "cuda:00000", "cpu:0", "CUDA"]
)
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(MoeccError, match=f"no device '{name}'; give auto, cpu, cuda or cuda:N"):
        device_called(name)


def test_a_gpu_that_can_not_be_used_is_refused_with_what_to_do(
    two_cards: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def says(name: str, what: str) -> None:
        with pytest.raises(MoeccError, match=f"device {name} can't be used: {what}.*--device cpu"):
            device_called(name)

    says("cuda:2", r"there is cuda:0\.\.cuda:1 alone; give that")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    says("cuda:1", r"there is cuda:0 alone; give that")

    def broken(size: int, device: torch.device) -> None:
        raise RuntimeError("CUDA error: no kernel image is available for execution\nCompile with")

    monkeypatch.setattr(devices.torch, "ones", broken)
    says("cuda", "CUDA error: no kernel image .*; free it, or install a torch that knows this card")
    assert device_called("auto") == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    says("cuda", "torch finds no GPU; look at nvidia-smi and CUDA_VISIBLE_DEVICES")

    def outdated() -> bool:
        warnings.warn("an old driver\nUpdate it", stacklevel=1)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", outdated)
    says("cuda", r"torch finds no GPU \(an old driver\); look at")
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    says("cuda", "this torch is built for CPUs alone; install its build for your GPU")


def test_commands_refuse_a_device_before_they_read_a_model(
    refused: Refused, moecc: Command, mixtral: Path
) -> None:
    no_device = "no device 'tpu'; give auto, cpu, cuda or cuda:N"
    assert refused(mixtral, "--device", "tpu") == no_device
    for command in (("eval", "--reference", "nowhere"), ("generate",)):
        got = moecc(*command, "nowhere", "--device", "tpu")
        assert (got.code, got.err) == (2, f"moecc: error: {no_device}\n")


# ---------------------------------------------------------------- a run


@pytest.mark.parametrize("workers", [(2, None), (1, None), (None, "local")])
def test_workers_are_refused_beside_a_gpu(workers: tuple[int | None, str | None]) -> None:
    option = "--workers" if workers[0] else "--ray"
    with pytest.raises(MoeccError, match=f"{option} spreads coding over cores, but cuda:0 codes"):
        require_one(*workers, torch.device("cuda", 0))
    require_one(None, None, torch.device("cuda", 0))
    assert isinstance(workers_for(1, None, DEVICE, memory=0, say=print), OnDevice)


def test_a_gpu_is_named_by_what_results_depend_on(
    two_cards: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda = torch.device("cuda", 0)
    assert kind_of(CPU) == "" and kind_of(cuda) == "NVIDIA H200 of 139 GiB, cuda 12.8"
    triton = pytest.importorskip("triton")
    assert coding_by(cuda) == f"coding by triton {triton.__version__}"
    monkeypatch.setattr(machinery.shutil, "which", lambda name: name == "mycc" or None)
    with pytest.raises(MoeccError, match="triton needs a C compiler: install gcc or clang, or set"):
        coding_by(cuda)
    monkeypatch.setenv("CC", "mycc")
    assert coding_by(cuda).startswith("coding by triton")
    monkeypatch.setattr(machinery.triton_coder.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MoeccError, match=r"coding on cuda:0 takes triton: pip install .*NATIVE=0"):
        coding_by(cuda)
    monkeypatch.setenv("MOECC_NATIVE", "0")
    assert coding_by(cuda) == "coding by torch" == coding_by(DEVICE)


def test_the_memory_of_a_gpu_bounds_what_it_codes_together(two_cards: None) -> None:
    """Equally many experts in each unit; one at least."""
    cuda = torch.device("cuda", 0)
    for experts, found in ((128, 64), (64, 64), (8, 8)):
        assert units.on_device(experts, 1536, 2048, cuda, blocks=1) == found
    assert units.on_device(120, 1536, 2048, cuda, blocks=1) == 60
    assert units.on_device(120, 1536, 2048, cuda, blocks=0) == 120
    assert units.on_device(8, 100_000, 100_000, cuda, blocks=0) == 1


def test_a_plan_says_what_a_gpu_needs_and_refuses_too_small_a_one(
    tiny: Tiny, two_cards: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, passes = replace(tiny("M"), device=torch.device("cuda", 1)), resolved("kbvq")
    found = planned(program, passes, 48, 16)
    (line,) = found.lines(passes, 1)
    assert line.startswith("plan: cuda:1 (NVIDIA H200 of 139 GiB, cuda 12.8) computes, in a time")
    assert found.workers == 1 and found.there > 0 and found.memory > plan.PROCESS + plan.CUDA
    assert "3.00 GB of the GPU's" in total(0.0, program.device)
    with pytest.raises(MoeccError, match=r"of memory, more than 1\.00 kB"):
        planned(program, passes, 48, 16, most=1000)
    monkeypatch.setattr(plan, "whole_memory", lambda device: 1000)
    with pytest.raises(MoeccError, match=r"memory on cuda:1, which has 1\.00 kB; give fewer"):
        planned(program, passes, 48, 16)


def test_a_run_does_not_go_on_on_another_device(
    mixtral: Path, compile: Compile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        stop(patch, "after saving", 1, interrupt)
        assert compile(mixtral, out).code == 130
    with monkeypatch.context() as patch:
        patch.setattr("moecc.commands.compile.kind_of", lambda device: "NVIDIA X of 24 GiB")
        got = compile(mixtral, out)
        assert got.code == 2 and "now NVIDIA X of 24 GiB, coding by" in got.err
    assert compile(mixtral, out).code == 0


def test_a_run_on_a_device_ends_as_one_on_the_cpu(
    mixtral: Path, compile: Compile, moecc: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is stopped once and goes on; its journal, its folder and its comparison are in memory."""
    for module in (devices, plan):
        monkeypatch.setattr(module, "whole_memory", lambda device: 1 << 40)
    for command in ("compile", "evaluate"):
        monkeypatch.setattr(f"moecc.commands.{command}.device_called", lambda name: DEVICE)
    compared = "eval", tmp_path / "there", "--reference", mixtral, "--json", "--rows", 2
    with device():
        with monkeypatch.context() as patch:
            stop(patch, "after saving", 1, interrupt)
            assert compile(mixtral, tmp_path / "there").code == 130
        there = compile(mixtral, tmp_path / "there")
        assert there.code == 0 and "1 stages of it are finished" in there.err
        found = moecc(*compared, "--length", 32).json
    monkeypatch.undo()
    here = compile(mixtral, tmp_path / "here")
    assert here.json["bits_per_weight"] == there.json["bits_per_weight"]
    sizes = [(tmp_path / n / "model.safetensors").stat().st_size for n in ("here", "there")]
    assert (
        sizes[0] == sizes[1]
        and content(tmp_path / "there").keys() == content(tmp_path / "here").keys()
    )
    want = moecc(*compared, "--length", 32).json
    assert found["kl"] == pytest.approx(want["kl"], rel=1e-4)
    assert found["per_layer"][0]["agreement"] == want["per_layer"][0]["agreement"]


# ---------------------------------------------------------------- the same each time


def test_a_gpu_takes_the_algorithms_that_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inside alone; a workspace that someone has chosen well stays."""
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":1:1")

    def state() -> tuple[object, ...]:
        return (
            torch.are_deterministic_algorithms_enabled(),
            torch.get_float32_matmul_precision(),
            torch.backends.cudnn.allow_tf32,
            torch.utils.deterministic.fill_uninitialized_memory,
            torch.backends.cuda.flash_sdp_enabled(),
            torch.backends.cuda.mem_efficient_sdp_enabled(),
        )

    before = state()
    with repeatable(CPU):
        assert state() == before and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":1:1"
    torch.set_float32_matmul_precision("high")
    try:
        with repeatable(torch.device("cuda", 0)):
            assert state() == (True, "highest", False, False, False, False)
            assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
            none = "_kernel does not have a deterministic implementation, but"
            warnings.warn(f"cumsum_cuda{none}", stacklevel=1)
            with pytest.raises(UserWarning, match="put_ does not have a deterministic"):
                torch.zeros(3).put_(torch.tensor([0, 0]), torch.ones(2))
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert state() == before
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    with repeatable(torch.device("cuda", 0)):
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
