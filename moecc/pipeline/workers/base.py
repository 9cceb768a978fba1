"""What workers are, and the simplest: this process itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from functools import partial
from types import TracebackType
from typing import Any, Self, TypeVar

from moecc.pipeline.workers.packed import Packed
from moecc.pipeline.workers.service import Call

U = TypeVar("U")
R = TypeVar("R")

_END = object()


class Workers(ABC):
    """Something that computes units of work. count: how many of them at a time.

    It may be used for many calls; closing it ends what it has started.
    """

    count: int = 1

    @abstractmethod
    def run(
        self, function: Callable[..., R], units: Iterable[U], shared: object = None
    ) -> Iterator[R]:
        """Yield function(unit), or function(unit, shared) if shared is given, in order of units.

        The results are the same for any number of workers: a unit is computed by one thread,
        without gradients, on copies of its tensors. function: at the top level of a module; it
        draws no random numbers but from generators of its own. units: objects that pickle takes,
        with dense tensors on the CPU (those of `OnDevice` are on the device); at most count + 1 of
        them are taken ahead, and results and units that wait are 2 * count at most. shared: sent to
        each worker once; the function must not change it. Raise MoeccError if the function has no
        name by which it is found elsewhere, Mendable if workers end again and again at one unit,
        and what the function raises.
        """

    def close(self) -> None:
        """End what was started."""
        return None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class Alone(Workers):
    """This process, one unit after the other."""

    def run(
        self, function: Callable[..., R], units: Iterable[U], shared: object = None
    ) -> Iterator[R]:
        call = Packed.of(Call(function, shared)).aligned().unpacked()
        return map(partial(_result, call), units)


class OnDevice(Workers):
    """This process, whose units are on a GPU and stay there: each has many experts."""

    def run(
        self, function: Callable[..., R], units: Iterable[U], shared: object = None
    ) -> Iterator[R]:
        call = Call(function, shared)
        return map(call.here, units)


def _result(call: Any, unit: object) -> Any:
    return call.result(Packed.of(unit).copy()).copy().unpacked()


def in_order(units: Iterable[U], submit: Callable[[U], Future[R]], count: int) -> Iterator[R]:
    """Yield the results of units in their order, while `count` workers have work.

    One unit more than they work on is taken ahead; 2 * count units and results wait at most.
    """
    rest, ahead, more = iter(units), deque[Future[R]](), True
    while more or ahead:
        undone = [future for future in ahead if not future.done()]
        if more and len(undone) <= count and len(ahead) < 2 * count:
            unit: Any = next(rest, _END)
            more = unit is not _END
            if more:
                ahead.append(submit(unit))
            del unit  # it may be large
        elif ahead[0].done():
            yield ahead.popleft().result()
        else:
            wait(undone, return_when=FIRST_COMPLETED)
