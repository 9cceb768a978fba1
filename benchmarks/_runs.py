"""One run of a command in a box, while a fault happens to it.

Runs are forks of this process, which has imported what they need, or processes of their own.
"""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NoReturn

from _faults import GROWTH, STAGES, WRITES, Fault, Spec, Tally, meet

Command = Callable[[Sequence[str]], int]  # the command line in this process

UNDISTURBED = Fault()
LONGEST = 1800  # seconds of one run; more is a hang
STREAMS = ("closed", "unread", "head")
MOMENTS = ("moment", "worker")  # faults that come at a time, from outside
PROGRAM = "workers/program.py"  # of a worker process
_AGAIN = re.compile(r"(\d+) stages of it are finished")


@dataclass(frozen=True)
class Scenario:
    """A command and the folder that it is run in.

    inputs: the folder that the box begins as. out: what the command makes there. at_once: it is
    there whole or not at all. program: a module or a file that Python runs. settings: as in `Spec`.
    environment: variables that it finds set. workers: processes that it may have of its own.
    """

    name: str
    arguments: tuple[str, ...]
    inputs: Path
    out: str
    at_once: bool = True
    program: str = "moecc"
    settings: Mapping[str, int] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    workers: int = 1

    def made(self, box: Path) -> bool:
        """Return whether the result is there."""
        return self.at_once and (box / self.out).exists()


@dataclass(frozen=True)
class Disk:
    """A small disk of this process's own, as only a user namespace may mount it."""

    folder: Path

    @property
    def ballast(self) -> Path:
        """The file that fills the disk."""
        return self.folder / "ballast"

    @classmethod
    def mounted(cls, folder: Path, nbytes: int) -> Disk:
        folder.mkdir()
        cls(folder)._mount("-t", "tmpfs", "-o", f"size={nbytes}", "tmpfs")
        return cls(folder)

    @contextmanager
    def failing(self, fault: Fault) -> Iterator[None]:
        """Make the disk what a fault says; then mend it."""
        if fault.kind == "read-only":
            self._mount("-o", "remount,ro")
        try:
            yield
        finally:
            self._mount("-o", "remount,rw")
            self.ballast.unlink(missing_ok=True)

    def unmount(self) -> None:
        subprocess.run(["umount", str(self.folder)], check=True)

    def _mount(self, *options: str) -> None:
        subprocess.run(["mount", *options, str(self.folder)], check=True)


@dataclass(frozen=True)
class Ended:
    """How a run ended. code: its exit code, or minus the signal that killed it."""

    code: int
    errors: str
    seconds: float
    writes: int
    stages: int  # of a pipeline, that this run finished
    growth: int  # of memory, in bytes; 0 if it was killed

    @property
    def last(self) -> str:
        return (self.errors.strip().splitlines() or [""])[-1]

    @property
    def goes_on(self) -> bool:
        """Whether the run found work of an earlier one."""
        return _AGAIN.search(self.errors) is not None

    @property
    def taken_up(self) -> int:
        """Stages that the run found finished."""
        found = _AGAIN.search(self.errors)
        return int(found[1]) if found else 0


@dataclass(frozen=True)
class Case:
    """Faults that the runs of a scenario meet, one after the other. key: what --only takes.

    apart: as processes of their own instead of forks. disk: what the box lies on, if that matters.
    """

    key: str
    scenario: Scenario
    faults: tuple[Fault, ...] = ()
    apart: bool = False
    disk: Disk | None = None


@dataclass(frozen=True)
class Runner:
    """Runs commands in boxes under `work`. command: what forks of this process call."""

    work: Path
    command: Command | None = None

    @cached_property
    def tally(self) -> Tally:
        return Tally(self.work / "tally")

    def run(self, case: Case, box: Path, fault: Fault) -> Ended:
        """Run a case's command in `box` and let a fault happen to it; return how it ended."""
        self.tally.clear()
        start, (reading, writing) = time.perf_counter(), os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if not pid:
            os.close(reading)
            self._be(case, box, fault, writing)
        os.close(writing)
        if fault.kind == "unread":
            os.close(reading)
            reading = -1
        moment = start + (fault.amount if fault.kind in MOMENTS else LONGEST)
        errors, status = _follow(pid, reading, moment, fault.kind)
        return Ended(
            os.waitstatus_to_exitcode(status),
            errors,
            time.perf_counter() - start,
            self.tally[WRITES],
            self.tally[STAGES],
            self.tally[GROWTH],
        )

    def _be(self, case: Case, box: Path, fault: Fault, errors: int) -> NoReturn:
        """Become the process that runs a command."""
        scenario, command = case.scenario, self.command
        ballast = str(case.disk.ballast) if case.disk else ""
        spec = Spec(fault, str(box), str(self.work / "tally"), ballast, scenario.settings)
        code = 70
        try:
            os.chdir(box)
            _streams(errors, fault)
            places = {"MOECC_CACHE": str(box / "cache"), "TMPDIR": str(box / "tmp")}
            os.environ.update({**places, **scenario.environment})
            if command is None or case.apart or fault.kind in STREAMS:
                program = _program(scenario, spec)
                os.execv(program[0], program)
            code = meet(spec, lambda: command(scenario.arguments))
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)


def _streams(errors: int, fault: Fault) -> None:
    """Give this process a stderr that another one reads, or what a fault makes of it."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1):
        os.dup2(errors if number == 1 and fault.kind == "head" else nothing, number)
    os.dup2(errors, 2)
    os.close(errors)
    if fault.kind == "closed":
        os.close(2)
    else:  # Python's own have found out what was there before
        sys.stdout, sys.stderr = (open(n, "w", closefd=False) for n in (1, 2))


def _program(scenario: Scenario, spec: Spec) -> list[str]:
    """Return the command line of a process of its own; without a hook if none is needed."""
    if scenario.program == "moecc" and not scenario.settings and not spec.fault.at:
        if spec.fault.kind in ("none", *MOMENTS, *STREAMS):
            return [sys.executable, "-P", "-m", "moecc", *scenario.arguments]
    faults = str(Path(__file__).with_name("_faults.py"))
    return [sys.executable, "-P", faults, spec.to_json(), scenario.program, *scenario.arguments]


def _follow(pid: int, pipe: int, moment: float, kind: str) -> tuple[str, int]:
    """Return what a process writes and its status.

    What a fault of a `kind` ends is killed from a moment on: a worker that the process has started
    by then, once, or the process itself. Of "head", the pipe is closed after the first line. A
    negative pipe is closed already.
    """
    found = b""
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        while pipe >= 0 and select.select([pipe], [], [], 0 if ended else 0.005)[0]:
            data = os.read(pipe, 1 << 16)
            found += data
            if not data or (kind == "head" and b"\n" in found):
                os.close(pipe)
                pipe = -1
        if ended:
            if pipe >= 0:  # a process that the killed one has started holds the other end
                os.close(pipe)
            return found.decode(errors="replace"), status
        if time.perf_counter() > moment:
            victims = [pid] if kind != "worker" else _workers(pid)[-1:]
            for victim in victims:
                os.kill(victim, signal.SIGKILL)
            if kind == "worker" and victims:
                kind, moment = "none", moment + LONGEST
        time.sleep(0.005 if pipe < 0 else 0)


def _workers(pid: int) -> list[int]:
    """Return the worker processes that a process has now."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended
            command, stat = ((folder / name).read_text() for name in ("cmdline", "stat"))
            if PROGRAM in command and int(stat.rpartition(")")[2].split()[1]) == pid:
                found.append(int(folder.name))
    return found
