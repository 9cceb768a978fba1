"""The ONNX target: one file that any ONNX Runtime runs, fast where moecc's op library is loaded.

cached      the artifact traced with its cache
translate   the trace as an ONNX graph
operators   the nodes of moecc's own ops
rewrites/   parts of the graph that ONNX has an operator for
bodies/     moecc's operators in standard ones
weights     read when they are written, in file order
exporter    all of it, and the comparison with the artifact
run         a model in ONNX Runtime
speed       its benchmark
graph       how graphs are built and changed
layout      the order of codes in the file
native/     the op library's sources; `build` compiles them
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

from moecc.errors import MoeccError
from moecc.options import option
from moecc.target import Emitted, Sizes, Target
from moecc.types import Json, Say


class Opset(NamedTuple):
    """The version of the file format that goes with an opset, and the first ONNX Runtime 1.x."""

    file_format: int
    runtime: int


OPSETS = {21: Opset(10, 20), 23: Opset(11, 23)}
_NEEDS = ("onnx", "onnx_ir", "onnxscript", "onnxruntime")


@dataclass(frozen=True, kw_only=True)
class OnnxTarget(Target):
    name: ClassVar[str] = "onnx"
    profile: str = option(
        "portable",
        help="portable: standard operators only; native: moecc's op library beside the model; "
        "qmoe: experts as integers in ONNX Runtime's own operator",
        choices=("portable", "native", "qmoe"),
    )
    opset: int = option(23, help="21 for ONNX Runtime before 1.23", choices=tuple(OPSETS))
    dtype: str = option(
        "float32", help="of activations and dense weights", choices=("float32", "float16")
    )
    bits: int | str = option(
        "auto", help="of experts in the profile qmoe; auto: 4", choices=("auto", 4, 8)
    )
    embeddings: str = option(
        "float",
        help="embedding and output head as the other dense weights, or as 8-bit integers",
        choices=("float", "int8"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits != "auto" and self.profile != "qmoe":
            raise MoeccError(
                "onnx: bits is of the profile qmoe; the others keep the bits that the experts "
                "have; leave it out"
            )

    def require(self) -> None:
        """Raise MoeccError if a package can't be imported or is too old for the profile."""
        for name in _NEEDS:
            try:
                importlib.import_module(name)
            except ImportError as error:
                raise MoeccError(
                    f"the target onnx needs {name}, which can't be imported ({error}); "
                    f"pip install 'moecc[{self.name}]'"
                ) from None
        if self.profile == "qmoe":
            from moecc.backends.onnx.rewrites import qmoe

            qmoe.require()

    def check(self, source: Path) -> None:
        from moecc.backends.onnx.exporter import require_exportable

        require_exportable(source, self)

    def least_bytes(self, source: Path, artifact: Sizes) -> int:
        return 2 * artifact.nbytes  # bfloat16 becomes float32

    def emit(self, artifact: Path, out: Path, say: Say) -> Emitted:
        from moecc.backends.onnx.exporter import export, summary

        record = export(artifact, out, self, say=say)
        return Emitted(out, record, summary(out, record))

    def build(self, say: Say) -> list[Path]:
        from moecc.backends.onnx.build import library

        return [library()]

    def exported(self, folder: Path) -> bool:
        return (folder / "model.onnx").exists()

    def bench(
        self, folder: Path, *, threads: Sequence[int], prompt: int, new_tokens: int, say: Say
    ) -> list[Json]:
        from moecc.backends.onnx.speed import bench

        return bench(folder, threads=threads, prompt=prompt, new_tokens=new_tokens, say=say)

    def table(self, rows: list[Json]) -> str:
        from moecc.backends.onnx.speed import table

        return table(rows)
