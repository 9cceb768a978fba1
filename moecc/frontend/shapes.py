"""The shapes for which a trace holds, found by evaluating torch.export's guards on many shapes.

The guards are assumptions about the input's batch and sequence. Many hold for every shape
(min(4, S) <= S). Others cut off sizes at which a dimension would be 1 (S - 1 != 1). Some bound the
sequence; then the graph is a loop unrolled for one length.
"""

from __future__ import annotations

import math
from types import CodeType
from typing import SupportsFloat

import torch
from torch.export import ExportedProgram

from moecc.errors import MoeccError
from moecc.ir.restriction import Restriction

BATCHES = (1, 2, 3, 8)
SEQUENCES = (
    *range(1, 513),
    1000,
    1023,
    1024,
    1025,
    2047,
    2048,
    4095,
    4096,
    8192,
    32768,
    131072,
    1048576,
)
SHORT = 4  # a trace may lose sequences up to here: generation and calibration use longer ones


def restriction(program: ExportedProgram) -> tuple[Restriction, bool]:
    """Return for which shapes `program` holds, and whether long sequences are cut off.

    Raise MoeccError if the trace holds for some batch sizes only, or for lengths that are no range.
    """
    guards = [
        compile(str(guard), "guard", "eval")
        for guard in getattr(program, "_guards_code", None) or ()
    ]
    highest = _highest_sequence(program)
    batches = [n for n in BATCHES if n != 1]
    if not all(
        _holds(guards, n, s) == _holds(guards, batches[0], s) for n in batches for s in SEQUENCES
    ):
        raise MoeccError("the trace would hold for some batch sizes only")
    allowed = [s for s in SEQUENCES if s <= highest and _holds(guards, batches[0], s)]
    lost = [s for s in SEQUENCES if s not in set(allowed)]
    if not lost:
        return Restriction(), False
    if max(lost) <= SHORT:
        return Restriction(excluded=tuple(lost)), False
    low, high = min(allowed, default=0), max(allowed, default=0)
    if 0 < low <= SHORT and allowed == [s for s in SEQUENCES if low <= s <= high]:
        return Restriction(low, high), True
    raise MoeccError(f"the trace would hold for some sequence lengths only, not for {lost[0]}")


def _highest_sequence(program: ExportedProgram) -> float:
    """Return the upper bound of the sequence; raise MoeccError if the batch has one."""
    ids = next(n for n in program.graph.nodes if n.name in program.graph_signature.user_inputs)
    ranges = {str(symbol): interval.upper for symbol, interval in program.range_constraints.items()}
    batch, sequence = (ranges.get(str(size), size) for size in ids.meta["val"].shape)
    if math.isfinite(_number(batch)):
        raise MoeccError(f"the trace would hold for batches up to {batch} only")
    return _number(sequence)


def _number(bound: SupportsFloat) -> float:
    """Return a bound as a float; torch writes infinity in three ways."""
    if getattr(bound, "is_finite", True) is False or str(bound) in ("int_oo", "oo", "inf"):
        return math.inf
    value = float(bound)
    return math.inf if value >= 2**31 else value


def _holds(guards: list[CodeType], batch: int, sequence: int) -> bool:
    ids = torch.empty(batch, sequence, device="meta", dtype=torch.int64)
    names = {"L": {"input_ids": ids}, "min": min, "max": max, "math": math, "torch": torch}
    try:
        return all(eval(guard, {"__builtins__": {}}, names) for guard in guards)
    except Exception as error:
        raise MoeccError(f"the trace would hold for some shapes only ({error})") from error
