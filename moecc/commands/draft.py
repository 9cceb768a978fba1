"""The folder OUT.partial that an output lives in until it is done, and what a failed run leaves
behind: nothing.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from moecc.errors import MoeccError


def draft_of(out: Path) -> Path:
    """Return OUT.partial; raise MoeccError if `out` exists or either can't be made.

    A draft that an interrupted run has left is fine: it holds a journal, or nothing.
    """
    if os.path.lexists(out):
        raise MoeccError(f"{out} exists; choose another output folder or remove it")
    draft = out.with_name(out.name + ".partial")
    if os.path.lexists(draft) and not (draft / "journal").is_dir() and not is_empty(draft):
        raise MoeccError(
            f"{draft} is there and holds no interrupted run; "
            "move it away or choose another output folder"
        )
    above = next(p for p in out.absolute().parents if os.path.lexists(p))
    if not above.is_dir():
        why = f"{above} is not a folder"
    elif not os.access(above, os.W_OK | os.X_OK):
        why = f"no permission to write in {above}"
    else:
        return draft
    raise MoeccError(f"{out} can't be made: {why}; choose another output folder")


def is_empty(folder: Path) -> bool:
    """Return whether `folder` is a folder, no link to one, with nothing in it."""
    return folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir())


def missing_folders(folder: Path) -> list[Path]:
    """Return `folder` and the folders around it that do not exist yet, the innermost first."""
    return [p for p in (folder, *folder.parents) if not p.exists()]


def remove_made(made: Sequence[Path], draft: Path) -> None:
    """Remove the folders that this run has made, and nothing that another run has put beside its
    own.
    """
    for folder in made:
        if folder == draft:
            shutil.rmtree(folder, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):  # not empty
                folder.rmdir()


def require_dump(dump: Path | None, *, resumes: bool) -> None:
    """Raise MoeccError if texts of two runs would mix in the folder `dump`.

    Only a run that goes on adds to its own.
    """
    if dump is None or not os.path.lexists(dump):
        return
    if not dump.is_dir():
        raise MoeccError(f"--dump {dump} is a file; give a folder for the texts")
    if any(dump.iterdir()) and not resumes:
        raise MoeccError(f"--dump {dump} is not empty; give a new folder for the texts")
