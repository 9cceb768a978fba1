"""Workers: order and bounds, the same bits anywhere, what becomes of deaths and errors."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from io import FileIO
from pathlib import Path

import pytest
import torch
import units
from hypothesis import given
from hypothesis import strategies as st
from made import ROOT, Compile
from safetensors.torch import load_file
from torch import Tensor

from moecc.errors import Mendable, MoeccError, fault, may_pass
from moecc.ir.tensors import CPU
from moecc.pipeline.parse import find_pass
from moecc.pipeline.workers import base, choice, cluster, processes
from moecc.pipeline.workers.base import Alone, Workers, in_order
from moecc.pipeline.workers.packed import Packed
from moecc.pipeline.workers.processes import Processes

PATIENCE = 60  # seconds, for what takes a moment


@pytest.fixture(scope="module")
def said() -> list[str]:
    """What `pool` remarks."""
    return []


@pytest.fixture(scope="module")
def pool(said: list[str]) -> Iterator[Processes]:
    """Two processes, for all tests."""
    with pytest.MonkeyPatch.context() as patch, Processes(2, said.append) as workers:
        patch.setenv("A_VARIABLE", "as here")
        yield workers


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


# ---------------------------------------------------------------- order and bounds


@given(st.integers(1, 4), st.integers(0, 12), st.randoms(use_true_random=False))
def test_results_come_in_order_and_few_units_are_taken_ahead(
    count: int, total: int, random: object
) -> None:
    """Whichever is done next. While one is awaited, every worker has one, and another waits."""
    taken = given = 0
    futures: list[Future[int]] = []

    def source() -> Iterator[int]:
        nonlocal taken
        for number in range(total):
            taken += 1
            yield number

    def submit(number: int) -> Future[int]:
        futures.append(Future())
        return futures[-1]

    def wait(undone: list[Future[int]], return_when: str) -> None:
        assert undone == [f for f in futures if not f.done()]
        assert len(undone) <= count + 1 and taken - given <= 2 * count
        assert len(undone) == count + 1 or taken - given == 2 * count or taken == total
        done = random.choice(undone)  # type: ignore[attr-defined]
        done.set_result(futures.index(done))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "wait", wait)
        for result in in_order(source(), submit, count):
            assert result == given
            given += 1
    assert given == taken == total


def test_one_unit_at_a_time_is_taken_by_this_process_alone() -> None:
    taken: list[int] = []
    results = Alone().run(units.slow_if_first, (taken.append(i) or i for i in range(3)))
    assert taken == []
    for i in range(3):
        assert next(results) == i * i and len(taken) == i + 1


def test_results_of_processes_come_in_order(pool: Processes) -> None:
    assert list(pool.run(units.slow_if_first, iter(range(5)))) == [0, 1, 4, 9, 16]
    assert list(pool.run(units.slow_if_first, [])) == []


# ---------------------------------------------------------------- the same everywhere


def test_bits_are_those_of_one_thread_on_dense_tensors(pool: Processes) -> None:
    """However many threads this process has, and whatever the tensors are views of."""
    whole, shared = torch.randn(3, 301, 302), torch.randn(301, 302)[1:, 1:301].mT
    views = [whole[0, 1:, 1:301], whole[1, 1:, 1:301].mT, whole[2, :300, 2:]]
    dense = [units.factored(v.contiguous(), shared.contiguous()) for v in views]
    torch.set_num_threads(2)
    try:
        alone = list(Alone().run(units.factored, views, shared))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    apart = list(pool.run(units.factored, views, shared))
    assert len(alone) == len(apart) == 3
    assert all(map(torch.equal, alone, dense)) and all(map(torch.equal, apart, dense))


@pytest.mark.parametrize("where", ["alone", "pool"])
def test_a_function_finds_the_same_around_it(where: str, pool: Processes) -> None:
    workers: Workers = Alone() if where == "alone" else pool
    torch.set_float32_matmul_precision("high")
    try:
        (found,) = workers.run(units.facts, [{"a": torch.arange(3), "b": Path("c")}])
    finally:
        torch.set_float32_matmul_precision("highest")
    assert (found["pid"] == os.getpid()) == (where == "alone")
    assert torch.equal(found["unit"]["a"], torch.arange(3)) and found["unit"]["b"] == Path("c")
    assert found["shared"] is None and found["threads"] == 1 and found["gradients"] is False
    assert found["precision"] == "high" and found["path"] == sys.path
    if where == "pool":
        assert found["variables"] == {"OMP_NUM_THREADS": "1", "A_VARIABLE": "as here"}
        assert found["argv"] == [processes._PROGRAM]  # not the program of this process
        assert int(found["ended first"]) == 500  # rather than this process


def test_what_is_shared_is_sent_to_each_worker_once(pool: Processes) -> None:
    shared = torch.randn(1000)
    found = list(pool.run(units.facts, range(6), shared))
    assert all(torch.equal(f["shared"], shared) for f in found)
    assert len({(f["pid"], f["place"]) for f in found}) == len({f["pid"] for f in found}) <= 2
    assert all(p.call is not None and p.call.tensors == [] for p in pool._idle)  # it is freed


def test_a_unit_that_prints_disturbs_nothing(
    pool: Processes, capfd: pytest.CaptureFixture[str]
) -> None:
    assert list(pool.run(units.talkative, range(3))) == [0, 1, 2]
    assert capfd.readouterr() == ("", "")


VALUES = {
    "views": lambda: torch.arange(24.0).view(2, 3, 4)[:, 1:, ::2].mT,
    "no elements": lambda: torch.empty(0, 3),
    "a number": lambda: torch.tensor(5, dtype=torch.int16),
    "bfloat16": lambda: torch.randn(5).bfloat16(),
    "8 bits": lambda: torch.randn(5).to(torch.float8_e4m3fn),
    "truth": lambda: torch.tensor([True, False]),
    "conjugates": lambda: torch.randn(3, dtype=torch.complex64).conj(),
    "gradients": lambda: torch.nn.Parameter(torch.randn(3)),
}


@pytest.mark.parametrize("name", VALUES)
def test_tensors_travel_through_a_pipe(name: str) -> None:
    value = VALUES[name]()
    reading, writing = os.pipe()
    with FileIO(reading) as source, FileIO(writing, "w") as sink:
        Packed.of([{"a": value}, value, "text"]).send(sink)
        ((inner, again, text),) = [Packed.receive(source).unpacked()]
    assert inner["a"] is again and text == "text"
    assert again.dtype == value.dtype and again.tolist() == value.tolist()
    assert again.is_contiguous() and again.data_ptr() % 64 == 0 and type(again) is Tensor


def test_an_object_larger_than_a_pipe_arrives_whole() -> None:
    value, reading_writing = torch.randn(1 << 20), os.pipe()
    source, sink = FileIO(reading_writing[0]), FileIO(reading_writing[1], "w")
    thread = threading.Thread(target=Packed.of(value).send, args=[sink])
    thread.start()
    assert torch.equal(Packed.receive(source).unpacked(), value)
    thread.join()
    sink.write(b"half")
    sink.close()
    with pytest.raises(EOFError):
        Packed.receive(source)
    source.close()


def test_a_tensor_is_copied_if_it_lies_otherwise_than_it_would_arrive() -> None:
    value = torch.randn(32)
    same, moved = Packed.of([value[16:], value[1:17]]).aligned().unpacked()
    assert same.data_ptr() == value.data_ptr() + 64 and moved.data_ptr() % 64 == 0
    assert torch.equal(moved, value[1:17])


def test_a_copy_shares_no_memory() -> None:
    value = torch.randn(3)
    copy = Packed.of(value).copy().unpacked()
    assert isinstance(copy, Tensor) and torch.equal(copy, value)
    assert copy.data_ptr() != value.data_ptr()


@pytest.mark.parametrize(
    "tensor", [torch.eye(3).to_sparse(), torch.empty(3, device="meta")], ids=["sparse", "device"]
)
def test_other_tensors_are_refused(tensor: Tensor) -> None:
    with pytest.raises(MoeccError, match="give dense tensors on the CPU"):
        Packed.of([tensor])


# ---------------------------------------------------------------- functions and errors


def test_a_function_without_a_name_elsewhere_is_refused(
    pool: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def local(unit: int) -> int:
        return unit

    of_main = type(local)(local.__code__, {"__name__": "__main__"}, "of_main")
    monkeypatch.setattr(sys.modules["__main__"], "of_main", of_main, raising=False)
    for workers in (Alone(), pool):
        for function in (local, lambda unit: unit, of_main):
            with pytest.raises(MoeccError, match="define it at the top level of a module"):
                workers.run(function, [1])


PASS = """
from dataclasses import dataclass
from moecc.pipeline.passes import LayerPass

