"""Options, output folders and texts that `moecc compile` refuses in one line, without a trace."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from made import TOKENIZER, checkpoint, copy_tokenizer
from refusals import Refused, edit_config, edit_tensors, full

torch.set_num_threads(1)
pytestmark = pytest.mark.usefixtures("traced_once")


# ---------------------------------------------------------------- options


PASSES = {
    "vq{bits=9}": "vq: bits=9 is out of range; it takes 2 | 3 | 4",
    "klt{rank=-1},vq": "rank=-1 is out of range",
    "klt{rank=many},vq": "auto",
    "kbvq{rank=100}": "give a smaller rank",
    "kbvq,vsraq{steps=0}": "steps=0",
    "dense{group=48}": "16 | 32 | 64 | 128",
    "vsraq{lr=nan}": "lr=nan",
    "vq{bits=2": "column",
    "vq{bits}": "lacks a value",
    "vq{bitz=2}": "did you mean 'bits'",
    "kbvqq": "did you mean 'kbvq'",
    " ": "no passes given",
    "./mine.py": "no pass file mine.py",
}
OPTIONS = {
    "--bits 5": "2 | 3 | 4",
    "--bits 0": "0 is no number of bits",
    "--rows 0": "number of 1 or more",
    "--length 0": "number of 1 or more",
    "--length 1": "of 1 token; give at least 1 row of 2 tokens",
    "--seed x": "seed",
    "--backend cuda": "no target 'cuda'; there are ",
    "--bit 2": "--bit",
    "--passes vq": "argument --passes: is given twice; leave one out",
    "--out other": "argument -o/--out: is given twice",
    "--bits 2 --bits 2": "argument --bits: is given twice",
    "--seed 1 --seed=2": "argument --seed: is given twice",
    "--workers 0": "'0' is not a number of 1 or more",
    "--workers 2 --ray local": "--workers and --ray both say who works; leave one out",
    "--progress --no-progress": "argument --progress/--no-progress: is given twice",
}


@pytest.mark.parametrize(("passes", "says"), PASSES.items())
def test_passes_that_cannot_run_are_refused(
    passes: str, says: str, refused: Refused, mixtral: Path
) -> None:
    assert says in refused(mixtral, passes=passes)


@pytest.mark.parametrize(("options", "says"), OPTIONS.items())
def test_options_out_of_range_are_refused(
    options: str, says: str, refused: Refused, mixtral: Path
) -> None:
    assert says in refused(mixtral, *options.split())


@pytest.mark.parametrize("name", ["lora", "absorb"])
def test_an_adapter_that_is_not_there_is_refused_before_the_model_is_traced(
    name: str, refused: Refused, mixtral: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moecc.commands.compile.trace", pytest.fail)
    says = "nowhere: no adapter_config.json; give a folder that PEFT saved a LoRA adapter in"
    assert refused(mixtral, passes=f"vq,{name}{{path=nowhere}}") == says


def test_a_file_without_a_pass_is_refused(refused: Refused, mixtral: Path, tmp_path: Path) -> None:
    for text, says in (
        ("x = 1", "defines 0 passes"),
        ("def", "can't be imported: SyntaxError"),
        ("1 / 0", "ZeroDivisionError"),
    ):
        (tmp_path / "mine.py").write_text(text)
        assert says in refused(mixtral, passes="./mine.py")


def test_rows_of_a_length_that_the_family_cannot_take_are_refused(
    refused: Refused, tmp_path: Path
) -> None:
    model = checkpoint(tmp_path / "model", "minimax")
    line = refused(model, "--length", "100")
    assert "rows of 100 tokens" in line and "give --length 63" in line
    shutil.rmtree(model)
    line = refused(checkpoint(model, "zaya"), "--length", "2")
    assert "rows of 2 tokens" in line
    assert "sequence other than 2" in line
    assert "give --length 5" in line


def test_rows_longer_than_the_model_has_positions_for_are_refused(
    refused: Refused, model: Path
) -> None:
    edit_config(model, max_position_embeddings=12)
    line = refused(model)
    assert "rows of 16 tokens, but the model has positions for 12" in line
    assert "give --length 12" in line


# ---------------------------------------------------------------- the output folder


def test_an_output_that_exists_is_refused(refused: Refused, mixtral: Path, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to("gone")
    for name in ("folder", "file", "link", "."):
        assert f"{name} exists; choose another output folder" in refused(mixtral, out=name)
    assert "exists" in refused(mixtral, out=mixtral)
    assert "--dump file is a file" in refused(mixtral, "--dump", "file")


def test_a_place_where_nothing_can_be_written_is_refused_before_the_trace(
    refused: Refused, mixtral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr("moecc.commands.compile.trace", full)
    for out in ("file/out", "file/deeper/out"):
        line = refused(mixtral, out=out)
        assert f"{out} can't be made: {tmp_path}/file is not a folder; choose" in line
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    line = refused(mixtral, out="new/out")
    assert f"new/out can't be made: no permission to write in {tmp_path}; choose" in line


def test_a_dump_folder_that_is_not_empty_is_refused(
    refused: Refused, mixtral: Path, tmp_path: Path
) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "00-traced.txt").write_text("of another run")
    line = refused(mixtral, "--dump", "texts")
    assert "--dump texts is not empty; give a new folder for the texts" in line


def test_new_folders_above_the_output_are_removed_too(refused: Refused, model: Path) -> None:
    edit_tensors(model, lambda t: t["model.norm.weight"].fill_(torch.nan))
    assert "model.norm.weight" in refused(model, out="new/deeper/out")


def test_folders_beside_the_output_stay(
    refused: Refused, mixtral: Path, model: Path, tmp_path: Path
) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "notes.txt").write_text("mine")
    assert "out.partial is there and holds no interrupted run; move it away" in refused(mixtral)
    (tmp_path / "new").mkdir()
    edit_tensors(model, lambda t: t["model.norm.weight"].fill_(torch.nan))
    refused(model, out="new/out")


# ---------------------------------------------------------------- calibration text


def test_a_file_without_text_is_refused(refused: Refused, mixtral: Path, tmp_path: Path) -> None:
    cases = {
        "short.txt": (b"import os\n", "fewer than one row of 16"),
        "empty.txt": (b"", "is empty"),
        "blank.txt": (b" \n\n", "is empty"),
        "binary.txt": (bytes(range(256)) * 9, "UTF-8"),
        "latin.txt": ("\xe9t\xe9 ".encode("latin-1") * 99, "no UTF-8 text"),
    }
    for name, (text, says) in cases.items():
        (tmp_path / name).write_bytes(text)
        line = refused(mixtral, "--calib", name)
        assert name in line and says in line
    assert "no text file" in refused(mixtral, "--calib", "none.txt")
    (tmp_path / "folder").mkdir()
    assert "folder is a folder; give a text file" in refused(mixtral, "--calib", "folder")


def test_a_missing_tokenizer_and_that_of_another_model_are_refused(
    refused: Refused, model: Path
) -> None:
    for name in TOKENIZER:
        (model / name).unlink()
    assert "has no tokenizer" in refused(model)
    copy_tokenizer(model)
    line = refused(model)
    assert "vocabulary of 64" in line and "copy the model's own tokenizer" in line
