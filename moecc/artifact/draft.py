"""The draft of an output: OUT.partial of `compile`, OUT.export of an export.

  moecc.lock   held by the process that writes the output
  journal/     what a stopped run goes on from (`moecc.pipeline.journal`)
  output/      becomes OUT once all of it is written and checked
  over         from then on nothing in the draft is needed

A draft whose lock is free belongs to nobody: the next run goes on with it or removes it. A folder
of that name that holds anything else is the user's and is left alone.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from filelock import FileLock, Timeout

from moecc.checkpoint.files import LONGEST_NAME, make_room
from moecc.errors import MoeccError

_LOCK, _JOURNAL, _OUTPUT, _OVER = "moecc.lock", "journal", "output", "over"
_TAKEN = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR)  # what a rename says of a name in use


class Busy(MoeccError):
    """Another process writes the output, or has made it."""


class Draft:
    """The draft of the new folder `out`, locked until it is closed. suffix: of the draft's name.

    at_end: called when `out` is there, and again by the next run if this one was killed meanwhile.
    Raise MoeccError if `out` can't be made or the draft's name is taken, Busy if `out` exists or
    another process writes it.
    """

    def __init__(self, out: Path, suffix: str, at_end: Callable[[], object] = lambda: None):
        self.out, self._at_end = out, at_end
        if not out.name or out.name == "..":
            raise MoeccError(f"{out} exists; choose another output folder")
        self.folder = out.with_name(f"{out.name}.{suffix}")
        self.journal, self.output = self.folder / _JOURNAL, self.folder / _OUTPUT
        self._lock = FileLock(self.folder / _LOCK, timeout=0)
        if os.path.lexists(out):
            advice = "choose another output folder or remove it"
            raise Busy(f"{out} exists{self._remnant()}; {advice}")
        self._require_own()
        _require_possible(out)
        around = (self.folder, *self.folder.parents)
        new = [p for p in around if not os.path.lexists(p)]
        self._made = new or [self.folder]
        try:
            self._acquire()
        except Busy:
            raise
        except (OSError, ValueError) as error:
            self._remove_made(*self._made)
            raise _impossible(out, getattr(error, "strerror", None) or str(error)) from error
        if self.is_over():
            self._empty()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._lock.release()

    def start(self) -> None:
        """Make `output` an empty folder."""
        (self.folder / _OVER).unlink(missing_ok=True)  # first: else the journal would be over too
        shutil.rmtree(self.output, ignore_errors=True)
        self.output.mkdir()

    def finish(self) -> None:
        """Give the output its name and remove the draft.

        Raise OSError, and keep the draft, if something else has that name by now.
        """
        (self.folder / _OVER).touch()
        self.output.rename(self.out)
        self._at_end()
        self._empty()
        self._remove_made(self.folder)

    def remove(self) -> None:
        """Remove the draft, and the folders around it that were made for it."""
        if os.path.lexists(self.out) and not self.output.exists():  # interrupted after the rename
            self._at_end()
        with contextlib.suppress(OSError):
            (self.folder / _OVER).touch()
        self._empty()
        self._remove_made(*self._made)

    def is_over(self) -> bool:
        """Return whether nothing in the draft is needed, as once its output has its name."""
        names = self._names()
        return _OUTPUT not in names and (_OVER in names or _JOURNAL not in names)

    def _acquire(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # too long a path is another error
            os.lstat(self.folder / ("x" * LONGEST_NAME))
        self._require_same_disk()
        try:
            self._lock.acquire()
        except Timeout as e:
            advice = "wait for it, or choose another output folder"
            raise Busy(f"{self.folder} is in use by another run; {advice}") from e
        if os.path.lexists(self.out) or not (self.folder / _LOCK).exists():
            # the run that held the lock has just ended
            self._lock.release()
            self._remove_made(*self._made)
            raise Busy(f"{self.folder} was in use by another run; run again")

    def _require_same_disk(self) -> None:
        """Raise OSError if a disk is mounted on the draft: its output could never get its name.

        No system renames ".", but it says first if both names are not of one disk.
        """
        try:
            os.rename(os.path.join(self.folder, "."), self.out)
        except OSError as error:
            if error.errno == errno.EXDEV:
                raise OSError(errno.EXDEV, f"{self.folder} lies on another disk") from error

    def _remnant(self) -> str:
        """Remove what is left of the run that made OUT; return what to say of it."""
        if not (self.folder.is_dir() and self._foreign() is None and self.is_over()):
            return ""
        try:
            with self._lock:
                self._at_end()
                self._empty()
                self._remove_made(self.folder)
        except OSError:  # it is in use, or the disk refuses
            return ""
        return f" and is complete: the rest of its run in {self.folder} is removed now"

    def _names(self) -> set[str]:
        return set(os.listdir(self.folder)) if self.folder.is_dir() else set()

    def _foreign(self) -> str | None:
        """Return why the draft's name is taken, None if it is free or a draft has it."""
        if not os.path.lexists(self.folder):
            return None
        if self.folder.is_symlink() or not self.folder.is_dir():
            return "is no folder"
        try:
            names = self._names()
        except OSError as error:
            return f"can't be read ({error.strerror})"
        if names and not names & {_LOCK, _OVER}:
            return "holds no interrupted run"
        other = sorted(name for name in names if not self._is_part(name))
        return f"holds {other[0]!r}, which moecc did not write" if other else None

    def _is_part(self, name: str) -> bool:
        """Return whether moecc writes such a thing: a folder, or a mark, which is an empty file."""
        try:
            found = (self.folder / name).lstat()
        except FileNotFoundError:  # another run has just ended
            return True
        if name in (_LOCK, _OVER):
            return stat.S_ISREG(found.st_mode) and found.st_size == 0
        return name in (_JOURNAL, _OUTPUT) and stat.S_ISDIR(found.st_mode)

    def _require_own(self) -> None:
        why = self._foreign()
        if why is not None:
            advice = "move it away or choose another output folder"
            raise MoeccError(f"{self.folder} is there and {why}; {advice}")

    def _empty(self) -> None:
        for part in (self.output, self.journal):
            shutil.rmtree(part, ignore_errors=True)
        with contextlib.suppress(OSError):
            (self.folder / _OVER).unlink()

    def _remove_made(self, *folders: Path) -> None:
        """Remove these folders, the innermost first, if they hold no more than the lock."""
        with contextlib.suppress(OSError):
            if self._names() == {_LOCK}:
                (self.folder / _LOCK).unlink()
        for folder in folders:
            with contextlib.suppress(OSError, ValueError):  # it isn't there, or not empty
                folder.rmdir()


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Give a folder to write in, which becomes `out` if nothing fails and is gone otherwise.

    It lies in a draft of its own beside `out`, and nothing else that lies there is touched. Raise
    MoeccError if `out` can't be made, Busy if it exists or another process writes it.
    """
    with Draft(out, "export") as draft:
        try:
            draft.start()  # what a killed export left goes
            yield draft.output
            draft.finish()
        except BaseException as error:
            draft.remove()
            if isinstance(error, OSError):
                kind = Busy if _is_taken(out, error) else MoeccError
                raise kind(failure(out, draft.folder, error)) from error
            raise


def failure(out: Path, draft: Path, error: OSError) -> str:
    """Return what to say of an OSError while `out` was written.

    It names the file at fault if that lies outside the draft. Where writing fails, as on a full
    disk, the system names no file.
    """
    why, file = error.strerror or error, error.filename
    if isinstance(file, str) and not Path(file).is_relative_to(draft):
        return f"can't read {file}: {why}; mend it and run again"
    if _is_taken(out, error):
        return f"{out} was made by something else in the meantime; move it away"
    return f"writing {out} failed: {why}; {make_room(error)}"


def _is_taken(out: Path, error: OSError) -> bool:
    return error.errno in _TAKEN and os.path.lexists(out)


def _require_possible(out: Path) -> None:
    above = next(p for p in out.absolute().parents if os.path.lexists(p))
    if not above.is_dir():
        raise _impossible(out, f"{above} is not a folder")
    if not os.access(above, os.W_OK | os.X_OK):
        raise _impossible(out, f"no permission to write in {above}")


def _impossible(out: Path, why: str) -> MoeccError:
    return MoeccError(f"{out} can't be made: {why}; choose another output folder")
