"""How many processor cores this process may use, on this machine and under its limits."""

from __future__ import annotations

import os
from collections.abc import Iterator
from math import ceil
from pathlib import Path

from moecc.checkpoint.memory import control_groups, lines


def usable_cores(root: Path = Path("/")) -> int:
    """Return the number of cores: the least that its affinity and its control groups leave.

    A part of a core counts as one. root: the folder of proc and sys.
    """
    return max(1, min([_affinity(), *_quotas(root)]))


def _affinity() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _quotas(root: Path) -> Iterator[int]:
    """Yield the cores that each control group grants, if it grants a number."""
    for folder, version in control_groups("cpu", root):
        if version == 2:
            words = " ".join(lines(folder / "cpu.max")).split()
        else:
            files = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
            words = [word for name in files for word in lines(folder / name)]
        if len(words) == 2 and words[0].isdigit():  # else it is "max", or -1
            yield ceil(int(words[0]) / int(words[1]))
