"""Compilations that must fail: checkpoints are damaged, and the error line is returned."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, NoReturn

import pytest
from made import QUICK, Run, with_rows
from safetensors.torch import load_file, save_file
from torch import Tensor

SHORT = ("--rows", "4", "--length", "16")
Refused = Callable[..., str]  # the fixture `refused` of conftest.py


def listing(folder: Path) -> dict[str, bytes | str | None]:
    """Return every file with its bytes, every link with its target and every folder, by path."""
    found = {str(p.relative_to(folder)): p for p in folder.rglob("*")}
    return {
        k: os.readlink(p) if p.is_symlink() else p.read_bytes() if p.is_file() else None
        for k, p in found.items()
    }


def refusal(
    capsys: pytest.CaptureFixture[str],
    folder: Path,
    model: str | Path,
    *options: str | Path,
    passes: str = QUICK,
    out: str | Path = "out",
) -> str:
    """Return the error line of a compilation that must fail and leave `folder` as it was."""
    before = listing(folder)
    args = model, "--passes", passes, "-o", out, "--json", *with_rows(options, SHORT)
    got = Run(capsys, "compile", *args)
    lines = got.err.splitlines()
    assert (got.code, got.out) == (2, ""), got.err
    assert lines[-1].startswith("moecc: error: ") and "Traceback" not in got.err
    assert sum(line.startswith("moecc: ") for line in lines) == 1
    assert listing(folder) == before
    return lines[-1].removeprefix("moecc: error: ")


def edit_config(model: Path, **changes: object) -> None:
    """Change entries of a checkpoint's config.json."""
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **changes}))


def edit_tensors(model: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Write a checkpoint's tensors again after `change(tensors by name)`."""
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})


class Usage(NamedTuple):
    """The bytes of a disk, as shutil.disk_usage gives them."""

    total: int
    used: int
    free: int


def full(*args: object, **kwargs: object) -> NoReturn:
    """Fail as a write to a full disk does."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