@dataclass
class Unit:
    number: int

def halves(unit):
    return Unit(unit.number / 2)

def fails(unit):
    return unit.number / 0

@dataclass(frozen=True, kw_only=True)
class Halved(LayerPass):
    name = "halved"

    def run_layer(self, layer, ctx):
        return False
"""


def test_a_pass_file_may_have_units_and_functions(pool: Processes, tmp_path: Path) -> None:
    """A worker gets the file as it was when it was read."""
    file = tmp_path / "halved.py"
    file.write_text(PASS)
    module = sys.modules[find_pass(str(file)).__module__]
    file.write_text("1 / 0")
    found = list(pool.run(module.halves, map(module.Unit, range(3))))
    assert found == [module.Unit(0), module.Unit(0.5), module.Unit(1)]
    with pytest.raises(ZeroDivisionError) as caught:
        list(pool.run(module.fails, map(module.Unit, range(3))))
    line = PASS.splitlines().index("    return unit.number / 0") + 1
    said = f"ZeroDivisionError: division by zero ({file}, line {line})"
    assert fault(caught.value, module.Halved) == said
    assert not (tmp_path / "__pycache__").exists()


@pytest.mark.parametrize(
    ("kind", "error", "text", "passing"),
    [
        ("bad input", MoeccError, "this is wrong; do that", False),
        ("disk", MoeccError, "no file", True),
        ("fault", ZeroDivisionError, "a fault", False),
        ("exit", SystemExit, "3", False),
        ("stubborn", RuntimeError, "Stubborn: one and two", False),
    ],
)
def test_an_error_arrives_as_it_was(
    kind: str, error: type[BaseException], text: str, passing: bool, pool: Processes
) -> None:
    with pytest.raises(error) as caught:
        list(pool.run(units.failing, [kind]))
    assert type(caught.value) is error and str(caught.value) == text
    assert may_pass(caught.value) == passing
    assert "in failing" in caught.value.__notes__[0]


# ---------------------------------------------------------------- deaths


def test_the_units_of_killed_workers_are_done_again(
    pool: Processes, said: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a unit that goes on killing them ends the run."""
    monkeypatch.setattr(processes, "TRIES", 2)
    for name in ("once", "always"):
        (tmp_path / name).mkdir()
    once = [(i, tmp_path / "once", 1 if i == 1 else 0) for i in range(4)]
    assert said == [] and list(pool.run(units.killed_first, once)) == [0, 1, 4, 9]
    note = "note: a worker was ended by SIGKILL; its unit of work is done again"
    assert said == [note]
    pool._idle[0].stop()  # one that is idle
    until(lambda: not pool._idle[0].runs)
    assert list(pool.run(units.killed_first, [(i, tmp_path, 0) for i in (4, 5)])) == [16, 25]
    advice = "one unit of work ended 2 workers, the last by SIGKILL; memory may be short: give"
    with pytest.raises(Mendable, match=advice):
        list(pool.run(units.killed_first, [(0, tmp_path, 0), (1, tmp_path / "always", 9)]))
    assert said == [note] and len(list((tmp_path / "always").iterdir())) == 2


