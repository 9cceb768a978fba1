"""One input of the fuzzer: run by a process that has all imports (`_fuzz_worker`), and judged.

An input may end in two ways: refused, with exit code 2 and one sentence, and nothing written; or
done, with all of its output. Everything else is a fault.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import signal
import tempfile
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from _fuzz_worker import MEMORY, PATIENCE, SECONDS, Done, Task, Worker

from moecc import cli

_LONGEST = 1000  # characters of a sentence
# Room that an input asked for in vain counts as memory that it took.
_REFUSED_MEMORY = re.compile(
    "out of memory|can't allocate|cannot allocate|memoryerror|bad_alloc", re.I
)
_NOT_SAID = re.compile(r"Traceback|internal error|fault of moecc|^\w*(Warning|Error): ", re.M)
# What a file is: its bytes, a link, a pipe, a folder; None if it is gone.
Item: TypeAlias = bytes | str | None
Action: TypeAlias = Callable[[Sequence[str]], None]


@dataclass(frozen=True)
class Case:
    """An input: `parts` of the stage with some `changes` by path, and the command that reads it.

    parts: folders and files; "a:b" is called b where the command runs. command: a command line, or
    one of the runner's actions with its arguments. Paths are relative to the folder that it runs
    in. result: a folder of the stage that the output `out` must equal. stays: the beginnings of
    paths that a refused command may change.
    """

    target: str
    parts: Sequence[str]
    changes: Mapping[str, Item]
    command: Sequence[str]
    result: str = ""
    stays: Sequence[str] = ()

    def dumps(self, stage: Path) -> str:
        """Return the case as JSON; of a changed file, what differs from the stage's."""
        changes = {path: _described(item, stage / path) for path, item in self.changes.items()}
        return json.dumps({**vars(self), "changes": changes}, indent=1) + "\n"

    @classmethod
    def loads(cls, text: str, stage: Path) -> Case:
        """Return the case that `dumps` wrote."""
        found = json.loads(text)
        changes = {path: _item(told, stage / path) for path, told in found["changes"].items()}
        return cls(**{**found, "changes": changes})

    def line(self) -> str:
        return "moecc " + " ".join(map(ascii, self.command))


@dataclass(frozen=True)
class Outcome:
    """How an input ended. fault: "" if it ended as it should. bytes: beyond those at its start."""

    code: int
    fault: str
    said: str
    seconds: float
    bytes: int


@dataclass(frozen=True)
class _ActionParser:
    """A parser of a command line whose first word is the name of an action."""

    action: Action

    def parse_args(self, command: Sequence[str]) -> Namespace:
        def run(options: Namespace) -> tuple[int, None, str]:
            self.action(command[1:])
            return 0, None, ""

        return Namespace(run=run, json=False)


@dataclass
class Runner:
    """Runs cases whose parts lie in the folder `stage`. actions: besides the command line.

    A forked process runs one case after another, and another takes over when it ends or has run
    `most`: a fork costs as much as an input, because reading an object copies its page.
    """

    stage: Path
    actions: Mapping[str, Action] = field(default_factory=dict)
    most: int = 40
    _worker: Worker | None = None

    def run(self, case: Case, debug: bool = False) -> Outcome:
        """Run a case in a folder of its own and judge it.

        debug: in a new process, with tracebacks.
        """
        with tempfile.TemporaryDirectory(dir=self.stage.parent) as place:
            task = Task(Path(place), case.command, debug)
            self.prepare(case, task.folder)
            before = listing(task.folder)
            code, seconds, size = self._done(task, alone=debug)
            out, err = (s.read_bytes().decode("utf-8", "backslashreplace") for s in task.streams)
            fault = _fault(code, out, err, size) or self._left(case, task.folder, before, code)
            return Outcome(code, fault, err[-4000:], seconds, size)

    def keep(self, case: Case, made: str, to: Path, code: int = 0) -> None:
        """Run a case that ends with `code`, and move the folder that it makes to `to`."""
        with tempfile.TemporaryDirectory(dir=self.stage.parent) as place:
            task = Task(Path(place), case.command, debug=False, seconds=600)
            self.prepare(case, task.folder)
            got, *_ = self._done(task, alone=True)
            if got != code:
                said = task.streams[1].read_text(errors="replace")
                raise RuntimeError(f"{case.line()} ended with {got}: {said}")
            (task.folder / made).rename(to)

    def prepare(self, case: Case, folder: Path) -> None:
        """Make the folder that a case runs in."""
        folder.mkdir()
        for part in case.parts:
            name, _, other = part.partition(":")
            source, to = self.stage / name, folder / (other or name)
            if source.is_dir():
                # a journal is written to, and a link would change the stage
                copy = shutil.copy2 if to.suffix == ".partial" else os.link
                shutil.copytree(source, to, copy_function=copy)
            else:
                os.link(source, to)
        for path, item in case.changes.items():
            _put(folder / path, item)

    def close(self) -> None:
        """End the process that runs cases."""
        if self._worker is not None:
            self._worker.end()
            self._worker = None

    def _done(self, task: Task, alone: bool) -> Done:
        """Return the exit code (negative: a signal), seconds of one core and bytes of memory."""
        if alone or (self._worker is not None and self._worker.ran >= self.most):
            self.close()
        if self._worker is None:
            self._worker = Worker(self._perform)
        found = self._worker.run(task)
        if found[0] < 0:
            self._worker = None
        return found

    def _perform(self, command: Sequence[str]) -> int:
        before = cli.parser
        action = self.actions.get(command[0]) if command else None
        if action is not None:  # as if there were a command of that name
            cli.parser = lambda: _ActionParser(action)
        try:
            return cli.main(command)
        finally:
            cli.parser = before

    def _left(self, case: Case, folder: Path, before: Mapping[str, object], code: int) -> str:
        """Return what is wrong with the files after a run, "" if nothing is."""
        after = listing(folder)
        own = {p for p in before.keys() | after.keys() if p.startswith(tuple(case.stays))}
        own = own if case.stays else set()
        if changed := [p for p in before.keys() - own if after.get(p) != before[p]]:
            return f"it changed {changed[0]!a}"
        made = after.keys() - before.keys() - own
        if code == 2:
            return f"it left {min(made)!a}" if made else ""
        if drafts := [p for p in made if p.endswith((".partial", ".export", ".part"))]:
            return f"it left {drafts[0]!a}"
        if case.result and content(folder / "out") != content(self.stage / case.result):
            return "its result differs from that of an undisturbed run"
        return ""


