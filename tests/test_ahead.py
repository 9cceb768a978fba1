"""What a compilation needs at its end is read or tried before its first pass."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from made import QUICK, Command, Compile, content
from refusals import Refused, edit_config
from transformers import AutoConfig

from moecc.artifact import write
from moecc.commands import compile as command

torch.set_num_threads(1)
pytestmark = pytest.mark.usefixtures("traced_once")


def test_the_source_s_small_files_are_not_needed_once_passes_run(
    mixtral: Path, model: Path, compile: Compile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_passes = command.run_passes

    def alone(*args: object) -> object:
        for file in model.iterdir():
            if file.suffix != ".safetensors":
                file.unlink()
        return run_passes(*args)

    model = model.rename(tmp_path / mixtral.name)  # an artifact names its source
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "run_passes", alone)
    assert compile(Path(model.name), tmp_path / "out").code == 0
    monkeypatch.undo()
    monkeypatch.chdir(mixtral.parent)
    assert compile(Path(mixtral.name), tmp_path / "whole").code == 0
    assert content(tmp_path / "out") == content(tmp_path / "whole")


ODD: dict[str, tuple[Callable[[Path], object], str]] = {
    "a broken link": (lambda file: file.symlink_to("gone"), "it is no file, or a link to none"),
    "a folder": (lambda file: file.mkdir(), "it is no file, or a link to none"),
    "a large file": (lambda file: file.write_bytes(bytes(1001)), "it has more than 1.00 kB"),
}


@pytest.mark.parametrize("odd", ODD)
def test_what_cannot_be_copied_is_left_out_and_said(
    odd: str, model: Path, compile: Compile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, says = ODD[odd]
    make(model / "odd.json")
    if odd == "a large file":
        (model / "tokenizer.json").rename(tmp_path / "tokenizer.json")
        monkeypatch.setattr(write, "_LARGEST_SMALL_FILE", 1000)
    got = compile(model, tmp_path / "out", "dense{group=16}")
    assert got.code == 0 and f"note: {model}/odd.json is left out: {says}\n" in got.err
    assert not os.path.lexists(tmp_path / "out" / "odd.json")


def test_an_adapter_beside_the_weights_is_left_out_and_said(
    model: Path, compile: Compile, moecc: Command, tmp_path: Path
) -> None:
    """Where PEFT is installed, transformers looks for the adapter of such a configuration."""
    peft.LoraConfig(target_modules=["q_proj"]).save_pretrained(model)
    says = f"{model}: an adapter (adapter_config.json) beside the weights is left out"
    got = compile(model, tmp_path / "out", "dense{group=16}")
    assert got.code == 0 and f"note: {says}; a pass can merge one\n" in got.err
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    got = moecc("eval", tmp_path / "out", "--reference", model, "--rows", 2, "--length", 16)
    assert got.code == 0 and says in got.err
    got = moecc("generate", model, "--prompt", "abc")
    assert got.code == 2 and says in got.err and "transformers, which runs the model" in got.err


@pytest.mark.parametrize("content", ["[]", '{"cache_implementation": "none"}'])
def test_generation_settings_that_no_model_loads_with_are_refused_first(
    content: str, refused: Refused, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (model / "generation_config.json").write_text(content, encoding="utf-8")
    monkeypatch.setattr(command, "trace", lambda *_, **__: pytest.fail("traced"))
    line = refused(model)
    assert line.startswith(f"{model}/generation_config.json: transformers can't use it: ")
    assert line.endswith("; correct it or move it away")


def test_infinity_in_the_configuration_is_kept(
    model: Path, compile: Compile, tmp_path: Path
) -> None:
    """As published nemotron_h configurations have it; transformers reads and writes it."""
    edit_config(model, time_step_limit=[0.0, float("inf")])
    assert compile(model, tmp_path / "out").code == 0
    found = AutoConfig.from_pretrained(tmp_path / "out").to_dict()
    assert found["time_step_limit"] == [0.0, float("inf")]


# ---------------------------------------------------------------- targets


MINE = """from dataclasses import dataclass
from moecc.errors import MoeccError
from moecc.target import Emitted, Target

@dataclass(frozen=True, kw_only=True)
class Mine(Target):
    name = 'mine'

    def check(self, source):
        {check}

    def emit(self, artifact, out, say):
        {emit}
"""
FAILS = "raise MoeccError('mine knows no such model')"


def test_a_target_refuses_a_model_before_the_first_pass(
    refused: Refused, mixtral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.py").write_text(MINE.format(check=FAILS, emit="pass"), encoding="utf-8")
    monkeypatch.setattr(command, "run_passes", lambda *_: pytest.fail("passes ran"))
    line = refused(mixtral, "--backend", str(tmp_path / "mine.py"))
    assert line == "mine knows no such model"


def test_a_run_whose_target_fails_goes_on_without_it(
    mixtral: Path, compile: Compile, tmp_path: Path
) -> None:
    file = tmp_path / "mine.py"
    file.write_text(MINE.format(check="pass", emit=FAILS), encoding="utf-8")
    got = compile(mixtral, tmp_path / "out", QUICK, "--backend", file)
    assert got.code == 2 and "mine knows no such model; --backend may be left out" in got.err
    assert f"3 finished stages are kept in {tmp_path}/out.partial" in got.err
    again = compile(mixtral, tmp_path / "out")
    assert again.code == 0 and "3 stages of it are finished" in again.err
    assert compile(mixtral, tmp_path / "whole").code == 0
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert json.loads((tmp_path / "out" / "moecc.json").read_bytes())["backend"] == ""
    shutil.rmtree(tmp_path / "out")
