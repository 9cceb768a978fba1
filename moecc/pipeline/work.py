"""The work that passes have with a model, counted from its sizes, and the speed of this machine.

The unit of work of products and factorizations is the multiply-add, in float32 and one thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

# Rows of a projection whose errors count together, at most. A cut costs much: the example's
# divergence at 2 bit, of 256 rows, is 12 % larger with two blocks, 20 % with four, 34 % with one
# for each unit (0.00856, 0.00961, 0.01030, 0.01145). So only large experts are cut: work grows
# with the rows of a block, and so does memory.
BLOCK = 4096


def blocks(rows: int, units: int, most: int = BLOCK) -> int:
    """Return into how many blocks of at most `most` rows a projection is cut: as few as can be.

    All have equally many rows, and whole units: the hidden units that rows of gate_up make, or the
    channels of down. A single unit is a block even if it has more rows.
    """
    least = min(-(-rows // most), units)
    return next(count for count in range(least, units + 1) if units % count == 0)


def costs(rows: int, blocks: int) -> int:
    """Return the numbers of all blocks of costs of errors in `rows` outputs; 0 without blocks."""
    return rows * rows // blocks if blocks else 0


@dataclass(frozen=True)
class Experts:
    """The experts of a layer: E, N rows of gate_up, D hidden, F intermediate; k per token."""

    experts: int
    rows: int
    hidden: int
    intermediate: int
    top_k: int

    @property
    def shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """N rows and K columns of gate_up and of down."""
        return (self.rows, self.hidden), (self.hidden, self.intermediate)

    @property
    def blocks(self) -> tuple[int, int]:
        """Blocks of rows whose errors count together, of gate_up and of down."""
        return blocks(self.rows, self.intermediate), blocks(self.hidden, self.hidden)

    @property
    def weights(self) -> int:
        """Of one expert."""
        return sum(rows * columns for rows, columns in self.shapes)


@dataclass(frozen=True)
class Scope:
    """What a run goes through: layers with experts, and the calibration tokens."""

    layers: tuple[Experts, ...]
    tokens: int
    dense: int  # weights besides the routed experts that a token meets on its way to the head
    largest: int  # weights of the largest stage of them
    weighted: bool = False  # whether errors of outputs have costs of their own
    bits: int = 2  # of the widest codes
    row: int = 1024  # tokens of a calibration batch
    outputs: int = 0  # numbers that the model gives for a token

    @property
    def states(self) -> int:
        """Bytes of what is held of all tokens while passes work on a layer.

        Its inputs, those of its experts, and the float model's, and what an expert's tokens take.
        """
        return int(4 * (4 + 4 * self.share) * self.tokens * self.hidden)

    @property
    def share(self) -> float:
        """The part of all tokens that an expert sees, at most, if all see equally many."""
        return max((layer.top_k / layer.experts for layer in self.layers), default=0.0)

    @property
    def weights(self) -> int:
        """Of all routed experts."""
        return sum(layer.experts * layer.weights for layer in self.layers)

    @property
    def hidden(self) -> int:
        """The widest."""
        return max((layer.hidden for layer in self.layers), default=0)

    @property
    def expert(self) -> int:
        """Weights of the largest expert."""
        return max((layer.weights for layer in self.layers), default=0)

    @property
    def around(self) -> float:
        """Weights besides the routed experts that a token meets in a layer with experts."""
        return self.dense / max(len(self.layers), 1)

    @property
    def forward(self) -> float:
        """Multiply-adds of a token on its way through the layers."""
        return self.dense + sum(layer.top_k * layer.weights for layer in self.layers)


# multiply-adds that take as long as to decode a weight for a step of tuning, and to add up its
# gradients
DECODE = 110


@dataclass(frozen=True)
class Coding:
    """Weights that are coded: matrices [N, K].

    coupled: rows whose errors count together; 0: all count alike. how: tells ways of coding of
    unlike speed apart. code: codes a random [N, K] in this way, to be measured.
    """

    matrices: int
    rows: int
    columns: int
    coupled: int
    how: str
    code: Callable[[int, int], None]


@dataclass
class Work:
    """What a pass does, over all layers."""

    products: float = 0.0  # by workers
    factors: float = 0.0  # factorizations, by workers
    coded: list[Coding] = field(default_factory=list)  # by workers
    here: float = 0.0  # products in the process that runs the passes
    memory: float = 0.0  # bytes of that process, where it takes more than other passes do
    scratch: float = 0.0  # bytes on disk while the pass runs
    kept: float = 0.0  # bytes that it leaves on disk
    known: bool = True


class Working(Protocol):
    """A pass that knows its work."""

    def work(self, scope: Scope) -> Work: ...


def factor(size: int, blocks: int = 1) -> float:
    """Multiply-adds of the factor of error feedback (`metric.feedback_factor`) of [size, size].

    blocks: equal ones on the diagonal, nothing beside them.
    """
    return 2 / 3 * size**3 / blocks**2


# ---------------------------------------------------------------- speed


@dataclass
class Machine:
    """How fast a thread of this machine is. product, factor: multiply-adds a second."""

    product: float
    factor: float
    _known: dict[tuple[str, bool], tuple[float, float]] = field(default_factory=dict)

    @classmethod
    def measured(cls) -> Machine:
        """Measure this machine, in a second or so."""
        with one_thread():
            x = torch.randn(1024, 1024)
            product = 1024**3 / least(lambda: x @ x)
            found = factor(1024) / least(lambda: _factorize(x @ x.T + torch.eye(1024)))
        return cls(product, found)

    def seconds(self, coding: Coding) -> float:
        """The time to code these weights without factorizing their metrics."""
        key = coding.how, coding.coupled > 0
        if key not in self._known:
            self._known[key] = self._fitted(coding)
        constant, slope = self._known[key]
        count = coding.matrices * coding.rows * coding.columns
        width = coding.columns + coding.coupled
        return count * (constant + slope * width)

    def _fitted(self, coding: Coding) -> tuple[float, float]:
        """Seconds per weight: a constant, and a part that grows with the width of the metric."""
        found = []
        for rows, columns in ((512, 512), (512, 1536)):
            width = columns + (rows if coding.coupled else 0)
            with one_thread():
                took = least(partial(coding.code, rows, columns), 1)
            sizes = [columns, rows] if coding.coupled else [columns]
            took -= sum(map(factor, sizes)) / self.factor
            found.append((width, max(took, 0.0) / (rows * columns)))
        (narrow, fast), (wide, slow) = found
        slope = max(0.0, (slow - fast) / (wide - narrow))
        return max(0.0, fast - slope * narrow), slope

    def time(self, work: Work, workers: int, threads: int) -> float:
        """The time of a pass's work with so many workers, and threads in this process."""
        spread = work.products / self.product + work.factors / self.factor
        spread += sum(map(self.seconds, work.coded))
        return spread / workers + work.here / self.product / threads


def _factorize(matrix: Tensor) -> Tensor:
    """Do what `metric.feedback_factor` does."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(matrix))
    found: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return found


def least(call: Callable[[], object], times: int = 3) -> float:
    """Return the least time in seconds of some calls, after one that doesn't count."""
    call()
    found = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return max(min(found), 1e-9)


class one_thread:
    """Let PyTorch compute in one thread."""

    def __enter__(self) -> None:
        self.before = torch.get_num_threads()
        torch.set_num_threads(1)

    def __exit__(self, *_: object) -> None:
        torch.set_num_threads(self.before)


def each(scope: Scope) -> Iterator[tuple[Experts, int, int, int, int]]:
    """Yield every projection: its layer, N rows, K columns, blocks and tokens.

    Blocks of rows whose errors count together: 0 if all count alike. Tokens that reach its experts.
    """
    for layer in scope.layers:
        for (rows, columns), count in zip(layer.shapes, layer.blocks, strict=True):
            yield layer, rows, columns, count * scope.weighted, scope.tokens * layer.top_k
