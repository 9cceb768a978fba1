"""Units of work for the tests of workers, which import this and no more."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from moecc.errors import MoeccError


def facts(unit: object, shared: object = None) -> dict[str, object]:
    """Return what a function finds around it."""
    return {
        "pid": os.getpid(),
        "unit": unit,
        "shared": shared,
        "place": shared.data_ptr() if isinstance(shared, Tensor) else None,
        "threads": torch.get_num_threads(),
        "gradients": torch.is_grad_enabled(),
        "precision": torch.get_float32_matmul_precision(),
        "path": sys.path,
        "argv": sys.argv,
        "ended first": Path("/proc/self/oom_score_adj").read_text(encoding="utf-8"),
        "variables": {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "A_VARIABLE")},
    }


def factored(matrix: Tensor, shared: Tensor) -> Tensor:
    """Return a result whose last bits depend on threads, strides and addresses."""
    square = matrix @ matrix.T @ shared
    return torch.linalg.cholesky(square @ square.T + 1e3 * torch.eye(len(matrix))).sum(1)


def slow_if_first(number: int) -> int:
    """The units after the first are done before it."""
    time.sleep(0.2 if number == 0 else 0)
    return number * number


def talkative(number: int) -> int:
    """A unit that prints, and reads what would be the next request."""
    print("printed")
    print("printed", file=sys.stderr)
    os.write(1, b"written\n")
    return number + len(sys.stdin.read())


def killed_first(unit: tuple[int, Path, int]) -> int:
    """Kill this process when it is called for the first `times`, with marks in a folder."""
    number, marks, times = unit
    if times:
        made = marks / str(len(list(marks.iterdir())))
        if int(made.name) < times:
            made.touch()
            os.kill(os.getpid(), signal.SIGKILL)
    return number * number


class Stubborn(Exception):
    """An error that pickle can't make again."""

    def __init__(self, first: str, second: str):
        super().__init__(f"{first} and {second}")


def failing(kind: str) -> None:
    """Raise an error of a kind."""
    if kind == "bad input":
        raise MoeccError("this is wrong; do that")
    if kind == "disk":
        try:
            open("/nothing/here", "rb")
        except OSError as error:
            raise MoeccError("no file") from error
    if kind == "stubborn":
        raise Stubborn("one", "two")
    if kind == "exit":
        sys.exit(3)
    raise ZeroDivisionError("a fault")


def waiting(mark: Path) -> None:
    """Note the number of this process and stay."""
    part = mark.with_suffix(".part")
    part.write_text(str(os.getpid()), encoding="utf-8")
    part.rename(mark)
    time.sleep(600)