# ---------------------------------------------------------------- the judgement


def _fault(code: int, out: str, err: str, size: int) -> str:
    """Return what is wrong with how a command ended, "" if nothing is."""
    if code < 0:
        return fault_of_signal(code)
    if size > MEMORY or _REFUSED_MEMORY.search(err):
        return "it took more than 1 GiB of memory"
    if code not in (0, 1, 2):
        return f"exit code {code}"
    if found := _NOT_SAID.search(err):
        return f"it said {found[0]!r}"
    if bad := [c for c in out + err if not (c.isprintable() or c == "\n")]:
        return f"it printed {bad[0]!a}"
    return "" if code != 2 else _sentence_fault(out, err)


def fault_of_signal(code: int) -> str:
    """Return what is wrong with a process that a signal has ended; code: minus its number."""
    if code == -signal.SIGXCPU:
        return f"it took more than {SECONDS} s of a core"
    if code == -signal.SIGKILL:
        return f"it waited for more than {PATIENCE} s"
    return f"it was ended by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _sentence_fault(out: str, err: str) -> str:
    *remarks, last = err.splitlines() or [""]
    if out or not last.startswith("moecc: error: ") or not err.endswith("\n"):
        return "its last line is no error"
    if any(line.startswith("moecc: ") for line in remarks):
        return "it gave more than one line of error"
    if len(last) > _LONGEST:
        return f"its error has more than {_LONGEST} characters"
    return ""


def listing(folder: Path) -> dict[str, object]:
    """Return what tells whether a file, link or folder was written to, by path."""
    found: dict[str, object] = {}
    for path in folder.rglob("*"):
        told = path.lstat()
        state = (told.st_mode, told.st_ino, told.st_size, told.st_mtime_ns)
        found[os.path.relpath(path, folder)] = "folder" if path.is_dir() else state
    return found


def content(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every file in a folder, by path."""
    files = (f for f in folder.rglob("*") if f.is_file())
    return {os.path.relpath(f, folder): f.read_bytes() for f in files}


# ---------------------------------------------------------------- files


def _put(path: Path, item: Item) -> None:
    """Make `path` what `item` says, whatever it was before."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    if item is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(item, bytes):
        path.write_bytes(item)
    elif item == "pipe":
        os.mkfifo(path)
    elif item == "folder":
        path.mkdir()
    else:
        path.symlink_to(item.removeprefix("link:"))


def _described(item: Item, base: Path) -> object:
    """Return an item as JSON holds it; bytes as those that differ from the file `base`."""
    if not isinstance(item, bytes):
        return item
    before = base.read_bytes() if base.is_file() else b""
    start = _common(before, item)
    end = _common(before[start:][::-1], item[start:][::-1])
    changed = item[start : len(item) - end]
    told: object = {"base64": base64.b64encode(changed).decode()}
    if changed.isascii() and changed.decode().isprintable():
        told = {"text": changed.decode()}
    return {"from": start, "to": len(before) - end, "put": told}


def _common(a: bytes, b: bytes) -> int:
    """Return how many bytes at the start of both are the same."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))


def _item(told: object, base: Path) -> Item:
    """Return the item that `_described` described."""
    if not isinstance(told, dict):
        return told if isinstance(told, str) else None
    put = told["put"]
    changed = put["text"].encode() if "text" in put else base64.b64decode(put["base64"])
    before = base.read_bytes() if base.is_file() else b""
    return before[: told["from"]] + changed + before[told["to"] :]
