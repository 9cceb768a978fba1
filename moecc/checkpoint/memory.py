"""How much memory this process may still take, on this machine and under its limits."""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

_UNKNOWN = 8 << 30  # bytes, if nothing tells
# A control group's files for its limit and its use, and the key in memory.stat for cached files
# that the kernel can drop.
_VERSION_2 = ("memory.max", "memory.current", "inactive_file")
_VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def free_memory(root: Path = Path("/")) -> int:
    """Return the bytes that are free for this process.

    This is the least that the machine, the control groups of the process and RLIMIT_AS leave.
    root: the folder of proc and sys.
    """
    found = [*_machine(root), *_groups(root), *_address_space(root)]
    return max(0, min(found)) if found else _UNKNOWN


def peak_memory() -> int:
    """Return the most bytes that this process has held so far, 0 where that isn't told.

    Its workers have theirs.
    """
    if importlib.util.find_spec("resource") is None:  # Windows
        return 0
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def release() -> None:
    """Give back to the machine what this process has freed, where the allocator can (glibc).

    Else a heap keeps the room of temporaries between values that stay.
    """
    trim = _trim()
    if trim is not None:
        trim(0)


@cache
def _trim() -> Callable[[int], int] | None:
    try:
        found: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # another C library, or Windows
        return None
    return found


def _machine(root: Path) -> Iterator[int]:
    for line in lines(root / "proc/meminfo"):
        if line.startswith("MemAvailable:"):
            yield int(line.split()[1]) * 1024


def _groups(root: Path) -> Iterator[int]:
    """Yield the bytes left in the process's control group and in each mounted one around it."""
    for folder, version in control_groups("memory", root):
        *names, dropped = _VERSION_2 if version == 2 else _VERSION_1
        limit, used = (_number(folder / name) for name in names)
        if limit is not None and used is not None:
            pairs = (line.split() for line in lines(folder / "memory.stat"))
            yield limit - used + sum(int(value) for key, value in pairs if key == dropped)


def control_groups(controller: str, root: Path) -> Iterator[tuple[Path, int]]:
    """Yield the folders of the process's control group and of those around it, and their version.

    Files of a version have other names. root: the folder of proc and sys.
    """
    for line in lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / (controller if controllers else "")
        own = top / path.lstrip("/")
        for folder in (own, *(p for p in own.parents if p.is_relative_to(top))):
            yield folder, 1 if controllers else 2


def _address_space(root: Path) -> Iterator[int]:
    if importlib.util.find_spec("resource") is None:  # Windows
        return
    import resource

    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    for line in lines(root / "proc/self/statm") if limit != resource.RLIM_INFINITY else ():
        yield limit - int(line.split()[0]) * resource.getpagesize()


def _number(file: Path) -> int | None:
    """Return the number in a file, or None if there is none ("max", no such file)."""
    text = "".join(lines(file))
    return int(text) if text.isdigit() else None


def lines(file: Path) -> list[str]:
    """Return the lines of a file of the system; none if it can't be read."""
    try:
        return file.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
