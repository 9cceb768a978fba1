"""A disk that is full or fills up, and artifacts that do not load: nothing is left behind."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from made import QUICK, interrupt, stop
from refusals import SHORT, Refused, Usage, full

from moecc import cli
from moecc.artifact import verify
from moecc.checkpoint import files
from moecc.pipeline import journal

torch.set_num_threads(1)
pytestmark = pytest.mark.usefixtures("traced_once")


def test_a_full_disk_is_found_before_the_work(
    refused: Refused, mixtral: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1 << 30, 1 << 30, 1000))
    line = refused(mixtral)
    assert "out.partial needs" in line
    assert "its disk has 1.00 kB free; free some or write elsewhere" in line


@pytest.mark.parametrize("passes", [QUICK, "vq{bits=4,rounds=1}", "dense{group=16}"])
def test_the_space_asked_for_first_is_the_space_used_at_the_end(
    passes: str, mixtral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(
        "moecc.commands.compile.free_space", lambda path, count: asked.append(count)
    )
    remove, held = journal.Journal.remove, []

    def removing(self: journal.Journal) -> None:
        held.extend(f.stat().st_size for f in self.folder.rglob("*.safetensors"))
        remove(self)

    monkeypatch.setattr(journal.Journal, "remove", removing)
    args = ("compile", mixtral, "--passes", passes, "-o", tmp_path / "out", *SHORT)
    assert cli.main([str(a) for a in args]) == 0
    written = (tmp_path / "out" / "model.safetensors").stat().st_size + sum(held)
    assert 0.8 * written < asked[0] <= written


def test_a_disk_that_fills_up_before_the_artifact_is_an_error(
    refused: Refused, mixtral: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = iter([1 << 30])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1 << 30, 0, next(left, 1000)))
    assert re.search(r"artifact needs 1\.\d\d MB and its disk has 1\.00 kB free", refused(mixtral))


@pytest.mark.parametrize("calls", [0, 1, 3])
def test_a_disk_that_fills_up_while_writing_is_an_error(
    calls: int, refused: Refused, mixtral: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fail at the first layer of the journal, at the second, and at the artifact's weights."""
    counted = iter(range(calls))
    sync = os.fsync
    monkeypatch.setattr(
        files.os, "fsync", lambda fd: sync(fd) if next(counted, None) is not None else full()
    )
    line = refused(mixtral)
    assert "No space left on device" in line and "free some space or write elsewhere" in line


@pytest.mark.parametrize("name", ["_json", "copy_small_files"])
def test_a_disk_that_fills_up_at_the_small_files_is_an_error(
    name: str, refused: Refused, mixtral: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"moecc.artifact.write.{name}", full)
    line = refused(mixtral)
    assert "writing out failed: No space left on device; make room or choose another place" in line


@pytest.mark.parametrize("fits", [True, False])
def test_an_artifact_that_does_not_load_is_not_kept(
    fits: bool, refused: Refused, mixtral: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object, **kwargs: object) -> NoReturn:
        raise RuntimeError("size mismatch\nfor this and that")

    monkeypatch.setattr(verify, "free_memory", lambda: 1 << 40 if fits else 0)
    monkeypatch.setattr(verify.hf, "load", broken)
    monkeypatch.setattr(verify, "trace", broken)
    says = "artifact: what was written can't be loaded again: size mismatch; nothing was kept"
    assert says in refused(mixtral)


def test_a_resumed_run_that_fails_keeps_the_work_of_the_first(
    refused: Refused, mixtral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ["compile", str(mixtral), "--passes", QUICK, "-o", "out", *SHORT, "--json"]
    monkeypatch.chdir(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        stop(patch, "after saving", 3, interrupt)
        assert cli.main(args) == 130
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: Usage(1 << 30, 0, 1000))
        assert "free some" in refused(mixtral)
    assert cli.main(args) == 0
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