def test_a_process_that_can_t_start_is_no_unit_s_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_PROGRAM", "/nothing.py")
    with Processes(2) as workers:
        with pytest.raises(Mendable, match=r"can't start \(exit code 2\); MOECC_DEBUG=1 shows why"):
            list(workers.run(units.slow_if_first, [1]))
    monkeypatch.setattr(sys, "executable", "/nothing")
    with Processes(2) as workers:
        with pytest.raises(Mendable, match="can't be started: No such file or directory; give"):
            list(workers.run(units.slow_if_first, [1]))


def test_a_run_that_is_left_stops_its_units(pool: Processes, tmp_path: Path) -> None:
    """By an error of the units' source, as by whoever takes the results."""

    def source() -> Iterator[Path]:
        yield tmp_path / "first"
        until((tmp_path / "first").exists)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(pool.run(units.waiting, source()))
    assert_gone(tmp_path / "first")
    assert list(pool.run(units.slow_if_first, [3])) == [9] and not pool._busy


# No guard around what it does: a worker must not run it again. Two forks start a worker each.
SCRIPT = """
import os, signal, sys
from pathlib import Path
import units
from moecc.pipeline.workers.processes import Processes

signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs behind "&" ignores it
folder = Path(sys.argv[1])
if os.fork():
    name = "interrupted"
else:
    name = "killed"
(folder / f"{name}.driver").write_text(str(os.getpid()))
with Processes(2) as workers:
    list(workers.run(units.waiting, [folder / name]))
"""


