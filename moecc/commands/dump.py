"""`--dump DIR`: the text of the program after every pass, in a folder of the user's."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moecc.checkpoint.files import make_room, try_folder
from moecc.errors import MoeccError
from moecc.ir.program import Program

_UNFINISHED = "moecc.unfinished"


class Dump:
    """The texts of the run that makes `out`, in `folder`; nothing is written if it is None.

    Until the run has ended well, `moecc.unfinished` beside the texts says whose they are and lists
    them. The same run adds to them when it goes on; another run replaces them. Raise MoeccError if
    the folder holds anything else, because texts of two runs would mix, if it lies in `out` or its
    `draft`, or if nothing can be written there.
    """

    def __init__(self, folder: Path | None, out: Path, draft: Path):
        self.folder, self._whose = folder, _whose(out)
        if folder is None:
            return
        if os.path.lexists(folder) and not folder.is_dir():
            raise MoeccError(f"--dump {folder} is a file; give a folder for the texts")
        with _writing(folder):
            if folder.is_dir() and any(folder.iterdir()) and not (folder / _UNFINISHED).is_file():
                raise MoeccError(f"--dump {folder} is not empty; give a new folder for the texts")
            for other in (out, draft):
                if folder.resolve().is_relative_to(other.resolve()):
                    raise MoeccError(f"--dump {folder} lies in {other}; give a folder beside it")
            try_folder(folder)

    def start(self, *, resumes: bool) -> None:
        """Make the folder; unless this run goes on, remove what an unfinished one has left."""
        with _writing(self.folder) as folder:
            if folder is None:
                return
            folder.mkdir(parents=True, exist_ok=True)
            whose, *names = _unfinished(folder) or [""]
            if resumes and whose == self._whose:
                return
            for name in names:
                (folder / Path(name).name).unlink(missing_ok=True)
            (folder / _UNFINISHED).write_text(f"{self._whose}\n", encoding="utf-8")

    def write(self, name: str, program: Program, stage: int | None) -> None:
        """Write the text of a program, or of one stage, under a name."""
        with _writing(self.folder) as folder:
            if folder is not None:
                with open(folder / _UNFINISHED, "a", encoding="utf-8") as listed:
                    listed.write(f"{name}.txt\n")
                (folder / f"{name}.txt").write_text(program.text(stage), encoding="utf-8")


def finish(folder: Path | None, out: Path) -> None:
    """Leave the texts of the run that has made `out` to the user."""
    with _writing(folder):
        if folder is not None and _unfinished(folder)[:1] == [_whose(out)]:
            (folder / _UNFINISHED).unlink()


def _whose(out: Path) -> str:
    return json.dumps(os.path.abspath(out))


def _unfinished(folder: Path) -> list[str]:
    """Return whose the texts of an unfinished run are, then their names; [] without one."""
    file = folder / _UNFINISHED
    return file.read_text(encoding="utf-8").splitlines() if file.is_file() else []


@contextmanager
def _writing(folder: Path | None) -> Iterator[Path | None]:
    try:
        yield folder
    except OSError as error:
        why = f"{error.strerror or error}; {make_room(error)}"
        raise MoeccError(f"can't write to --dump {folder}: {why}") from error
