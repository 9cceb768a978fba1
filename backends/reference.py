"""The artifact as it is: transformers runs it in eager PyTorch, and its numbers define the others'.

There is nothing to lower: `moecc.ir.ops` is the implementation, and
`AutoModelForCausalLM.from_pretrained` loads the artifact.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from moecc.target import Emitted, Target
from moecc.types import Say


@dataclass(frozen=True, kw_only=True)
class ReferenceTarget(Target):
    name: ClassVar[str] = "reference"

    def emit(self, artifact: Path, out: Path, say: Say) -> Emitted:
        return Emitted(summary=f"{artifact}: transformers runs it as it is, by the reference")
