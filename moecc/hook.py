"""Makes transformers know the artifact format when transformers is used, and imports nothing before.

`register_when_needed` registers at once where transformers' quantizers are imported already. Otherwise a finder on `sys.meta_path`
waits for their import, which `from_pretrained` of every model goes through, and registers right behind it.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_QUANTIZERS = "transformers.quantizers.auto"


def register_when_needed() -> None:
    """See above; calling it again does nothing."""
    if _QUANTIZERS in sys.modules:
        _register()
    elif not any(isinstance(finder, _Waiting) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Waiting())


def _register() -> None:
    importlib.import_module("moecc.artifact.hf")  # registers at its end


class _Waiting(MetaPathFinder):
    """Lets the others find transformers' quantizers, and registers once they are imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _QUANTIZERS:
            return None
        sys.meta_path.remove(self)
        found = (
            finder.find_spec(fullname, path, target)
            for finder in sys.meta_path
            if hasattr(finder, "find_spec")
        )
        spec = next((s for s in found if s is not None), None)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            run = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                _register()

            loader.exec_module = exec_module
        return spec
