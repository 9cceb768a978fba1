"""`--dump DIR`: the text of the program after every pass, in a folder of the user's."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moecc.checkpoint.files import make_room
from moecc.errors import MoeccError
from moecc.ir.program import Program

_UNFINISHED = "moecc.unfinished"


class Dump:
    """The texts of one run, in `folder`; nothing is written if it is None.

    Until the run has ended well, `moecc.unfinished` beside the texts lists them. The same run adds
    to them when it goes on; another run replaces them. Raise MoeccError if the folder holds
    anything else: texts of two runs would mix.
    """

    def __init__(self, folder: Path | None):
        self.folder = folder
        if folder is None or not os.path.lexists(folder):
            return
        if not folder.is_dir():
            raise MoeccError(f"--dump {folder} is a file; give a folder for the texts")
        if any(folder.iterdir()) and not (folder / _UNFINISHED).is_file():
            raise MoeccError(f"--dump {folder} is not empty; give a new folder for the texts")

    def start(self, *, resumes: bool) -> None:
        """Make the folder; unless the run goes on, remove what an unfinished one has left."""
        with self._writing() as folder:
            if folder is None:
                return
            folder.mkdir(parents=True, exist_ok=True)
            unfinished = folder / _UNFINISHED
            if unfinished.exists() and not resumes:
                for name in unfinished.read_text(encoding="utf-8").splitlines():
                    (folder / Path(name).name).unlink(missing_ok=True)
                unfinished.unlink(missing_ok=True)
            unfinished.touch()

    def write(self, name: str, program: Program, stage: int | None) -> None:
        """Write the text of a program, or of one stage, under a name."""
        with self._writing() as folder:
            if folder is not None:
                with open(folder / _UNFINISHED, "a", encoding="utf-8") as listed:
                    listed.write(f"{name}.txt\n")
                (folder / f"{name}.txt").write_text(program.text(stage), encoding="utf-8")

    def finish(self) -> None:
        """Leave the texts to the user: the run has ended well."""
        with self._writing() as folder:
            if folder is not None:
                (folder / _UNFINISHED).unlink()

    @contextmanager
    def _writing(self) -> Iterator[Path | None]:
        try:
            yield self.folder
        except OSError as error:
            why = f"{error.strerror or error}; {make_room(error)}"
            raise MoeccError(f"can't write to --dump {self.folder}: {why}") from error
