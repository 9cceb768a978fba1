"""What a compilation needs at its end is read or tried before its first pass."""

from __future__ import annotations

import json
import os
import re
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


# ---------------------------------------------------------------- paths


def deep(folder: Path) -> Path:
    """Return a path that can be made, but none of what is written in it."""
    left = 4095 - len(f"{folder.absolute()}/.partial") - 60
    names = ["d" * 99] * (left // 100) + ["d" * (left % 100)]
    return folder.joinpath(*filter(None, names))


PATHS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "too long a name": (lambda folder: folder / ("x" * 300), "File name too long"),
    "too long a path": (deep, "File name too long"),
    "below a file": (lambda folder: Path(__file__) / "x", "Not a directory|is not a folder"),
    "where no file can be": (lambda folder: Path("/proc/x/y"), "No such file|no permission"),
}


@pytest.mark.parametrize("option", ["--out", "--dump"])
@pytest.mark.parametrize("path", PATHS)
def test_paths_are_tried_before_any_work(
    path: str,
    option: str,
    refused: Refused,
    mixtral: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make, says = PATHS[path]
    monkeypatch.setattr(command, "trace", lambda *_, **__: pytest.fail("the model was traced"))
    given = make(tmp_path)
    if option == "--out":
        line = refused(mixtral, out=given)
        assert re.search(f"can't be made: .*({says}).*; choose another output folder", line)
    else:
        line = refused(mixtral, "--dump", given)
        assert re.search(f"can't write to --dump .*({says}).*; write elsewhere", line)


@pytest.mark.parametrize("inside", ["out", "out/texts", "out.partial/texts", "./x/../out/texts"])
def test_texts_do_not_lie_in_the_output(
    inside: str, refused: Refused, mixtral: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The draft could not get its name any more at the end."""
    monkeypatch.setattr(command, "trace", lambda *_, **__: pytest.fail("the model was traced"))
    assert "lies in out" in refused(mixtral, "--dump", inside)


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
    assert (
        got.code == 2
        and "mine knows no such model; all passes are done, so --backend may be left out" in got.err
    )
    assert f"3 finished stages are kept in {tmp_path}/out.partial" in got.err
    again = compile(mixtral, tmp_path / "out")
    assert again.code == 0 and "3 stages of it are finished" in again.err
    assert compile(mixtral, tmp_path / "whole").code == 0
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert json.loads((tmp_path / "out" / "moecc.json").read_bytes())["backend"] == ""
    shutil.rmtree(tmp_path / "out")
