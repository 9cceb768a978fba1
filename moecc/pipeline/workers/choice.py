"""Which workers a run gets."""

from __future__ import annotations

import torch

from moecc.errors import MoeccError
from moecc.pipeline.workers.base import Alone, OnDevice, Workers
from moecc.pipeline.workers.cluster import Ray, require_address
from moecc.pipeline.workers.processes import Processes
from moecc.types import Say


def require_one(workers: int | None, ray: str | None, device: torch.device) -> None:
    """Raise MoeccError if both are given, one that can't be used here, or one beside a GPU."""
    if device.type != "cpu" and (workers, ray) != (None, None):
        option = "--ray" if workers is None else "--workers"
        raise MoeccError(f"{option} spreads coding over cores, but {device} codes; leave one out")
    if workers is not None and ray is not None:
        raise MoeccError("--workers and --ray both say who works; leave one out")
    if workers is not None and workers < 1:
        raise MoeccError(f"{workers} workers can't do anything; give 1 or more")
    if ray is not None:
        require_address(ray)


def workers_for(
    count: int, ray: str | None, device: torch.device, *, memory: int, say: Say
) -> Workers:
    """Return the workers of a run on a device, to be closed at its end.

    count: processes, which get ready from now on, or the cores of a local cluster; 1: this process
    alone. ray: the address of a cluster, or "local". memory: bytes that a worker takes. Raise
    MoeccError if the cluster can't be used.
    """
    if device.type != "cpu":
        return OnDevice()
    if ray is not None:
        return Ray(ray, memory, count)
    if count == 1:
        return Alone()
    found = Processes(count, say)
    found.prepare()
    return found
