"""The Triton backend: the artifact runs in transformers on a GPU, its experts by kernels that read the codes as they are.

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
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from moecc import experts, hf
from moecc.backends.triton import op
from moecc.backends.triton.pack import pack_projection, unpack_projection
from moecc.errors import MoeccError
from moecc.ir import Program

DEVICE = "cuda"  # what torch calls ROCm's devices too
LEAST = (8, 0)  # compute capability: the first with int8 products as the kernels use them


def require() -> None:
    """What `emit` needs: nothing, so that a machine without a GPU compiles for one that has it."""


@lru_cache
def require_device() -> None:
    """MoeccError in one line where triton or a card for it isn't there. Under TRITON_INTERPRET=1 none is needed."""
    if importlib.util.find_spec("triton") is None:
        raise MoeccError("the Triton backend needs triton, which isn't installed; pip install 'moecc[triton]'")
    if os.environ.get("TRITON_INTERPRET") == "1":
        return
    if not torch.cuda.is_available():
        raise MoeccError("the Triton backend needs a CUDA or ROCm device, and torch sees none")
    for i in range(torch.cuda.device_count()):
        if torch.version.hip is None and torch.cuda.get_device_capability(i) < LEAST:
            major, minor = torch.cuda.get_device_capability(i)
            raise MoeccError(
                f"the Triton backend needs compute capability {LEAST[0]}.{LEAST[1]}, and {torch.cuda.get_device_name(i)} has "
                f"{major}.{minor}; MOECC_KERNELS=reference runs the reference on it"
            )


def emit(folder: Path, program: Program) -> dict[str, Any]:
    """What this backend adds to an artifact: nothing, codes are put into order when a model comes to a GPU."""
    return {"name": "triton", "files": []}


def runtime(folder: Path, dtype: torch.dtype | None = None) -> Any:
    """The transformers model of an artifact on the current GPU; under TRITON_INTERPRET=1 on the CPU, by the same kernels."""
    require_device()
    model = hf.load(str(folder), dtype)
    if os.environ.get("TRITON_INTERPRET") != "1":
        return model.to(DEVICE)
    import sys

    for module in model.modules():
        if isinstance(module, experts.CompressedProjection):
            module.pack(sys.modules[__name__])
    return model


__all__ = ["DEVICE", "emit", "op", "pack_projection", "require", "require_device", "runtime", "unpack_projection"]
