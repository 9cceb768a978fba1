"""A disk that is full or fills up, too little memory, artifacts that do not load: the input's fault
leaves nothing behind, the machine's leaves what is finished.
"""

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
from made import QUICK, ROWS, Compile, content, interrupt, stop
from refusals import SHORT, Refused, Usage, full

from moecc import cli
from moecc.artifact import draft, verify
from moecc.passes.vq import VectorQuantize

torch.set_num_threads(1)
pytestmark = pytest.mark.usefixtures("traced_once")


def test_a_full_disk_is_found_before_the_work(
    refused: Refused, mixtral: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1 << 30, 1 << 30, 1000))
    line = refused(mixtral)
    assert "out.partial needs" in line
    assert "its disk has 1.00 kB free; free some or write elsewhere" in line


@pytest.mark.parametrize(
    ("passes", "backend"),
    [
        (QUICK, ()),
        ("vq{bits=4,rounds=1}", ()),
        ("dense{group=16}", ()),
        (QUICK, ("--backend", "dense")),
        (QUICK, ("--backend", "dense{dtype=bfloat16}")),
    ],
)
def test_the_space_asked_for_first_is_the_space_used_at_the_end(
    passes: str,
    backend: tuple[str, ...],
    mixtral: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(
        "moecc.commands.compile.free_space", lambda path, count: asked.append(count)
    )
    finish, held = draft.Draft.finish, []

    def finishing(self: draft.Draft) -> None:
        held.extend(f.stat().st_size for f in self.journal.rglob("*.safetensors"))
        finish(self)

    monkeypatch.setattr(draft.Draft, "finish", finishing)
    args = ("compile", mixtral, "--passes", passes, "-o", tmp_path / "out", *SHORT, *backend)
    assert cli.main([str(a) for a in args]) == 0
    weights = (tmp_path / "out").rglob("*.safetensors")
    written = sum(file.stat().st_size for file in weights) + sum(held)
    assert 0.8 * written < asked[0] <= written


@pytest.fixture(scope="module")
def whole(mixtral: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a run that nothing stops."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert cli.main(["compile", str(mixtral), "--passes", QUICK, "-o", str(out), *ROWS]) == 0
    return content(out)


def small_space(patch: pytest.MonkeyPatch) -> None:
    """Fill the disk after the first time that somebody looks."""
    left = iter([1 << 30])
    patch.setattr(shutil, "disk_usage", lambda path: Usage(1 << 30, 0, next(left, 1000)))


def no_sync(name: str) -> Callable[[pytest.MonkeyPatch], None]:
    """Fill the disk when a file with `name` in its path is synced."""

    def fill(patch: pytest.MonkeyPatch) -> None:
        sync = os.fsync

        def synced(fd: int) -> None:
            if name in os.readlink(f"/proc/self/fd/{fd}"):
                full()
            sync(fd)

        patch.setattr(os, "fsync", synced)

    return fill


def failing(name: str, how: Callable[..., object]) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda patch: patch.setattr(name, how)


def too_large(*args: object, **kwargs: object) -> NoReturn:
    raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))


def no_memory(*args: object, **kwargs: object) -> NoReturn:
    raise MemoryError


def no_tensor(*args: object, **kwargs: object) -> NoReturn:
    torch.empty(1 << 60)
    raise AssertionError


def second_layer(patch: pytest.MonkeyPatch) -> None:
    run = VectorQuantize.run_layer
    patch.setattr(
        VectorQuantize,
        "run_layer",
        lambda self, layer, ctx: no_memory() if layer.index == 2 else run(self, layer, ctx),
    )


FULL = "No space left on device"
# the fault, what the line says, and the stages that are finished when it happens
FAULTS = {
    "before the weights": (
        small_space,
        r"output needs 1\.\d\d MB and its disk has 1\.00 kB free",
        3,
    ),
    "the first unit": (no_sync("kept-0-unit"), rf"gate_up.*\.safetensors .* {FULL}; free some", 0),
    "the journal's digests": (no_sync("digests"), f"journal/run.json: {FULL}; free some space", 0),
    "the second layer": (
        no_sync("layer-0-0002.safetensors"),
        f"layer-0-0002.safetensors .* {FULL}; free some space",
        1,
    ),
    "the weights": (
        no_sync("output/.model.safetensors"),
        f"output/model.safetensors .* {FULL}; free some space",
        3,
    ),
    "the small files": (
        failing("moecc.artifact.write.write_json", full),
        f"writing .*out failed: {FULL}; free some space or write elsewhere",
        3,
    ),
    "a limit on sizes": (
        failing("moecc.artifact.write.write_json", too_large),
        r"out failed: File too large; raise the limit on file sizes \(ulimit -f\)",
        3,
    ),
    "a failing disk": (
        failing("moecc.commands.compile.write_report", lambda *_: os.read(-1, 1)),
        "out failed: Bad file descriptor",
        3,
    ),
    "memory of Python": (
        failing("moecc.commands.compile.plan", no_memory),
        "out was not finished: out of memory; end other programs or give fewer rows; 3 fin",
        3,
    ),
    "memory of torch": (
        failing("moecc.commands.compile.plan", no_tensor),
        r"out of memory \(.*tried to allocate 4611686018427387904 bytes.*\); end other",
        3,
    ),
    "memory of a pass": (
        second_layer,
        r"failed in layer 1 \(after moments\): out of memory; end other programs or give",
        1,
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_run_that_the_machine_stops_goes_on_to_the_same_bytes(
    fault: str, mixtral: Path, compile: Compile, whole: dict[str, bytes], tmp_path: Path
) -> None:
    happen, says, stages = FAULTS[fault]
    with pytest.MonkeyPatch.context() as patch:
        happen(patch)
        got = compile(mixtral, tmp_path / "out")
    last = got.err.splitlines()[-1]
    assert got.code == 2 and last.startswith("moecc: error: ") and re.search(says, last)
    kept = f"; {stages} finished stages are kept in {tmp_path}/out.partial: run the same command"
    assert (kept in last) == (stages > 0)
    assert [p.name for p in tmp_path.iterdir()] == (["out.partial"] if stages else [])
    again = compile(mixtral, tmp_path / "out")
    assert again.code == 0 and (f"{stages} stages of it are finished" in again.err) == (stages > 0)
    assert [p.name for p in tmp_path.iterdir()] == ["out"] and content(tmp_path / "out") == whole


def test_a_disk_that_is_full_at_the_start_leaves_nothing(
    refused: Refused, mixtral: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moecc.commands.compile.copy_small_files", full)
    assert "writing out failed: No space left on device; free some space" in refused(mixtral)


@pytest.mark.parametrize("fits", [True, False])
def test_an_artifact_that_does_not_load_is_not_kept(
    fits: bool, refused: Refused, mixtral: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object, **kwargs: object) -> NoReturn:
        raise RuntimeError("size mismatch\nfor this and that")

    monkeypatch.setattr(verify, "free_memory", lambda: 1 << 40 if fits else 0)
    monkeypatch.setattr(verify.hf, "load", broken)
    monkeypatch.setattr(verify, "trace", broken)
    says = "output: what was written can't be loaded again: size mismatch"
    assert refused(mixtral).endswith(says)


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
