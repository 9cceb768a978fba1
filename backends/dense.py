"""The float checkpoint that an artifact stands for, for tools that train or convert weights.

Codes, scales, basis and mean become the matrices that they stand for, under the names of
transformers' own classes. Quantized linears become plain ones. transformers and PEFT take the
folder without moecc. An adapter trained on it goes back by the pass `absorb`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from moecc.artifact.decode import float_tensors
from moecc.artifact.draft import new_folder
from moecc.artifact.write import (
    copy_small_files,
    float_config,
    write_json,
    write_kept,
    write_weights,
)
from moecc.checkpoint.files import size
from moecc.checkpoint.reading import read_json
from moecc.frontend.config import config_dtype, read_config
from moecc.options import option
from moecc.target import Emitted, Sizes, Target
from moecc.types import Say

DTYPES = ("auto", "bfloat16", "float16", "float32")


@dataclass(frozen=True, kw_only=True)
class DenseTarget(Target):
    name: ClassVar[str] = "dense"
    dtype: str = option(
        "auto", help="of the weights; auto: as the configuration says", choices=DTYPES
    )

    def least_bytes(self, source: Path, artifact: Sizes) -> int:
        auto = self.dtype == "auto"
        dtype = config_dtype(read_config(source)[0]) if auto else getattr(torch, self.dtype)
        return artifact.weights * int(dtype.itemsize)

    def emit(self, artifact: Path, out: Path, say: Say) -> Emitted:
        dtype = None if self.dtype == "auto" else getattr(torch, self.dtype)
        with new_folder(out) as draft:
            tensors = float_tensors(artifact, dtype)
            copy_small_files(artifact, draft, say)
            config = read_json(artifact / "config.json")
            float_config(config, None if dtype is None else self.dtype)
            write_json(draft / "config.json", config, allow_nan=True)
            write_kept(artifact, draft)
            say("writing")
            write_weights(draft, tensors)
        nbytes = sum(t.nbytes for t in tensors.values())
        return Emitted(out, {"bytes": nbytes}, f"{out}: {size(nbytes)}, float weights")
