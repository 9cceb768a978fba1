"""The reference backend: the artifact runs in eager PyTorch through transformers, and its numbers define the others'.

There is nothing to lower: `moecc.ops` is the implementation. `runtime` gives the model that runs an artifact.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from moecc import hf
from moecc.ir import Program


def require() -> None:
    """What a backend needs besides moecc, or a MoeccError: this one needs nothing."""


def emit(folder: Path, program: Program) -> dict[str, Any]:
    """What this backend adds to an artifact: nothing; a summary for the compile report."""
    return {"name": "reference", "files": []}


def runtime(folder: Path, dtype: torch.dtype | None = None) -> Any:
    """The transformers model that runs an artifact."""
    return hf.load(str(folder), dtype)
