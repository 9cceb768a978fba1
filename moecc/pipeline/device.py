"""The device that a run computes on: the CPU, or one GPU.

Weights and activations of one layer at a time are there (`Program.device`); results come back to
memory. The same run gives the same bits each time on devices of one kind:
  1. Random numbers are drawn on the CPU.
  2. PyTorch takes the algorithms whose sums have an order, fails if there is none, and multiplies
     float32 as float32, not as TF32 (`repeatable`).
  3. How much is worked on together depends on shapes and on the device's whole memory, never on
     what is free of it.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from moecc.errors import MoeccError, quoted, reason
from moecc.ir.tensors import CPU

AUTO = "auto"
_TAKEN = f"{AUTO}, cpu, cuda or cuda:N"
_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
_WORKSPACES = (":4096:8", ":16:8")  # with which cuBLAS gives the same bits each time


def device_called(name: str) -> torch.device:
    """Return the device of a name: cpu, cuda, cuda:N, or auto, which is a GPU if one can be used.

    Raise MoeccError if there is no such device here.
    """
    if name == AUTO:
        return CPU if _why_not(0) else torch.device("cuda", 0)
    if name == "cpu":
        return CPU
    found = re.fullmatch(r"cuda(?::([0-9]{1,4}))?", name)
    if found is None:
        raise MoeccError(f"no device {quoted(name)}; give {_TAKEN}")
    index = int(found[1] or 0)
    if why := _why_not(index):
        raise MoeccError(f"device {name} can't be used: {why}, or give --device cpu")
    return torch.device("cuda", index)


def _why_not(index: int) -> str:
    """Return why this GPU can't be used, and what to do; "" if it can."""
    if not (torch.version.cuda or torch.version.hip):
        return "this torch is built for CPUs alone; install its build for your GPU (pytorch.org)"
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    if not available:
        cause = (
            f" ({reason(UserWarning(said[0].message))})" if said else ""
        )  # such as too old a driver
        return f"torch finds no GPU{cause}; look at nvidia-smi and CUDA_VISIBLE_DEVICES"
    count = torch.cuda.device_count()
    if index >= count:
        last = f"..cuda:{count - 1}" if count > 1 else ""
        return f"there is cuda:0{last} alone; give that"
    try:
        torch.ones(1, device=torch.device("cuda", index)).add_(1).item()
    except RuntimeError as error:  # the build has no code for the card, or others fill its memory
        return f"{reason(error)}; free it, or install a torch that knows this card"
    return ""


def kind_of(device: torch.device) -> str:
    """Return what of a device the last bits of a result depend on; "" for the CPU."""
    if device.type == "cpu":
        return ""
    if device.type != "cuda":
        return device.type
    found = torch.cuda.get_device_properties(device)
    version = torch.version.cuda or torch.version.hip
    return f"{found.name} of {found.total_memory >> 30} GiB, cuda {version}"


def whole_memory(device: torch.device) -> int:
    """Return the bytes of a GPU's memory, in whole GiB."""
    return int(torch.cuda.get_device_properties(device).total_memory) >> 30 << 30


def for_a_unit(device: torch.device) -> int:
    """Return the bytes of a GPU's memory that one unit of coding may take."""
    return whole_memory(device) // 4


def peak(device: torch.device) -> int:
    """Return the most bytes of a GPU's memory that tensors have taken; 0 for the CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


@contextmanager
def repeatable(device: torch.device) -> Iterator[None]:
    """Give the same bits each time inside, on a GPU too; a CPU does so anyway."""
    if device.type != "cuda":
        yield
        return
    if os.environ.get(_WORKSPACE) not in _WORKSPACES:  # read when a process first multiplies
        os.environ[_WORKSPACE] = _WORKSPACES[0]
    filling: Any = torch.utils.deterministic  # torch sets its attributes by a class of its own
    deterministic = torch.are_deterministic_algorithms_enabled()
    lenient = torch.is_deterministic_algorithms_warn_only_enabled()
    precision, fill = torch.get_float32_matmul_precision(), filling.fill_uninitialized_memory
    convolutions = torch.backends.cudnn.allow_tf32
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32, filling.fill_uninitialized_memory = False, False
    try:
        # other kernels of attention multiply as TF32, or add up gradients in any order
        with torch.cuda.device(device), sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*deterministic implementation")
            # each of many rows is added up in order; linear attention does that
            warnings.filterwarnings("ignore", message="cumsum_cuda_kernel")
            yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=lenient)
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.allow_tf32 = convolutions
        filling.fill_uninitialized_memory = fill