def test_no_worker_outlives_its_driver(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    command = [sys.executable, str(script), str(tmp_path)]
    done = subprocess.Popen(
        command, env=variables, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    marks = [tmp_path / "killed", tmp_path / "interrupted"]
    until(lambda: all(mark.exists() for mark in marks))
    killed = int((tmp_path / "killed.driver").read_text())
    os.kill(killed, signal.SIGKILL)
    assert_gone(marks[0])
    os.killpg(done.pid, signal.SIGINT)  # as Ctrl-C does: to the worker as well
    errors = done.communicate(timeout=PATIENCE)[1]
    assert_gone(marks[1])
    assert errors.count("Traceback") == 1 and errors.strip().endswith("KeyboardInterrupt")


# ---------------------------------------------------------------- of a run


@pytest.mark.parametrize("count", [1, 3])
def test_a_run_has_the_workers_that_were_planned(count: int) -> None:
    found = choice.workers_for(count, None, CPU, memory=10, say=print)
    assert found.count == count and isinstance(found, Alone if count == 1 else Processes)


@pytest.mark.parametrize(
    ("workers", "ray", "says"),
    [
        (2, "local", "--workers and --ray both say who works; leave one out"),
        (0, None, "0 workers can't do anything; give 1 or more"),
        (None, "local", "--ray needs Ray, which isn't installed: pip install 'moecc[ray]'"),
    ],
)
def test_workers_that_a_run_can_t_have_are_refused(
    workers: int | None, ray: str | None, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "find_spec", lambda name: None)
    with pytest.raises(MoeccError, match=re.escape(says)):
        choice.require_one(workers, ray, CPU)


@pytest.mark.parametrize("address", ["", "host", "host:", ":1", "ray://host", "host:1/a", "a b:c"])
def test_an_address_of_no_cluster_is_refused(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "find_spec", lambda name: True)
    with pytest.raises(MoeccError, match="give local, auto, HOST:PORT or ray://HOST:PORT"):
        choice.require_one(None, address, CPU)
    for sound in ("local", "auto", "host:1", "ray://host:1", "[::1]:1"):
        choice.require_one(None, sound, CPU)


SCALED = """
from dataclasses import dataclass
import os
import torch
from moecc.pipeline.passes import LayerPass

def scaled(weight, shared):
    return weight * shared, os.getpid()

@dataclass(frozen=True, kw_only=True)
class Scaled(LayerPass):
    name = "scaled"

    def run_layer(self, layer, ctx):
        if layer.index != 1:
            return False
        name = "model.layers.0.input_layernorm.weight"
        weights = (layer.program.read(name) for _ in range(1))
        ((weight, pid),) = ctx.workers.run(scaled, weights, torch.tensor(0.5))
        assert pid != os.getpid() and ctx.workers.count == 2
        layer.program.add(name, weight)
        return True
"""


def test_a_pass_gives_units_to_the_workers_of_its_run(
    compile: Compile, mixtral: Path, tmp_path: Path, traced_once: None
) -> None:
    file, out = tmp_path / "scaled.py", tmp_path / "out"
    file.write_text(SCALED)
    done = compile(mixtral, out, str(file), "--workers", "2")
    assert done.code == 0, done.err
    before, after = (load_file(folder / "model.safetensors") for folder in (mixtral, out))
    name = "model.layers.0.input_layernorm.weight"
    assert torch.equal(after[name], before[name] / 2)


def assert_gone(mark: Path) -> None:
    """Wait until the worker whose number is in a file has ended."""
    number = int(mark.read_text())

    def gone() -> bool:
        try:
            return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except OSError:
            return True

    until(gone)


def test_processes_get_ready_before_there_is_work() -> None:
    """They are those that work then."""
    with Processes(2) as workers:
        workers.prepare()
        ready = {process._process.pid for process in workers._idle}
        assert len(ready) == 2
        pids = {found["pid"] for found in workers.run(units.facts, [1, 2, 3, 4])}
        assert pids <= ready
