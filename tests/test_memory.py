"""What memory is free, read from a made-up /proc and /sys: of the machine, of containers of both kinds, under RLIMIT_AS."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from moecc.checkpoint.memory import free_memory

MEBI = 1 << 20
MACHINE = {"proc/meminfo": "MemTotal: 9 kB\nMemAvailable:    8388608 kB\n"}  # 8 GiB
V2, V1 = "sys/fs/cgroup", "sys/fs/cgroup/memory"


def root(folder: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return folder


def v2(group: str, limit: str, used: int, dropped: int = 0) -> dict[str, str]:
    stat = f"anon 5\ninactive_file {dropped}\nactive_file 7\n"
    return {
        f"{V2}/{group}memory.max": limit,
        f"{V2}/{group}memory.current": f"{used}\n",
        f"{V2}/{group}memory.stat": stat,
    }


def v1(group: str, limit: int, used: int) -> dict[str, str]:
    return {
        f"{V1}/{group}memory.limit_in_bytes": f"{limit}\n",
        f"{V1}/{group}memory.usage_in_bytes": f"{used}\n",
    }


OWN_V2, OWN_V1 = (
    {"proc/self/cgroup": "0::/pod/box\n"},
    {"proc/self/cgroup": "5:cpu:/\n4:cpu,memory:/docker/a:b\n0::/\n"},
)
HUGE = 9223372036854771712  # version 1's word for no limit


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, 8192),  # nothing is known
        (MACHINE, 8192),
        (MACHINE | OWN_V2, 8192),
        (MACHINE | OWN_V2 | v2("pod/box/", "max\n", 50 * MEBI), 8192),
        (MACHINE | OWN_V2 | v2("pod/box/", f"{100 * MEBI}\n", 60 * MEBI), 40),
        (
            MACHINE | OWN_V2 | v2("pod/box/", f"{100 * MEBI}\n", 60 * MEBI, 15 * MEBI),
            55,
        ),  # with what it can drop
        (
            MACHINE
            | OWN_V2
            | v2("pod/box/", "max\n", MEBI)
            | v2("pod/", f"{90 * MEBI}\n", 60 * MEBI),
            30,
        ),
        (
            MACHINE | {"proc/self/cgroup": "0::/\n"} | v2("", f"{100 * MEBI}\n", 60 * MEBI),
            40,
        ),  # a namespace of its own
        (MACHINE | OWN_V2 | v2("pod/box/", f"{100 * MEBI}\n", 101 * MEBI), 0),
        (MACHINE | OWN_V1 | v1("docker/a:b/", HUGE, MEBI), 8192),
        (MACHINE | OWN_V1 | v1("docker/a:b/", 100 * MEBI, 60 * MEBI), 40),
        (
            MACHINE | OWN_V1 | v1("", 100 * MEBI, 70 * MEBI),
            30,
        ),  # mounted at the container's own group
        (
            MACHINE | OWN_V1 | v2("", f"{100 * MEBI}\n", 80 * MEBI) | v1("", HUGE, MEBI),
            20,
        ),  # both kinds at once
        (OWN_V2 | v2("pod/box/", f"{100 * MEBI}\n", 60 * MEBI), 40),
    ],
)
def test_free_memory_is_the_least_that_anything_leaves(
    tmp_path: Path, files: dict[str, str], free: int
) -> None:
    assert free_memory(root(tmp_path, files)) == free * MEBI


def test_a_limit_of_address_space_counts_what_is_taken_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = resource.getpagesize()
    monkeypatch.setattr(resource, "getrlimit", lambda what: (300 * page, 400 * page))
    assert (
        free_memory(root(tmp_path, MACHINE | {"proc/self/statm": "120 30 10 1 0 50 0\n"}))
        == 180 * page
    )


def test_this_machine_has_some() -> None:
    assert 0 < free_memory() < 1 << 50
