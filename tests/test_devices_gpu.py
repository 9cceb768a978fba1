"""Whole runs on a GPU, if there is one: the same bytes each time, as good as on the CPU."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from made import TINYMOE, Compile, Run, checkpoint, content, interrupt, load, logits, stop

if os.environ.get("TRITON_INTERPRET") == "1" or not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

CUDA = ("--device", "cuda")
SHORT = ("--rows", 8, "--length", 256, "--calib", TINYMOE / "calib.txt")
PASSES = {
    "kbvq": "kbvq",
    "a codebook of layers": "klt{rank=4,mean=3},vq{codebook=layer,bits=3},affine,fold",
    "a budget": "sensitivity,budget{bits=2.6},kbvq,dense",
    "tuning layers": "vsraq{steps=12},kbvq",
    "tuning the model": "rilq{steps=10,rank=4},merge,kbvq",
}


@pytest.mark.parametrize("name", PASSES)
def test_the_example_is_the_same_each_time_and_as_good_as_from_the_cpu(
    name: str, compile: Compile, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is stopped and goes on ends the same, too."""
    for out, device in (("cpu", "cpu"), ("once", "cuda"), ("again", "cuda:0")):
        got = compile(TINYMOE, tmp_path / out, PASSES[name], *SHORT, "--device", device)
        assert got.code == 0, got.err
    with pytest.MonkeyPatch.context() as patch:
        stop(patch, "after saving", 2, interrupt)
        assert compile(TINYMOE, tmp_path / "stopped", PASSES[name], *SHORT, *CUDA).code == 130
    assert compile(TINYMOE, tmp_path / "stopped", PASSES[name], *SHORT, *CUDA).code == 0
    once = content(tmp_path / "once")
    assert content(tmp_path / "again") == once == content(tmp_path / "stopped")

    def kl(out: str, device: str) -> float:
        text = "--text", TINYMOE / "valid.txt", "--rows", 16, "--device", device, "--json"
        found: float = Run(capsys, "eval", tmp_path / out, "--reference", TINYMOE, *text).json["kl"]
        return found

    assert kl("once", "cuda") == pytest.approx(kl("once", "cpu"), rel=1e-3)
    assert kl("once", "cpu") == pytest.approx(kl("cpu", "cpu"), rel=0.03)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3", "afmoe"])
def test_families_are_compiled_and_compared_there(
    family: str, compile: Compile, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = checkpoint(tmp_path / "model", family)
    for out, device in (("here", "cpu"), ("there", "cuda")):
        assert compile(model, tmp_path / out, "vsraq{steps=2},kbvq", "--device", device).code == 0
    want, found = (logits(load(tmp_path / out)) for out in ("here", "there"))
    original = logits(load(model))
    off = [float((y - original).square().sum()) for y in (want, found)]
    assert off[1] < 1.1 * off[0]
    same = Run(capsys, "eval", model, "--reference", model, *CUDA, "--json", "--length", 32).json
    assert same["kl"] == 0 and same["agreement"] == 1


def test_text_is_generated_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    got = [
        Run(capsys, "generate", TINYMOE, "--max-new-tokens", 8, "--device", device)
        for device in ("cpu", "cuda")
    ]
    assert got[0].code == got[1].code == 0 and got[0].out == got[1].out


def test_memory_that_runs_out_is_said_in_one_line(
    compile: Compile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def short(*args: object, **options: object) -> None:
        torch.empty(1 << 50, device="cuda")

    monkeypatch.setattr("moecc.passes._code.units.encode", short)
    got = compile(checkpoint(tmp_path / "model"), tmp_path / "out", "kbvq", *CUDA)
    assert got.code == 2 and "out of memory" in got.err and "fewer rows" in got.err
