"""Worker processes of this machine.

`concurrent.futures` has such a pool, but all of it breaks with one worker; its workers run the main
program of a script again, outlive a process that is killed, and get tensors as shared memory files.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from threading import Event, Lock
from typing import Any, TypeVar, cast

from moecc import registry
from moecc.errors import Mendable, debugging
from moecc.pipeline.workers.base import Workers, in_order
from moecc.pipeline.workers.packed import Packed
from moecc.pipeline.workers.service import Begin, Call, Do, opened
from moecc.types import Say

TRIES = 3  # workers for one unit
ONE_THREAD = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "MKL", "OPENBLAS", "VECLIB")}
_ADVICE = "memory may be short: give fewer --workers, or a machine with more of it"
_PROGRAM = str(Path(__file__).with_name("program.py"))
_PATIENCE = 5  # seconds until a process that has closed its pipes is killed
_SIGNALS = {s.value: s.name for s in signal.Signals}

U = TypeVar("U")
R = TypeVar("R")


class Ended(Exception):
    """A worker process has ended. code: its exit code, or minus the signal that ended it."""

    def __init__(self, code: int):
        self.code = code
        how = f"exit code {code}" if code >= 0 else _SIGNALS.get(-code, f"signal {-code}")
        super().__init__(how)


class Process:
    """A worker process, of one thread; it gets ready by itself.

    Raise Mendable if the system starts no more.
    """

    def __init__(self) -> None:
        self.call: Packed | None = None  # the one that it knows; None until it is ready
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", _PROGRAM],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=None if debugging() else subprocess.DEVNULL,
                bufsize=0,
                env={**os.environ, **ONE_THREAD},
            )
        except OSError as error:
            why = f"a worker can't be started: {error.strerror}; give fewer --workers"
            raise Mendable(why) from error
        self._requests = cast(FileIO, self._process.stdin)
        self._answers = cast(FileIO, self._process.stdout)
        path = json.dumps([str(folder) for folder in sys.path])
        with suppress(BrokenPipeError):
            self._requests.write(path.encode() + b"\n")

    def do(self, call: Packed, unit: Packed) -> Packed:
        """Return the answer to a unit.

        Raise Ended if the process has ended, Mendable if it can't start, and what is raised when it
        reads the call.
        """
        if self.call is None:
            self._await()
        if self.call is not call:
            self._begin(call)
        return self._ask(Do(unit))

    def forget(self) -> None:
        """Free what the last call shares. Raise Ended if the process has ended."""
        self._begin(Packed.of(None))

    @property
    def runs(self) -> bool:
        """Whether it hasn't ended."""
        return self._process.poll() is None

    def stop(self) -> None:
        """Kill the process; whoever waits for its answer gets Ended."""
        self._process.kill()

    def end(self) -> int:
        """Clear away a process that can't be asked any more; return its exit code."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=_PATIENCE)
        self._process.kill()
        self._requests.close()
        self._answers.close()
        return self._process.wait()

    def _await(self) -> None:
        try:
            Packed.receive(self._answers)
        except EOFError as error:
            ended = Ended(self.end())
            if ended.code < 0:
                raise ended from error
            advice = "MOECC_DEBUG=1 shows why, and --workers 1 needs none"
            raise Mendable(f"a worker can't start ({ended}); {advice}") from error

    def _begin(self, call: Packed) -> None:
        opened(self._ask(Begin(registry.SOURCES, call)))
        self.call = call

    def _ask(self, request: Begin | Do) -> Packed:
        try:
            Packed.of(request).send(self._requests)
            return Packed.receive(self._answers)
        except (OSError, EOFError) as error:
            raise Ended(self.end()) from error


class Processes(Workers):
    """Processes of this machine, started when they are needed, or before, and kept until `close`.

    say: takes a remark, once, if a worker is ended from outside.
    """

    def __init__(self, count: int, say: Say = lambda line: None):
        self.count, self._say = count, say
        self._lock = Lock()  # of what follows
        self._closed = self._noted = False
        self._idle: list[Process] = []
        self._busy: dict[Process, Event] = {}  # each with what says that its run is over

    def prepare(self) -> None:
        """Start all of them, so that they get ready while this process does something else."""
        with self._lock:
            while len(self._idle) < self.count:
                self._idle.append(Process())

    def run(
        self, function: Callable[..., R], units: Iterable[U], shared: object = None
    ) -> Iterator[R]:
        return self._run(Packed.of(Call(function, shared)), units)

    def close(self) -> None:
        """Kill the processes, whatever they are doing."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
            for process, over in self._busy.items():
                over.set()
                process.stop()
        for process in idle:
            process.stop()
            process.end()

    def _run(self, call: Packed, units: Iterable[U]) -> Iterator[Any]:
        over = Event()
        with ThreadPoolExecutor(self.count) as threads:

            def submit(unit: U) -> Future[Packed]:
                return threads.submit(self._answer, call, Packed.of(unit), over)

            try:
                yield from map(opened, in_order(units, submit, self.count))
            finally:
                self._stop(over)
        self._forget(call)

    def _stop(self, over: Event) -> None:
        """End a run; units that are being worked on are nobody's any more."""
        with self._lock:
            over.set()
            for process in [p for p, run in self._busy.items() if run is over]:
                process.stop()

    def _forget(self, call: Packed) -> None:
        with self._lock:
            for process in [p for p in self._idle if p.call is call]:
                try:
                    process.forget()
                except Ended:
                    self._idle.remove(process)

    def _answer(self, call: Packed, unit: Packed, over: Event) -> Packed:
        """Return the answer of a process to a unit; if it ends meanwhile, that of another one."""
        how = ""
        for _ in range(TRIES):
            try:
                with self._process(over) as process:
                    return process.do(call, unit)
            except Ended as ended:
                how = str(ended)
                self._note(how, over)
        raise Mendable(f"one unit of work ended {TRIES} workers, the last by {how}; {_ADVICE}")

    @contextmanager
    def _process(self, over: Event) -> Iterator[Process]:
        """Give a process that nothing else uses, a new one if there is none."""
        with self._lock:
            if over.is_set() or self._closed:
                raise CancelledError
            process = self._idle_process() or Process()
            self._busy[process] = over
        sound = False
        try:
            yield process
            sound = True
        finally:
            with self._lock:
                del self._busy[process]
                sound = sound and not over.is_set()  # else it may have been stopped
                if sound:
                    self._idle.append(process)
            if not sound:
                process.stop()
                process.end()

    def _idle_process(self) -> Process | None:
        """Take a process that has nothing to do. One that was killed is no unit's fault."""
        while self._idle:
            process = self._idle.pop()
            if process.runs:
                return process
            process.end()
        return None

    def _note(self, how: str, over: Event) -> None:
        with self._lock:
            if self._noted or over.is_set():
                return
            self._noted = True
        self._say(f"note: a worker was ended by {how}; its unit of work is done again")
