"""moecc: a compiler for Mixture-of-Experts language models.

`import moecc` is quick: torch and transformers are imported when a function below is first used. It
makes transformers know the artifact format, so that `AutoModelForCausalLM.from_pretrained(OUT)`
works.
"""

from __future__ import annotations

import importlib
from typing import Any

from moecc.hook import register_when_needed

__version__ = "0.1.0"

_OFFERED = {  # name -> where it is
    "compile": "moecc.commands.compile:compile_model",
    "inspect": "moecc.commands.inspect:inspect_model",
    "evaluate": "moecc.commands.evaluate:evaluate_models",
    "export": "moecc.commands.export:export_artifact",
    "generate": "moecc.commands.generate:generate",
    "load_program": "moecc.frontend.trace:trace",
    "MoeccError": "moecc.errors:MoeccError",
}
__all__ = [
    "MoeccError",
    "__version__",
    "compile",
    "evaluate",
    "export",
    "generate",
    "inspect",
    "load_program",
]


def __getattr__(name: str) -> Any:
    if name not in _OFFERED:
        raise AttributeError(f"module 'moecc' has no attribute {name!r}")
    module, _, attribute = _OFFERED[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *_OFFERED})


register_when_needed()
