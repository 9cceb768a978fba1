"""Free memory and usable cores, from a made-up /proc and /sys: machine, control groups, limits."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest

from moecc.checkpoint.cores import usable_cores
from moecc.checkpoint.memory import free_memory

MEBI = 1 << 20
MACHINE = {"proc/meminfo": "MemTotal: 9 kB\nMemAvailable:    8388608 kB\n"}  # 8 GiB
OWN_V2 = {"proc/self/cgroup": "0::/pod/box\n"}
OWN_V1 = {"proc/self/cgroup": "5:cpu:/\n4:cpu,memory:/docker/a:b\n0::/\n"}
NAMESPACE_V2 = {"proc/self/cgroup": "0::/\n"}
HUGE = 9223372036854771712  # version 1's word for no limit


def root(folder: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return folder


def v2(group: str, limit: int | None, used: int, dropped: int = 0) -> dict[str, str]:
    """The files of a control group of version 2, from its numbers in MiB; no limit for None."""
    path = f"sys/fs/cgroup/{group}"
    return {
        f"{path}memory.max": "max\n" if limit is None else f"{limit * MEBI}\n",
        f"{path}memory.current": f"{used * MEBI}\n",
        f"{path}memory.stat": f"anon 5\ninactive_file {dropped * MEBI}\nactive_file 7\n",
    }


def v1(group: str, limit: int | None, used: int) -> dict[str, str]:
    """The same for version 1."""
    path = f"sys/fs/cgroup/memory/{group}"
    return {
        f"{path}memory.limit_in_bytes": f"{HUGE if limit is None else limit * MEBI}\n",
        f"{path}memory.usage_in_bytes": f"{used * MEBI}\n",
    }


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, 8192),  # nothing is known
        (MACHINE, 8192),
        (MACHINE | OWN_V2, 8192),
        (MACHINE | OWN_V2 | v2("pod/box/", None, 50), 8192),
        (MACHINE | OWN_V2 | v2("pod/box/", 100, 60), 40),
        (MACHINE | OWN_V2 | v2("pod/box/", 100, 60, 15), 55),  # the kernel can drop 15
        (MACHINE | OWN_V2 | v2("pod/box/", None, 1) | v2("pod/", 90, 60), 30),
        (MACHINE | NAMESPACE_V2 | v2("", 100, 60), 40),
        (MACHINE | OWN_V2 | v2("pod/box/", 100, 101), 0),
        (MACHINE | OWN_V1 | v1("docker/a:b/", None, 1), 8192),
        (MACHINE | OWN_V1 | v1("docker/a:b/", 100, 60), 40),
        (MACHINE | OWN_V1 | v1("", 100, 70), 30),  # mounted at the container's own group
        (MACHINE | OWN_V1 | v2("", 100, 80) | v1("", None, 1), 20),  # both versions at once
        (OWN_V2 | v2("pod/box/", 100, 60), 40),
    ],
)
def test_free_memory_is_the_least_that_anything_leaves(
    tmp_path: Path, files: dict[str, str], free: int
) -> None:
    assert free_memory(root(tmp_path, files)) == free * MEBI


def test_a_limit_on_address_space_leaves_its_unused_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = resource.getpagesize()
    monkeypatch.setattr(resource, "getrlimit", lambda what: (300 * page, 400 * page))
    statm = {"proc/self/statm": "120 30 10 1 0 50 0\n"}
    assert free_memory(root(tmp_path, MACHINE | statm)) == 180 * page


def test_this_machine_has_free_memory() -> None:
    assert 0 < free_memory() < 1 << 50


def quota_v2(group: str, quota: str) -> dict[str, str]:
    return {f"sys/fs/cgroup/{group}cpu.max": f"{quota} 100000\n"}


def quota_v1(group: str, quota: str) -> dict[str, str]:
    files = {"cpu.cfs_quota_us": f"{quota}\n", "cpu.cfs_period_us": "100000\n"}
    return {f"sys/fs/cgroup/cpu/{group}{name}": text for name, text in files.items()}


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 6),  # the affinity
        (OWN_V2, 6),
        (OWN_V2 | quota_v2("pod/box/", "max"), 6),
        (OWN_V2 | quota_v2("pod/box/", "300000"), 3),
        (OWN_V2 | quota_v2("pod/box/", "310000"), 4),  # a part of a core counts as one
        (OWN_V2 | quota_v2("pod/box/", "max") | quota_v2("pod/", "50000"), 1),
        (OWN_V2 | quota_v2("pod/box/", "900000"), 6),
        (OWN_V1 | quota_v1("docker/a:b/", "-1"), 6),
        (OWN_V1 | quota_v1("docker/a:b/", "200000"), 2),
        (OWN_V1 | quota_v1("", "400000"), 4),  # mounted at the container's own group
    ],
)
def test_usable_cores_are_the_least_that_anything_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], cores: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(6))
    assert usable_cores(root(tmp_path, files)) == cores


def test_a_system_without_affinities_has_a_number_of_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")
    for count in (5, None):
        monkeypatch.setattr(os, "cpu_count", lambda count=count: count)
        assert usable_cores(tmp_path) == (count or 1)
