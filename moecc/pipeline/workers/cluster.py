"""Workers of a Ray cluster: one that runs, or one of this machine that is started for a run.

A unit is a task that takes one CPU and the memory that is said. Ray runs the tasks of lost workers
again, and holds what they are given and what they give in its object store.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from importlib.util import find_spec
from typing import Any, TypeAlias, TypeVar
from urllib.parse import urlsplit

import torch

import moecc
from moecc import registry
from moecc.checkpoint.files import size
from moecc.errors import Mendable, MoeccError, reason
from moecc.pipeline.workers.base import Workers, in_order
from moecc.pipeline.workers.packed import Packed, as_bytes
from moecc.pipeline.workers.processes import ONE_THREAD, TRIES
from moecc.pipeline.workers.service import Begin, Call, Do, Service, answer, opened

LOCAL, RUNNING = "local", "auto"
_PATIENCE = 10  # seconds in which an address must answer
_SENT = ("ATEN_CPU_CAPABILITY", "MOECC_NATIVE")  # variables, to the nodes of any cluster

U = TypeVar("U")
R = TypeVar("R")
Facts: TypeAlias = dict[str, str]
# a Packed whose tensors are arrays of bytes, which Ray neither pickles nor copies
Arrays: TypeAlias = tuple[bytes, list[tuple[torch.dtype, tuple[int, ...], Any]]]


def require_address(address: str) -> None:
    """Raise MoeccError if Ray is missing, or if an address is none of those that `Ray` takes."""
    if find_spec("ray") is None:
        raise MoeccError("--ray needs Ray, which isn't installed: pip install 'moecc[ray]'")
    if address not in (LOCAL, RUNNING) and None in _host_and_port(address):
        known = f"{LOCAL}, {RUNNING}, HOST:PORT or ray://HOST:PORT"
        raise MoeccError(f"--ray {address!r} is no address of a Ray cluster; give {known}")


class Ray(Workers):
    """Workers of the cluster at an address: local, auto, HOST:PORT or ray://HOST:PORT.

    memory: bytes that a unit takes. cores: those of a local cluster. If the program has connected
    to a cluster already, that one is used. Raise MoeccError if no cluster answers, if no node has
    the memory, and if a node has other versions than this process.
    """

    def __init__(self, address: str, memory: int, cores: int):
        import ray

        self._ray, self._memory, self._made, local = ray, memory, ExitStack(), address == LOCAL
        with ExitStack() as made:  # undone if anything below fails
            if not ray.is_initialized():
                made.callback(ray.shutdown)
                with _termination():
                    _connect(address, memory, cores)
            self._variables = {**ONE_THREAD, **_sent(local)}
            self.count = sum(map(self._places, self._nodes()))
            if not self.count:
                what = f"a CPU and {size(memory)} of memory, as a unit of work takes"
                raise MoeccError(f"no node of the Ray cluster has {what}; add one")
            self._require_same()
            self._made = made.pop_all()

    def run(
        self, function: Callable[..., R], units: Iterable[U], shared: object = None
    ) -> Iterator[R]:
        return self._run(Packed.of(Call(function, shared)), units)

    def close(self) -> None:
        """End the cluster if it was started here, or else the connection if it was made here."""
        self._made.close()

    def _run(self, call: Packed, units: Iterable[U]) -> Iterator[Any]:
        ray, refs = self._ray, dict[Future[Arrays], Any]()  # of tasks that are not done
        begin = ray.put(_arrays(Packed.of(Begin(registry.SOURCES, call))))
        task = self._task(_do, num_cpus=1, memory=self._memory, max_retries=TRIES - 1)

        def submit(unit: U) -> Future[Arrays]:
            request = _arrays(Packed.of(Do(Packed.of(unit))))
            ref = task.remote(_facts(), begin.hex(), [begin], request)
            future: Future[Arrays] = ref.future()
            refs[future] = ref
            future.add_done_callback(refs.pop)
            return future

        def result(arrays: Arrays) -> object:
            return opened(_packed(arrays))

        try:
            yield from map(result, in_order(units, submit, self.count))
        except ray.exceptions.RayError as error:
            advice = "see Ray's logs; memory may be short"
            raise Mendable(f"Ray gave up on a unit of work: {reason(error)}; {advice}") from error
        finally:
            for ref in list(refs.values()):
                ray.cancel(ref, force=True)

    def _nodes(self) -> list[dict[str, Any]]:
        return [node for node in self._ray.nodes() if node["Alive"]]

    def _places(self, node: Mapping[str, Any]) -> int:
        """Return how many units a node has room for at a time."""
        found = node["Resources"]
        return int(min(found.get("CPU", 0), found.get("memory", 0) // max(self._memory, 1)))

    def _task(self, function: Callable[..., object], **options: object) -> Any:
        runtime = {"env_vars": self._variables}
        return self._ray.remote(**options, runtime_env=runtime)(function)

    def _require_same(self) -> None:
        """Raise MoeccError if a node that has room for units differs from this process."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On

        for node in filter(self._places, self._nodes()):
            there = On(node["NodeID"], soft=False)
            task = self._task(_facts, num_cpus=0, scheduling_strategy=there)
            try:
                found = self._ray.get(task.remote())
            except self._ray.exceptions.RayError as error:
                why = str(error).strip().splitlines()[-1]  # of a traceback
                raise MoeccError(
                    f"the Ray node {node['NodeName']} can't run moecc: {why}; install "
                    f"moecc {moecc.__version__} and torch {torch.__version__} there"
                ) from error
            _require_equal(node["NodeName"], found, _facts())


