"""The dense target: the float checkpoint that an artifact stands for, for tools that train or convert plain weights.

Codes, scales, basis and mean become the matrices that they stand for, under the family's own names, and quantized linears plain
ones. transformers, PEFT and converters take the folder without moecc. An adapter trained on it goes back by the pass `absorb`.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from moecc.artifact.decode import float_tensors
from moecc.artifact.write import copy_small_files, write_weights
from moecc.checkpoint.files import size
from moecc.errors import MoeccError
from moecc.options import option
from moecc.target import Emitted, Target
from moecc.types import Say


@dataclass(frozen=True, kw_only=True)
class DenseTarget(Target):
    name: ClassVar[str] = "dense"
    dtype: str = option(
        "auto",
        help="of the weights; auto: as the configuration says",
        choices=("auto", "bfloat16", "float16", "float32"),
    )

    def emit(self, artifact: Path, out: Path, say: Say) -> Emitted:
        if out.exists():
            raise MoeccError(f"{out} exists; give another folder or remove it")
        dtype = None if self.dtype == "auto" else getattr(torch, self.dtype)
        tensors = float_tensors(artifact, dtype)
        draft = out.with_name(out.name + ".partial")
        draft.mkdir(parents=True)
        try:
            say("writing")
            write_weights(draft, tensors)
            copy_small_files(artifact, draft)
            config = json.loads((artifact / "config.json").read_text())
            config.pop("quantization_config", None)
            if dtype is not None:
                config["dtype"] = self.dtype
            (draft / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
            draft.rename(out)
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise
        nbytes = sum(t.nbytes for t in tensors.values())
        return Emitted(
            out, {"bytes": nbytes, "tensors": len(tensors)}, f"{out}: {size(nbytes)}, float weights"
        )
