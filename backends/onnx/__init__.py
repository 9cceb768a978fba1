"""The ONNX backend: one file that any ONNX Runtime runs, fast where moecc's op library is loaded.

cached      the artifact traced with its cache                      weights   reads them when they are written, in file order
translate   the trace as an ONNX graph                              exporter  all of it, and the comparison with the artifact
bodies      what moecc's operators mean in standard ones            run       a model in ONNX Runtime
layout      the order of codes in the file                          native/   the op library's sources; `build` compiles them
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from moecc.errors import MoeccError
from moecc.ir import Program

_OFFERED = {"export": "exporter", "summary": "exporter", "bench": "speed", "table": "speed", "library": "build"}
_NEEDS = ("onnx", "onnx_ir", "onnxscript", "onnxruntime")


def require() -> None:
    """MoeccError where a package that this backend needs isn't there."""
    for name in _NEEDS:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise MoeccError(
                f"the ONNX backend needs {name}, which can't be imported ({error}); pip install 'moecc[onnx]'"
            ) from None


def emit(folder: Path, program: Program) -> dict[str, Any]:
    """Export the artifact in `folder` to its subfolder `onnx`."""
    from moecc.backends.onnx.exporter import export

    record = export(folder, folder / "onnx")
    return {
        "name": "onnx",
        "files": sorted(f"onnx/{f.name}" for f in (folder / "onnx").iterdir()),
        **record,
        "out": "onnx",
    }


def __getattr__(name: str) -> Any:
    """What the command line calls, imported when it does: their packages take seconds."""
    if name not in _OFFERED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_OFFERED[name]}"), name)