def _connect(address: str, memory: int, cores: int) -> None:
    """Connect to a cluster, or start one. It runs code that comes in through its ports, for which
    Ray asks a token since 2.60, unless RAY_AUTH_MODE says otherwise.
    """
    import ray

    quiet = {"log_to_driver": False, "logging_level": "error"}
    if address == LOCAL:
        own = {"num_cpus": cores, "_memory": cores * memory, "include_dashboard": False}
        failed, advice = "a local Ray can't be started", "--workers needs no Ray"
    else:
        own, failed = {}, f"no Ray cluster answers at {address}"
        advice = "if it runs and wants a token, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN"
    try:
        if address not in (LOCAL, RUNNING):  # Ray itself waits for minutes
            socket.create_connection(_host_and_port(address), timeout=_PATIENCE).close()
        ray.init(address=address, **quiet, **own)
    except Exception as error:
        raise MoeccError(f"{failed}: {reason(error)}; {advice}") from error


def _host_and_port(address: str) -> tuple[str | None, int | None]:
    """Return the parts of an address; None for one that is missing or makes no sense."""
    with suppress(ValueError):
        parts = urlsplit(f"//{address.removeprefix('ray://')}")
        if not (parts.path or parts.query or parts.fragment or parts.username):
            return parts.hostname, parts.port
    return None, None


def _sent(local: bool) -> dict[str, str]:
    """Return variables for workers. A local one finds modules where this process does."""
    found = {name: os.environ[name] for name in _SENT if name in os.environ}
    return found | ({"PYTHONPATH": os.pathsep.join(filter(None, sys.path))} if local else {})


@contextmanager
def _termination() -> Iterator[None]:
    """Leave what SIGTERM does as it is: Ray makes it an exit, which looks like a fault."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM) or signal.SIG_DFL
    try:
        yield
    except SystemExit as stop:
        signal.signal(signal.SIGTERM, before)
        if stop.code == signal.SIGTERM:
            signal.raise_signal(signal.SIGTERM)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


# ---------------------------------------------------------------- on a node

_SERVICES: dict[str, Service] = {}  # of the last call, by its key


def _do(expected: Facts, key: str, begin: list[Any], request: Arrays) -> Arrays:
    """Answer a request of `service.Do`. begin: a reference to that of the call, whose key it is."""
    return _arrays(answer(partial(_handled, expected, key, begin, request)))


def _handled(expected: Facts, key: str, begin: list[Any], request: Arrays) -> Packed:
    import ray

    node = ray.util.get_node_ip_address()
    _require_equal(node, _facts(), expected)  # it may have come since the run began
    if key not in _SERVICES:
        _SERVICES.clear()
        service = Service()
        try:
            service.handle(_packed(ray.get(begin[0])))
        except ImportError as error:
            advice = "install there what is installed here"
            raise MoeccError(f"the Ray node {node} lacks code: {error}; {advice}") from error
        _SERVICES[key] = service
    return _SERVICES[key].handle(_packed(request))


def _facts() -> Facts:
    """Return what the last bits of a result depend on."""
    cpu = torch.backends.cpu.get_cpu_capability()
    return {"moecc": moecc.__version__, "torch": torch.__version__, "CPU": cpu}


def _require_equal(node: str, found: Facts, expected: Facts) -> None:
    if found != expected:
        there, here = (", ".join(f"{k} {v}" for k, v in f.items()) for f in (found, expected))
        why = f"the Ray node {node} has {there}, and this process {here}"
        raise MoeccError(f"{why}; results would differ, so make them the same")


def _arrays(packed: Packed) -> Arrays:
    return packed.data, [(t.dtype, tuple(t.shape), as_bytes(t)) for t in packed.tensors]


def _packed(arrays: Arrays) -> Packed:
    data, found = arrays
    tensors = [torch.empty(shape, dtype=dtype) for dtype, shape, _ in found]
    for tensor, (_, _, array) in zip(tensors, found, strict=True):
        as_bytes(tensor)[:] = array
    return Packed(data, tensors)
