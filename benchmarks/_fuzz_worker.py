"""A forked process that runs the fuzzer's commands, each in a folder of its own, under limits."""

from __future__ import annotations

import gc
import io
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NoReturn, TypeAlias

SECONDS = 10  # of one core
MEMORY = 1 << 30  # bytes beyond those that the process has before
PATIENCE = 300  # seconds for which a process may sleep: it waits for something, such as a pipe
_SLACK = 256 << 20  # of the limit on addresses: stacks and libraries
Done: TypeAlias = tuple[int, float, int]  # exit code or signal, seconds of one core, bytes


@dataclass(frozen=True)
class Task:
    """A command that runs in `place`/run and prints to `place`/out and err.

    debug: with tracebacks.
    """

    place: Path
    command: Sequence[str]
    debug: bool
    seconds: int = SECONDS

    @property
    def folder(self) -> Path:
        return self.place / "run"

    @property
    def streams(self) -> tuple[Path, Path]:
        return self.place / "out", self.place / "err"


class Worker:
    """The process. perform: runs a command and returns its exit code. ran: tasks so far."""

    def __init__(self, perform: Callable[[Sequence[str]], int]):
        self.ran = 0
        self._pipe, other = Pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        gc.freeze()  # so that the process copies no page to count references
        self._process = os.fork()
        if self._process == 0:
            self._pipe.close()
            _serve(other, perform)
        other.close()

    def run(self, task: Task) -> Done:
        """Run a task. After a signal the process is gone."""
        self.ran += 1
        try:
            self._pipe.send(task)
            self._wait()
            found: Done = self._pipe.recv()
            return found
        except (EOFError, OSError):
            _, status, usage = os.wait4(self._process, 0)
            self._pipe.close()
            return os.waitstatus_to_exitcode(status) or -1, usage.ru_utime + usage.ru_stime, 0

    def _wait(self) -> None:
        """Wait for an answer; end the process if it does nothing for too long."""
        slept = 0
        while not self._pipe.poll(1):
            slept += asleep(self._process)
            if slept > PATIENCE:
                os.kill(self._process, signal.SIGKILL)

    def end(self) -> None:
        self._pipe.close()
        os.kill(self._process, signal.SIGKILL)
        os.waitpid(self._process, 0)


def _serve(pipe: Connection, perform: Callable[[Sequence[str]], int]) -> NoReturn:
    """Run tasks until nobody sends any."""
    while True:
        try:
            task: Task = pipe.recv()
        except EOFError:
            os._exit(0)
        _enter(task)
        start, size = _seconds(), _memory("VmRSS")
        code = 70
        try:
            code = perform(task.command)
        except BaseException:
            os.write(2, traceback.format_exc().encode("utf-8", "backslashreplace"))
        sys.stdout.flush()
        sys.stderr.flush()
        pipe.send((code, _seconds() - start, _memory("VmHWM") - size))


def _enter(task: Task) -> None:
    """Give this process the folder, the streams and the limits of a task."""
    os.environ["MOECC_DEBUG"] = "1" if task.debug else "0"
    os.chdir(task.folder)
    for number, path in enumerate((Path(os.devnull), *task.streams)):
        opened = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        os.dup2(opened, number)
        os.close(opened)
    sys.stdin = open(0, encoding="utf-8", closefd=False)
    for name, number in (("stdout", 1), ("stderr", 2)):
        raw = io.FileIO(number, "w", closefd=False)
        setattr(sys, name, io.TextIOWrapper(raw, encoding="utf-8", write_through=True))
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    limit_seconds(task.seconds)
    limits = {
        resource.RLIMIT_AS: _memory("VmSize") + MEMORY + _SLACK,
        resource.RLIMIT_FSIZE: MEMORY,
        resource.RLIMIT_CORE: 0,
    }
    for kind, most in limits.items():
        resource.setrlimit(kind, (most, resource.getrlimit(kind)[1]))


def limit_seconds(seconds: int) -> None:
    """Let SIGXCPU end this process if it uses more than so many seconds of a core from now on."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    most = int(used.ru_utime + used.ru_stime) + 1 + seconds
    resource.setrlimit(resource.RLIMIT_CPU, (most, resource.getrlimit(resource.RLIMIT_CPU)[1]))


def asleep(process: int) -> bool:
    """Tell whether a process waits for something else than a core."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return True
    return state in "SD"


def _seconds() -> float:
    """Return the seconds of one core that this process and its children have used."""
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in both)


def _memory(what: str) -> int:
    """Return a size of this process in bytes, by its name in /proc."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{what}:"))
