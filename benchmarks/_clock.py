"""The time of a call, and the bandwidth of memory, on a GPU or on the CPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import TypeAlias

import torch

Call: TypeAlias = Callable[[], object]


class Clock:
    """Microseconds of a call: a graph with a cold L2 cache on a GPU, plain calls on the CPU."""

    def __init__(self, device: str, repeats: int):
        self.device, self.repeats = device, repeats
        size = 64 << 20 if device == "cuda" else 1
        self.flush = torch.empty(size, dtype=torch.int32, device=device)

    def __call__(self, call: Call) -> tuple[float, bool]:
        """Return the median, and whether the call ran as a graph."""
        if self.device == "cpu":
            return self._wall(call), False
        try:
            run, graph = self.captured(call), True
        except RuntimeError:  # a call that synchronises cannot be captured
            torch.cuda.synchronize()
            run, graph = call, False
        times = []
        for _ in range(self.repeats):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.flush.zero_()
            start.record()
            run()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1000)
        return statistics.median(times), graph

    def captured(self, call: Call) -> Call:
        """Return the replay of a call as a graph; on the CPU, the call itself."""
        if self.device == "cpu":
            return call
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph.replay

    def wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def _wall(self, call: Call) -> float:
        times = []
        for _ in range(self.repeats):
            start = time.perf_counter()
            call()
            times.append((time.perf_counter() - start) * 1e6)
        return statistics.median(times)

    def bandwidth(self) -> float:
        """Return bytes per second, read and written.

        A kernel moves them: in a graph, a copy would run on the copy engine, which is slower.
        """
        count = (1 << 29) if self.device == "cuda" else 1 << 20
        a, b = (torch.ones(count, device=self.device) for _ in range(2))
        microseconds, _ = self(lambda: torch.mul(a, 2.0, out=b))
        return 2 * a.nbytes / microseconds * 1e6
