"""The Triton target: the artifact runs in transformers on a GPU, its experts by kernels that read the codes as they are.

pack     the order of codes on a GPU               around   routing, fixed point, gate and sum
tiles    the shape of a program, by card           launch   a layer's calls, in order
gates    the gates, in a kernel                    op       the op that a model calls
grouped  the product of coded experts              aot      what the kernels become on a card that isn't there
chain    when a kernel may start

Nothing of it touches a device or imports triton until it is asked to run. NVIDIA from compute capability 8.0 (Ampere) on, AMD
CDNA and RDNA 3. Compiled models need nothing but to be moved: `from_pretrained(OUT, device_map="cuda")`.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from moecc.artifact import hf
from moecc.backends.triton import op as op  # defines the op that a packed model calls
from moecc.backends.triton.pack import pack_projection, unpack_projection
from moecc.errors import MoeccError
from moecc.frontend import experts
from moecc.target import Emitted, Kernels, Target
from moecc.types import Say

DEVICE = "cuda"  # what torch calls ROCm's devices too
LEAST = (8, 0)  # compute capability: the first with int8 products as the kernels use them


@dataclass(frozen=True, kw_only=True)
class TritonTarget(Target):
    name: ClassVar[str] = "triton"

    def emit(self, artifact: Path, out: Path, say: Say) -> Emitted:
        return Emitted(
            summary=f"{artifact}: transformers runs it by Triton kernels once it is on a GPU"
        )

    def kernels(self) -> Kernels:
        return KERNELS


class TritonKernels(Kernels):
    """The kernels of this target, and the order of codes that they take."""

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
    """MoeccError in one line where triton or a card for it isn't there. Under TRITON_INTERPRET=1 none is needed."""
    if importlib.util.find_spec("triton") is None:
        raise MoeccError(
            "the target triton needs triton, which isn't installed; pip install 'moecc[triton]'"
        )
    if os.environ.get("TRITON_INTERPRET") == "1":
        return
    if not torch.cuda.is_available():
        raise MoeccError("the target triton needs a CUDA or ROCm device, and torch sees none")
    for i in range(torch.cuda.device_count()):
        if torch.version.hip is None and torch.cuda.get_device_capability(i) < LEAST:
            major, minor = torch.cuda.get_device_capability(i)
            raise MoeccError(
                f"the target triton needs compute capability {LEAST[0]}.{LEAST[1]}, and {torch.cuda.get_device_name(i)} has "
                f"{major}.{minor}; MOECC_KERNELS=reference runs the reference on it"
            )


def runtime(folder: Path, dtype: torch.dtype | None = None) -> Any:
    """The transformers model of an artifact on the current GPU; under TRITON_INTERPRET=1 on the CPU, by the same kernels."""
    require_device()
    model = hf.load(str(folder), dtype)
    if os.environ.get("TRITON_INTERPRET") != "1":
        return model.to(DEVICE)
    for module in model.modules():
        if isinstance(module, experts.CompressedProjection):
            module.pack(KERNELS)
    return model
