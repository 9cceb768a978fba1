"""What a person can plan by: a line per layer, with the time that is left, and one at the end."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from moecc.checkpoint.files import size
from moecc.checkpoint.memory import peak_memory
from moecc.ir.tensors import CPU
from moecc.pipeline.device import peak
from moecc.types import Say


def duration(seconds: float) -> str:
    """Return a time as people read it: 8.4 s, 12 min, 3.5 h."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class Pace:
    """The pace of passes that go through the layers together.

    stages: those in which they have work. until: what comes after the last one, for the lines.
    device: what computes.
    """

    def __init__(
        self,
        stages: Sequence[int],
        tokens: int,
        until: str,
        say: Say,
        device: torch.device = CPU,
    ):
        self.stages, self.tokens, self.until, self.say = list(stages), tokens, until, say
        self.device = device
        self.start = time.perf_counter()
        self.times: list[float] = []  # of the layers that were done in this process

    def begin(self) -> None:
        """Note that the work on a layer begins."""
        self.start = time.perf_counter()

    def layer(self, stage: int, errors: Sequence[float]) -> None:
        """Say what a layer has cost. errors: in-sample errors of its projections."""
        if stage not in self.stages:
            return
        took = time.perf_counter() - self.start
        self.times.append(took)
        error = f"error {sum(errors) / len(errors):.4f}, " if errors else ""
        left = sum(s > stage for s in self.stages) * sum(self.times) / len(self.times)
        rest = f", about {duration(left)} left{self.until}" if left else ""
        where = f"layer {stage - 1}, {self.stages.index(stage) + 1} of {len(self.stages)}"
        memory = f"at most {_most_memory(self.device)}"
        self.say(f"{where}: {error}{self.tokens} tokens, {duration(took)}, {memory}{rest}")


def total(start: float, device: torch.device = CPU) -> str:
    """Return the line at the end of a run on a device that began at `start`, of perf_counter."""
    took = duration(time.perf_counter() - start)
    return f"took {took} and at most {_most_memory(device)}"


def _most_memory(device: torch.device) -> str:
    there = peak(device)
    return f"{size(peak_memory())} of memory" + (f", {size(there)} of the GPU's" if there else "")
