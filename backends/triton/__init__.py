"""The Triton target: the artifact runs in transformers on a GPU, by kernels that read its codes.

On the host
  op               the op that a packed model calls
  pack             the order of codes on a GPU
  tiles            the shape of a program, by card
  launch           plan the launches of a layer, and run them
  matmul, around   the launches of products, and those around them
  call, parts      what launches share
  aot, abstract    compile kernels for cards that are not there, for layers without data
Kernels
  chain     when a kernel may start         fixed     16-bit fixed point
  route     sort slots by expert            gates     the gates
  prepare   all that precedes gate_up       decode    codes to weights
  combine   gate, sum and norm              grouped, product    the product of coded experts
  hopper, hopper_tile, hopper_decode        that product on sm_90 for many tokens

Importing this package neither touches a device nor imports triton. It supports NVIDIA from compute
capability 8.0 (Ampere) on, AMD CDNA and RDNA 3. A compiled model only needs to be moved to the GPU:
`from_pretrained(OUT, device_map="cuda")`.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from moecc.backends.triton import op as op  # defines the op that a packed model calls
from moecc.backends.triton.pack import pack_projection, unpack_projection
from moecc.errors import MoeccError
from moecc.target import Emitted, Kernels, Target
from moecc.types import Say

DEVICE = "cuda"  # torch's name for ROCm devices too
LEAST = (8, 0)  # compute capability; older cards lack the int8 products that the kernels use


@dataclass(frozen=True, kw_only=True)
class TritonTarget(Target):
    """Run the artifact as it is, by Triton kernels."""

    name: ClassVar[str] = "triton"

    def emit(self, artifact: Path, out: Path, say: Say) -> Emitted:
        return Emitted(
            summary=f"{artifact}: transformers runs it by Triton kernels once it is on a GPU"
        )

    def kernels(self) -> Kernels:
        return KERNELS


class TritonKernels(Kernels):
    """The kernels of this target, and the order of codes that they read."""

    device, name = DEVICE, TritonTarget.name

    def require_device(self) -> None:
        require_device()

    def pack(
        self, tensors: Mapping[str, Tensor | None], *, gated: bool
    ) -> dict[str, Tensor | None]:
        return pack_projection(tensors, gated=gated)

    def unpack(
        self, tensors: Mapping[str, Tensor | None], columns: int, *, gated: bool
    ) -> dict[str, Tensor | None]:
        return unpack_projection(tensors, columns, gated=gated)


KERNELS = TritonKernels()


@lru_cache
def require_device() -> None:
    """Raise MoeccError if triton or a card that it supports is missing.

    Under TRITON_INTERPRET=1 no card is needed.
    """
    if importlib.util.find_spec("triton") is None:
        raise MoeccError(
            "the target triton needs triton, which isn't installed; pip install 'moecc[triton]'"
        )
    if os.environ.get("TRITON_INTERPRET") == "1":
        return
    if not torch.cuda.is_available():
        raise MoeccError("the target triton needs a CUDA or ROCm device, and torch sees none")
    for i in range(torch.cuda.device_count()):
        # ROCm reports other numbers here
        if torch.version.hip is None and torch.cuda.get_device_capability(i) < LEAST:
            major, minor = torch.cuda.get_device_capability(i)
            raise MoeccError(
                f"the target triton needs compute capability {LEAST[0]}.{LEAST[1]}, and "
                f"{torch.cuda.get_device_name(i)} has {major}.{minor}; MOECC_KERNELS=reference "
                "runs the reference on it"
            )
