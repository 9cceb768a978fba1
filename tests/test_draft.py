"""The draft of an output: who may write it, what is removed of it, and what never is."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from filelock import FileLock
from made import QUICK, Compile, content, interrupt, stop

from moecc.artifact import draft
from moecc.artifact.draft import Busy, Draft, failure, new_folder
from moecc.commands.compile import compile_model
from moecc.commands.dump import finish
from moecc.errors import MoeccError

torch.set_num_threads(1)
pytestmark = pytest.mark.usefixtures("traced_once")


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def killed(out: Path, suffix: str = "partial", *, after: str = "") -> Draft:
    """Leave a draft as a killed process does that has got as far as `after`."""
    with Draft(out, suffix) as made:
        made.start()
        made.journal.mkdir()
        (made.journal / "layer-0-0001.json").write_text("{}", encoding="utf-8")
        (made.output / "config.json").write_text("{}", encoding="utf-8")
        if after:
            (made.folder / "over").touch()
        if after == "rename":
            made.output.rename(out)
    return made


@pytest.mark.parametrize("left", [["journal", "moecc.lock", "over"], ["moecc.lock"], []])
def test_the_rest_of_a_run_that_made_its_output_is_removed_and_said(
    left: list[str], mixtral: Path, compile: Compile, tmp_path: Path
) -> None:
    folder = killed(tmp_path / "out", after="rename").folder
    assert names(folder) == ["journal", "moecc.lock", "over"]
    for name in set(names(folder)) - set(left):
        shutil.rmtree(folder / name) if name == "journal" else (folder / name).unlink()
    got = compile(mixtral, tmp_path / "out")
    left = f"the rest of its run in {tmp_path}/out.partial is removed now"
    says = f"out exists and is complete: {left}; choose another output folder or remove it\n"
    assert got.code == 2 and got.err.endswith(says)
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["config.json"]


@pytest.mark.parametrize(
    ("holds", "over"),
    [
        ("", True),
        ("journal", False),
        ("over", True),
        ("over journal", True),
        ("output", False),
        ("output over", False),
        ("output over journal", False),
    ],
)
def test_a_draft_is_over_once_its_output_has_its_name(
    holds: str, over: bool, tmp_path: Path
) -> None:
    with Draft(tmp_path / "out", "partial") as made:
        for name in holds.split():
            (made.folder / name).touch()
        assert made.is_over() == over


def test_a_draft_that_another_run_removes_while_it_is_looked_at_is_nobody_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed(tmp_path / "out")
    seen = {"moecc.lock", "journal", "output"}
    shutil.rmtree(tmp_path / "out.partial" / "journal")
    monkeypatch.setattr(Draft, "_names", lambda self: seen)
    with Draft(tmp_path / "out", "partial") as made:
        assert made.folder == tmp_path / "out.partial"
    seen.add("notes.txt")
    (tmp_path / "out.partial" / "notes.txt").touch()
    with pytest.raises(MoeccError, match=r"holds 'notes\.txt'"):
        Draft(tmp_path / "out", "partial")


@pytest.mark.parametrize("left", ["free", "in use"])
def test_the_rest_of_a_run_beside_its_output_is_removed_unless_it_is_in_use(
    left: str, tmp_path: Path
) -> None:
    out, ended = tmp_path / "out", []
    folder = killed(out, after="rename").folder
    other = FileLock(folder / "moecc.lock", timeout=0)
    if left == "in use":
        other.acquire()
    with pytest.raises(MoeccError) as error:
        Draft(out, "partial", lambda: ended.append(1))
    other.release()
    rest = f" and is complete: the rest of its run in {folder} is removed now"
    advice = "choose another output folder or remove it"
    assert str(error.value) == f"{out} exists{rest if left == 'free' else ''}; {advice}"
    assert names(tmp_path) == (["out"] if left == "free" else ["out", "out.partial"])
    assert ended == ([1] if left == "free" else [])


def test_what_is_said_of_a_failure_is_what_the_user_can_mend(tmp_path: Path) -> None:
    out, draft = tmp_path / "out", tmp_path / "out.partial"
    full = OSError(errno.ENOSPC, "No space left", str(draft / "output"))
    taken = OSError(errno.ENOTEMPTY, "Directory not empty", str(draft / "output"))
    lost = OSError(errno.EIO, "Input/output error", str(tmp_path / "model"))
    for there in (False, True):
        assert failure(out, draft, full).startswith(f"writing {out} failed: No space left; ")
        says = failure(out, draft, taken)
        mine = f"{out} was made by something else in the meantime; move it away"
        assert says == mine if there else says.startswith(f"writing {out} failed: Directory not")
        end = "Input/output error; mend it and run again"
        assert failure(out, draft, lost) == f"can't read {tmp_path / 'model'}: {end}"
        out.mkdir(exist_ok=True)


def test_a_run_killed_before_the_rename_goes_on(
    mixtral: Path, compile: Compile, tmp_path: Path
) -> None:
    def half(self: Draft) -> None:
        (self.folder / "over").touch()
        interrupt()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Draft, "finish", half)
        assert compile(mixtral, tmp_path / "out").code == 130
    again = compile(mixtral, tmp_path / "out")
    assert again.code == 0 and "3 stages of it are finished" in again.err
    assert names(tmp_path) == ["out"]


def test_a_run_interrupted_after_the_rename_has_made_its_output(
    mixtral: Path, compile: Compile, tmp_path: Path
) -> None:
    finish = Draft.finish

    def late(self: Draft) -> None:
        finish(self)
        interrupt()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Draft, "finish", late)
        got = compile(mixtral, tmp_path / "out")
    assert got.code == 130 and "kept" not in got.err and names(tmp_path) == ["out"]


def test_an_output_that_something_else_makes_during_the_run_costs_no_work(
    mixtral: Path, compile: Compile, tmp_path: Path
) -> None:
    def taken() -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine").touch()

    with pytest.MonkeyPatch.context() as patch:
        stop(patch, "after saving", 2, taken)
        got = compile(mixtral, tmp_path / "out")
    says = "out was made by something else in the meantime; move it away; 3 finished stages are"
    assert got.code == 2 and says in got.err and names(tmp_path / "out") == ["mine"]
    (tmp_path / "out").rename(tmp_path / "away")
    again = compile(mixtral, tmp_path / "out")
    assert again.code == 0 and "3 stages of it are finished" in again.err
    assert names(tmp_path) == ["away", "out"]


@pytest.mark.parametrize("how", ["interrupted", "killed"])
def test_a_dump_is_finished_with_its_run_and_no_other(
    how: str, mixtral: Path, compile: Compile, tmp_path: Path
) -> None:
    out, dump, other = (tmp_path / name for name in ("out", "dump", "other"))
    calls = iter([interrupt])

    def late(*args: Path) -> None:
        next(calls, lambda: finish(*args))()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moecc.commands.compile.finish", late)
        if how == "killed":
            patch.setattr(Draft, "remove", lambda self: None)
        assert compile(mixtral, out, QUICK, "--dump", dump).code == 130
    assert names(tmp_path) == ["dump", "out", *["out.partial"] * (how == "killed")]
    assert (dump / "moecc.unfinished").exists() == (how == "killed")
    again = compile(mixtral, out, QUICK, "--dump", dump)
    assert again.code == 2 and ("removed now" in again.err) == (how == "killed")
    assert names(tmp_path) == ["dump", "out"] and "moecc.unfinished" not in names(dump)
    other.mkdir()
    (other / "moecc.unfinished").write_text(
        f'"{tmp_path}/another"\n00-traced.txt\n', encoding="utf-8"
    )
    finish(other, out)
    assert names(other) == ["moecc.unfinished"]


@pytest.mark.parametrize("after", ["", "mark"])
def test_unfinished_work_beside_an_output_of_the_users_stays(after: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    killed(out, after=after)
    out.mkdir()
    before = content(tmp_path)
    with pytest.raises(MoeccError, match="out exists; choose another output folder or remove it"):
        Draft(out, "partial")
    assert content(tmp_path) == before


@pytest.mark.parametrize("after", ["", "mark"])
def test_what_a_killed_export_left_is_removed_by_the_next(after: str, tmp_path: Path) -> None:
    killed(tmp_path / "out", "export", after=after)
    with new_folder(tmp_path / "out") as folder:
        assert names(folder) == []
        (folder / "new").touch()
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["new"]


def test_an_output_has_one_writer(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with new_folder(out) as folder:
        (folder / "mine").touch()
        advice = "wait for it, or choose another output folder"
        says = rf"out\.export is in use by another run; {advice}$"
        with pytest.raises(Busy, match=says), new_folder(out):
            pass
        with new_folder(tmp_path / "other"), Draft(out, "partial") as other:
            other.remove()
    assert names(tmp_path) == ["other", "out"] and names(out) == ["mine"]


def test_an_output_that_is_made_while_its_lock_is_waited_for_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    acquire = draft.FileLock.acquire

    def late(self: draft.FileLock) -> object:
        (tmp_path / "out").mkdir()
        return acquire(self)

    monkeypatch.setattr(draft.FileLock, "acquire", late)
    with pytest.raises(Busy, match="was in use by another run; run again"):
        Draft(tmp_path / "out", "partial")
    assert names(tmp_path) == ["out"]


FOREIGN: dict[str, tuple[Callable[[Path], object], str]] = {
    "file": (lambda p: p.write_text("mine", encoding="utf-8"), "is no folder"),
    "link": (lambda p: p.symlink_to(p.parent), "is no folder"),
    "folder": (lambda p: (p / "output").mkdir(parents=True), "holds no interrupted run"),
    "more": (
        lambda p: [killed(p.with_suffix(""), p.suffix[1:]), (p / "notes.txt").touch()],
        "holds 'notes.txt', which moecc did not write",
    ),
}
FOREIGN |= {
    f"{name} {kind}": (
        lambda p, name=name, make=make: [killed(p.with_suffix(""), p.suffix[1:]), make(p / name)],
        f"holds '{name}', which moecc did not write",
    )
    for name, kind, make in (
        ("moecc.lock", "text", lambda p: p.write_text("mine", encoding="utf-8")),
        ("over", "folder", lambda p: p.mkdir()),
        ("over", "pipe", os.mkfifo),
        ("journal", "link", lambda p: (p.rename(p.parents[1] / "far"), p.symlink_to("../far"))),
    )
}


@pytest.mark.parametrize("suffix", ["partial", "export"])
@pytest.mark.parametrize("kind", FOREIGN)
def test_what_lies_under_the_draft_s_name_is_never_removed(
    kind: str, suffix: str, tmp_path: Path
) -> None:
    make, says = FOREIGN[kind]
    make(tmp_path / f"out.{suffix}")
    before = content(tmp_path)
    with pytest.raises(MoeccError, match=f"out.{suffix} is there and {says}; move it away"):
        Draft(tmp_path / "out", suffix)
    assert content(tmp_path) == before


def test_what_a_user_puts_into_a_draft_outlives_it(tmp_path: Path) -> None:
    with new_folder(tmp_path / "out"):
        (tmp_path / "out.export" / "notes.txt").write_text("mine", encoding="utf-8")
    assert names(tmp_path / "out.export") == ["moecc.lock", "notes.txt"]


@pytest.mark.parametrize(
    "out",
    ["..", "new/..", "new/../new/" + "x" * 300, "x" * 300, "a\0b", "\ud800"],
    ids=["up", "inside", "around", "long", "NUL", "half"],
)
def test_a_name_that_no_folder_can_have_is_refused(
    out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MoeccError, match=r"exists|can't be made: "), new_folder(Path(out)):
        pass
    assert names(tmp_path) == []


def test_a_draft_on_another_disk_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mounted(source: str, target: Path) -> NoReturn:
        raise OSError(errno.EXDEV, "Invalid cross-device link", source, None, target)

    monkeypatch.setattr(os, "rename", mounted)
    says = f"{tmp_path}/out can't be made: {tmp_path}/out.partial lies on another disk; choose"
    with pytest.raises(MoeccError, match=re.escape(says)):
        Draft(tmp_path / "out", "partial")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_export_removes_the_folders_that_were_made_for_it(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "new" / "deeper" / "out"):
        raise ZeroDivisionError
    assert names(tmp_path) == []


def test_a_pipe_that_nobody_reads_leaves_finished_work(mixtral: Path, tmp_path: Path) -> None:
    """A program that calls compile_model may say lines to anything."""
    lines: list[str] = []

    def say(line: str) -> None:
        lines.append(line)
        if line.startswith("reloaded"):
            raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        compile_model(str(mixtral), QUICK, tmp_path / "out", rows=8, length=32, say=say)
    assert names(tmp_path) == ["out.partial"]
    got = compile_model(str(mixtral), QUICK, tmp_path / "out", rows=8, length=32, say=lines.append)
    assert any("3 stages of it are finished" in line for line in lines)
    assert got["out"] == str(tmp_path / "out") and names(tmp_path) == ["out"]


def test_a_run_that_is_stopped_says_what_it_keeps(
    mixtral: Path, compile: Compile, tmp_path: Path
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        stop(patch, "after saving", 2, interrupt)
        got = compile(mixtral, tmp_path / "out")
    kept = f"2 finished stages are kept in {tmp_path}/out.partial: run the same command again"
    assert got.code == 130 and kept in got.err and names(tmp_path) == ["out.partial"]
    with pytest.MonkeyPatch.context() as patch:
        stop(patch, "before saving", 1, interrupt)
        got = compile(mixtral, tmp_path / "new")
    kept = f"what is finished is kept in {tmp_path}/new.partial: run the same command again"
    assert got.code == 130 and kept in got.err
    assert names(tmp_path) == ["new.partial", "out.partial"]
