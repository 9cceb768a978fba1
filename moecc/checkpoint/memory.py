"""How much memory this process may still take, on this machine and under its limits."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
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


def _machine(root: Path) -> Iterator[int]:
    for line in _lines(root / "proc/meminfo"):
        if line.startswith("MemAvailable:"):
            yield int(line.split()[1]) * 1024


def _groups(root: Path) -> Iterator[int]:
    """Yield the bytes left in the process's control group and in each mounted one around it."""
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        mount, files = ("memory", _VERSION_1) if controllers else ("", _VERSION_2)
        top = root / "sys/fs/cgroup" / mount
        own = top / path.lstrip("/")
        for folder in (own, *(p for p in own.parents if p.is_relative_to(top))):
            limit, used = (_number(folder / name) for name in files[:2])
            if limit is not None and used is not None:
                pairs = (line.split() for line in _lines(folder / "memory.stat"))
                yield limit - used + sum(int(value) for key, value in pairs if key == files[2])


def _address_space(root: Path) -> Iterator[int]:
    if importlib.util.find_spec("resource") is None:  # Windows
        return
    import resource

    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    for line in _lines(root / "proc/self/statm") if limit != resource.RLIM_INFINITY else ():
        yield limit - int(line.split()[0]) * resource.getpagesize()


def _number(file: Path) -> int | None:
    """Return the number in a file, or None if there is none ("max", no such file)."""
    text = "".join(_lines(file))
    return int(text) if text.isdigit() else None


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
