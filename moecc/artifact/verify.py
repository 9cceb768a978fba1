"""The reload check: load what was written as a user would, and compare its logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moecc.artifact import hf
from moecc.checkpoint.memory import free_memory
from moecc.errors import MoeccError, reason
from moecc.frontend.trace import trace
from moecc.frontend.traceable import logits_alone
from moecc.ir.program import Program
from moecc.ir.relative import relative
from moecc.pipeline.stream import run_program

TOLERANCE = 1e-3  # of the largest logit; both sides compute in float32, in another order
# memory that transformers takes to load an artifact in float32, in sizes of its float32 program
_EXPANSION = 3


@dataclass(frozen=True)
class Comparison:
    """The difference of the reloaded model's logits, relative to the program's largest."""

    difference: float
    loaded_by: str

    def line(self) -> str:
        return (
            f"reloaded by {self.loaded_by}: logits differ by {self.difference:.1e} of the largest"
        )


def reload_and_compare(
    folder: Path, program: Program, batches: Sequence[Tensor], memory: int | None = None
) -> Comparison:
    """Compare logits on `batches` (token ids [B, S]) with what transformers loads.

    A model that does not fit in `memory` bytes (by default those that are free) is traced again
    and run layer by layer instead. Raise MoeccError if the logits differ by more than rounding.
    """
    want = [logits.cpu() for logits in run_program(program, batches)]
    size = sum(f.stat().st_size for f in folder.glob("*.safetensors")) * 2
    fits = size * _EXPANSION < (free_memory() if memory is None else memory)
    got = _reloaded(folder, batches, fits)
    largest = max(float(w.abs().max()) for w in want)
    off = max(float((w - g).abs().max()) for w, g in zip(want, got, strict=True))
    difference = float(relative(off, largest))
    found = Comparison(difference, "transformers" if fits else "moecc, layer by layer")
    if not difference <= TOLERANCE:
        what = f"the reloaded model's logits differ by {difference:.2g} of the largest"
        raise MoeccError(f"{folder.name}: {what}; nothing was kept")
    return found


def _reloaded(folder: Path, batches: Sequence[Tensor], by_transformers: bool) -> list[Tensor]:
    try:
        if by_transformers:
            return _by_transformers(folder, batches)
        return run_program(trace(folder, dtype=torch.float32), batches)
    except MoeccError:
        raise
    except Exception as error:  # whatever the family's code makes of weights that don't fit it
        raise MoeccError(
            f"{folder.name}: what was written can't be loaded again: {reason(error)}"
        ) from error


@torch.no_grad()
def _by_transformers(folder: Path, batches: Sequence[Tensor]) -> list[Tensor]:
    model = hf.load(str(folder), torch.float32)
    with logits_alone(model):
        return [model(input_ids=ids)[0].float() for ids in batches]
