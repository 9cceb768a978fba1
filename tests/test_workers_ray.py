"""Units of work on a Ray cluster that is started here. Ray is an extra: `pip install 'moecc[ray]'`.

Nodes with other versions and lost nodes are not played; a lost worker process is.
"""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import units
from made import ROOT
from test_workers import PASS, assert_gone, until

from moecc.errors import Mendable, MoeccError, fault, may_pass
from moecc.pipeline.parse import find_pass
from moecc.pipeline.workers.base import Alone
from moecc.pipeline.workers.cluster import Ray

ray = pytest.importorskip("ray")


@pytest.fixture(scope="module")
def pool() -> Iterator[Ray]:
    """A local cluster of two workers."""
    stop = signal.getsignal(signal.SIGTERM)
    with Ray("local", 1 << 28, 2) as workers:
        assert signal.getsignal(signal.SIGTERM) == stop
        yield workers
    assert not ray.is_initialized()


def test_bits_and_order_are_those_of_one_process(pool: Ray) -> None:
    assert pool.count == 2
    matrices, shared = torch.randn(5, 300, 301)[:, :, 1:], torch.randn(300, 300)
    found = list(pool.run(units.factored, matrices, shared))
    assert all(map(torch.equal, found, Alone().run(units.factored, matrices, shared)))
    assert list(pool.run(units.slow_if_first, range(6))) == [i * i for i in range(6)]
    assert list(pool.run(units.slow_if_first, [])) == []


def test_a_function_finds_the_same_around_it(pool: Ray) -> None:
    shared = torch.randn(10_000)
    found = list(pool.run(units.facts, [{"a": torch.arange(3)}] * 6, shared))
    for one in found:
        assert torch.equal(one["unit"]["a"], torch.arange(3)) and one["threads"] == 1
        assert torch.equal(one["shared"], shared) and one["gradients"] is False
        assert one["variables"]["OMP_NUM_THREADS"] == "1"
    assert os.getpid() not in {one["pid"] for one in found}
    assert len({(one["pid"], one["place"]) for one in found}) <= 2  # read once by each


def test_a_pass_file_may_have_units_and_functions(pool: Ray, tmp_path: Path) -> None:
    """Also another one of its name, after that."""
    for number in (2, 4):
        file = tmp_path / str(number) / "halved.py"
        file.parent.mkdir()
        file.write_text(PASS.replace("unit.number / 2", f"unit.number / {number}"))
        module = sys.modules[find_pass(str(file)).__module__]
        file.unlink()
        assert list(pool.run(module.halves, [module.Unit(8)])) == [module.Unit(8 / number)]
    with pytest.raises(ZeroDivisionError) as caught:
        list(pool.run(module.fails, [module.Unit(1)]))
    assert f"({file}, line" in fault(caught.value, module.Halved)


def test_an_error_arrives_as_it_was(pool: Ray) -> None:
    with pytest.raises(MoeccError, match="no file") as caught:
        list(pool.run(units.failing, ["disk"]))
    assert may_pass(caught.value) and "in failing" in caught.value.__notes__[0]
    with pytest.raises(MoeccError, match="at the top level of a module"):
        pool.run(lambda unit: unit, [1])


def test_the_units_of_killed_workers_are_done_again(pool: Ray, tmp_path: Path) -> None:
    """And a unit that goes on killing them ends the run."""
    for name in ("once", "always"):
        (tmp_path / name).mkdir()
    once = [(i, tmp_path / "once", 1 if i == 1 else 0) for i in range(4)]
    assert list(pool.run(units.killed_first, once)) == [0, 1, 4, 9]
    assert len(list((tmp_path / "once").iterdir())) == 1
    with pytest.raises(Mendable, match=r"Ray gave up on a unit of work: .*; see Ray's logs"):
        list(pool.run(units.killed_first, [(1, tmp_path / "always", 9)]))
    assert len(list((tmp_path / "always").iterdir())) == 3


def test_a_run_that_is_left_stops_its_units(pool: Ray, tmp_path: Path) -> None:
    def source() -> Iterator[Path]:
        yield tmp_path / "first"
        until((tmp_path / "first").exists)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(pool.run(units.waiting, source()))
    assert_gone(tmp_path / "first")
    assert list(pool.run(units.slow_if_first, [3])) == [9]


def test_a_cluster_that_is_there_is_used_and_left(
    pool: Ray, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Ray("auto", 1 << 27, 1) as workers:
        assert workers.count == 2 and list(workers.run(math.sqrt, [9])) == [3]
        # which of the folders that modules come from a node has is its own matter
        with pytest.raises(MoeccError, match=r"lacks code: No module named 'units'; install there"):
            list(workers.run(units.slow_if_first, [3]))
    assert ray.is_initialized()
    with pytest.raises(MoeccError, match=r"has a CPU and 1000.00 GB of memory, as a unit of work"):
        Ray("auto", 10**12, 1)
    monkeypatch.setattr(torch, "__version__", "1.0")
    with pytest.raises(MoeccError, match=r"has moecc .*, torch 2.*, and this process .*torch 1\.0"):
        Ray("auto", 1 << 27, 1)
    with pytest.raises(MoeccError, match=r"torch 1\.0, CPU .*; results would differ"):
        list(pool.run(units.slow_if_first, [3]))
    assert list(pool.run(units.slow_if_first, [])) == []


def test_no_answer_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    for address in ("localhost:1", "ray://localhost:1"):
        says = f"no Ray cluster answers at {address}: .*Connection refused; if it runs and"
        with pytest.raises(MoeccError, match=says):
            Ray(address, 1, 1)


SCRIPT = """
import sys
from pathlib import Path
import units
from moecc.pipeline.workers.cluster import Ray

with Ray("local", 1 << 28, 1) as workers:
    list(workers.run(units.waiting, [Path(sys.argv[1])]))
"""


def test_no_worker_outlives_its_driver(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    marks = {stop: tmp_path / stop.name for stop in (signal.SIGKILL, signal.SIGINT)}
    drivers = {
        stop: subprocess.Popen(
            [sys.executable, str(script), str(mark)],
            env=variables,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        for stop, mark in marks.items()
    }
    until(lambda: all(mark.exists() for mark in marks.values()))
    drivers[signal.SIGKILL].kill()
    assert_gone(marks[signal.SIGKILL])
    os.killpg(drivers[signal.SIGINT].pid, signal.SIGINT)  # as Ctrl-C does
    errors = drivers[signal.SIGINT].communicate()[1]
    assert_gone(marks[signal.SIGINT])
    assert errors.count("Traceback") == 1 and errors.strip().endswith("KeyboardInterrupt")
