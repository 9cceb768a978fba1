"""What is done with a unit of work, wherever it runs.

Every unit is computed by one thread, without gradients, on tensors that nothing else has
(`Packed`). So its result is the same in this process, in a worker and on another machine of this
kind.
"""

from __future__ import annotations

import os
import pickle
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from io import FileIO
from queue import SimpleQueue
from typing import Any, Self

import torch

from moecc import registry
from moecc.errors import FRAMES, MoeccError, debugging
from moecc.pipeline.workers.packed import Packed


@dataclass(frozen=True)
class Settings:
    """What decides in torch how a number is computed."""

    deterministic: bool = field(default_factory=torch.are_deterministic_algorithms_enabled)
    precision: str = field(default_factory=torch.get_float32_matmul_precision)

    def apply(self) -> None:
        """Make them those of this process. Setting one that is set already takes seconds."""
        now = Settings()
        if self.deterministic != now.deterministic:
            torch.use_deterministic_algorithms(self.deterministic)
        if self.precision != now.precision:
            torch.set_float32_matmul_precision(self.precision)


@dataclass(frozen=True)
class Call:
    """A function of units, and what it is given besides: nothing if shared is None."""

    function: Callable[..., object]
    shared: object = None
    settings: Settings = field(default_factory=Settings)

    def __post_init__(self) -> None:
        """Raise MoeccError if another process can't find the function by its name."""
        name, module = self.function.__qualname__, self.function.__module__
        found: object = sys.modules.get(module)
        for part in name.split("."):
            found = getattr(found, part, None)
        if module == "__main__" or found is not self.function:
            advice = "define it at the top level of a module, as of the pass that calls it"
            raise MoeccError(f"workers can't be sent {name} of {module}; {advice}")

    def result(self, unit: Packed) -> Packed:
        """Return what the function gives for a unit."""
        with _one_thread():
            return Packed.of(self.here(unit.unpacked()))

    @torch.no_grad()
    def here(self, unit: object) -> Any:
        """Return what the function gives for a unit, without gradients and wherever it is."""
        return self.function(unit, *(() if self.shared is None else (self.shared,)))


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class Failure:
    """An error of a worker: pickled, with those that it came from, and where it was raised."""

    errors: list[bytes]
    frames: list[tuple[str, int]]  # file and line, the innermost last
    text: str  # the traceback

    @classmethod
    def of(cls, error: BaseException) -> Self:
        frames = [(f.filename, f.lineno or 0) for f in traceback.extract_tb(error.__traceback__)]
        text = "".join(traceback.format_exception(error))
        return cls([_pickled(e) for e in _causes(error)], frames, text)

    def error(self) -> BaseException:
        """Return the error as it was, with the worker's traceback as a note."""
        found: list[BaseException] = [pickle.loads(data) for data in self.errors]
        error, *causes = found
        for effect, cause in zip(found, causes, strict=False):
            effect.__cause__ = cause
        error.add_note(f"in a worker:\n{self.text}")
        setattr(error, FRAMES, self.frames)
        return error


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _pickled(error: BaseException) -> bytes:
    """Pickle an error; one that can't be becomes a RuntimeError of its text."""
    try:
        data = pickle.dumps(error)
        if type(pickle.loads(data)) is type(error):
            return data
    except Exception:
        pass
    return pickle.dumps(RuntimeError(f"{type(error).__name__}: {error}"))


def opened(answer: Packed) -> object:
    """Return what is in an answer; raise the error that it holds."""
    found = answer.unpacked()
    if isinstance(found, Failure):
        raise found.error()
    return found


def answer(work: Callable[[], Packed]) -> Packed:
    """Return what `work` gives, or the error that it raises."""
    try:
        return work()
    except (Exception, SystemExit) as error:  # a library's exit would end the worker
        return Packed.of(Failure.of(error))


@dataclass(frozen=True)
class Begin:
    """The request to keep a call (or None) for the units that come.

    sources: of modules that are known by the path of a file.
    """

    sources: registry.Sources
    call: Packed


@dataclass(frozen=True)
class Do:
    """The request to call the function with a unit."""

    unit: Packed


class Service:
    """What a worker process knows from one request to the next."""

    call: Call | None = None

    def handle(self, request: Packed) -> Packed:
        """Do what is asked; return the answer."""
        asked = request.unpacked()
        if isinstance(asked, Do):
            assert self.call is not None
            return self.call.result(asked.unit)
        assert isinstance(asked, Begin)
        registry.take(asked.sources)
        call = asked.call.unpacked()
        assert call is None or isinstance(call, Call)
        if call is not None:
            call.settings.apply()
        self.call = call
        return Packed.of(None)


def serve(requests: SimpleQueue[Packed], answers: FileIO) -> None:
    """Answer requests for ever; the first answer, to none, says that the process is ready."""
    if not debugging():
        sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")
    service = Service()
    Packed.of(None).send(answers)
    while True:
        answer(partial(service.handle, requests.get())).send(answers)
