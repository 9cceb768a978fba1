"""Faults, and the process that meets one: what it does to itself before its command begins.

    python -P benchmarks/_faults.py SPEC moecc ARGUMENTS

runs `python -m moecc ARGUMENTS` and lets the fault of SPEC (JSON) happen to it; `meet` does the
same in this process. A write is whatever changes the watched folder: a file opened to write or
synced, a name given or removed, a folder made or removed. Python reports each before it happens (an
audit event), but for syncs, for which os.fsync is wrapped. POSIX only.
"""

from __future__ import annotations

import errno
import importlib
import json
import mmap
import os
import re
import resource
import runpy
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

KINDS = {
    "none": "nothing",
    "moment": "SIGKILL after {amount:.2f} s",
    "worker": "SIGKILL of a worker after {amount:.2f} s",
    "write": "SIGKILL before write {at}",
    "bytes": "killed after {amount} bytes of a file, from write {at} on",
    "signal": "{signal} before write {at}",
    "refused": "{errno} from write {at} on",
    "size": "no file may have more than {amount} bytes",
    "memory": "{amount} bytes of memory more than at the start",
    "fill": "the disk is filled before write {at}",
    "read-only": "the disk is mounted read-only",
    "closed": "stderr is closed",
    "unread": "nobody reads stderr",
    "head": "stdout and stderr are read for one line",
}
_TO_WRITE = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_TAKES_SPACE = ("open", "os.mkdir", "fsync")  # what a full disk refuses
_STAGE = re.compile(r"layer-\d+-\d+\.json")


@dataclass(frozen=True)
class Fault:
    """What happens to a process. `amount`: seconds, bytes, an errno or a signal."""

    kind: str = "none"
    at: int = 0  # the write before which it happens; the first one is 1
    amount: float = 0

    def __str__(self) -> str:
        names = {"errno": "", "signal": ""}
        if self.kind == "refused":
            names["errno"] = errno.errorcode[int(self.amount)]
        if self.kind == "signal":
            names["signal"] = signal.Signals(int(self.amount)).name
        return KINDS[self.kind].format(at=self.at, amount=self.amount, **names)


@dataclass(frozen=True)
class Spec:
    """A fault, the folder whose writes are counted, and where a process notes what it did.

    settings: values of module attributes, "module:NAME" -> value. ballast: the file with which
    `fill` takes all space.
    """

    fault: Fault
    folder: str
    tally: str
    ballast: str = ""
    settings: Mapping[str, int] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Spec:
        found = json.loads(text)
        return cls(**{**found, "fault": Fault(**found["fault"])})


class Tally:
    """Numbers in a file, which outlive the process: writes, finished stages, growth of memory."""

    def __init__(self, path: Path):
        if not path.exists():
            path.write_bytes(bytes(24))
        with open(path, "r+b") as file:
            self._map = mmap.mmap(file.fileno(), 24)
        self._view = memoryview(self._map).cast("Q")

    def __getitem__(self, i: int) -> int:
        return self._view[i]

    def __setitem__(self, i: int, value: int) -> None:
        self._view[i] = value

    def clear(self) -> None:
        for i in range(3):
            self[i] = 0


WRITES, STAGES, GROWTH = range(3)


def memory(key: str) -> int:
    """Return a size of this process in bytes: VmSize or VmPeak."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))


class _Watch:
    """Counts writes and lets the fault happen."""

    def __init__(self, spec: Spec, tally: Tally):
        self.fault, self.ballast, self.tally = spec.fault, spec.ballast, tally
        self.folder = os.path.realpath(spec.folder) + os.sep
        self._happening = False

    def audit(self, event: str, args: tuple[Any, ...]) -> None:
        path = _changed(event, args)
        if path is not None and not self._happening:
            if os.path.abspath(path).startswith(self.folder):
                self.write(event, os.path.basename(path))

    def write(self, event: str, name: str = "") -> None:
        self.tally[WRITES] += 1
        self._happening = True
        try:
            self._happen(event, self.tally[WRITES])
        finally:
            self._happening = False
        if event == "os.rename" and _STAGE.fullmatch(name):
            self.tally[STAGES] += 1

    def _happen(self, event: str, count: int) -> None:
        kind, at, amount = self.fault.kind, self.fault.at, int(self.fault.amount)
        if kind == "refused" and count >= at:
            if amount != errno.ENOSPC or event in _TAKES_SPACE:
                raise OSError(amount, os.strerror(amount))
        if count != at:
            return
        if kind == "write":
            os.kill(os.getpid(), signal.SIGKILL)
        elif kind == "bytes":
            _limit(resource.RLIMIT_FSIZE, amount)
        elif kind == "signal":
            os.kill(os.getpid(), amount)
        elif kind == "fill":
            _fill(self.ballast)


def _changed(event: str, args: tuple[Any, ...]) -> str | None:
    """Return the path that an audit event is about to change, None if it changes none."""
    if event == "open":
        path, _, flags = args
        return os.fsdecode(path) if isinstance(path, str | bytes) and flags & _TO_WRITE else None
    if event == "os.rename":
        return os.fsdecode(args[1])
    if event not in ("os.mkdir", "os.remove", "os.rmdir"):
        return None
    path, folder = os.fsdecode(args[0]), args[-1]
    return path if folder == -1 else os.path.join(os.path.realpath(f"/proc/self/fd/{folder}"), path)


def _limit(what: int, count: int) -> None:
    resource.setrlimit(what, (count, resource.getrlimit(what)[1]))


def _fill(path: str) -> None:
    """Write zeros until no byte is left on the disk of `path`."""
    with open(path, "ab", buffering=0) as file:
        for size in (1 << 16, 1 << 9, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise


def _arm(spec: Spec, tally: Tally) -> None:
    """Make the fault happen to this process, for good: audit hooks can't be taken off."""
    for name, value in spec.settings.items():
        module, attribute = name.split(":")
        setattr(importlib.import_module(module), attribute, value)
    watch, sync = _Watch(spec, tally), os.fsync

    def counted(descriptor: int) -> None:
        watch.write("fsync")
        sync(descriptor)

    os.fsync = counted  # type: ignore[assignment]
    sys.addaudithook(watch.audit)
    if spec.fault.kind == "bytes":  # the system kills; Python would turn it into an error
        _limit(resource.RLIMIT_CORE, 0)
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    elif spec.fault.kind == "size":
        _limit(resource.RLIMIT_FSIZE, int(spec.fault.amount))
    elif spec.fault.kind == "memory":
        _limit(resource.RLIMIT_AS, memory("VmSize") + int(spec.fault.amount))


def meet(spec: Spec, command: Callable[[], int]) -> int:
    """Run `command` in this process while the fault happens to it; return its exit code."""
    tally, before = Tally(Path(spec.tally)), memory("VmSize")
    _arm(spec, tally)
    try:
        return command()
    finally:
        tally[GROWTH] = max(memory("VmPeak") - before, 0)


def _program(name: str) -> int:
    """Run a module, or a file whose name ends in .py, as Python's command line does."""
    if name.endswith(".py"):
        runpy.run_path(name, run_name="__main__")
    else:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    return 0


if __name__ == "__main__":
    spec, *sys.argv = sys.argv[1:]
    sys.exit(meet(Spec.from_json(spec), lambda: _program(sys.argv[0])))
