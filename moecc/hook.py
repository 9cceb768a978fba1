"""Register the artifact format with transformers once transformers is used, without importing it.

If transformers' quantizers are imported already, `register_when_needed` registers at once.
Otherwise it puts a finder on `sys.meta_path` that waits for their import, which every
`from_pretrained` triggers, and registers right after it.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_QUANTIZERS = "transformers.quantizers.auto"


def register_when_needed() -> None:
    """Register now or when the quantizers are imported; a second call does nothing."""
    if _QUANTIZERS in sys.modules:
        _register()
    elif WAITING not in sys.meta_path:
        sys.meta_path.insert(0, WAITING)


def _register() -> None:
    importlib.import_module("moecc.artifact.hf")  # its last lines register the format


class _Waiting(MetaPathFinder):
    """A finder that leaves the search to the others, and registers after the import."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _QUANTIZERS:
            return None
        found = (
            finder.find_spec(fullname, path, target)
            for finder in sys.meta_path
            if finder is not self and hasattr(finder, "find_spec")
        )
        spec = next((s for s in found if s is not None), None)
        if spec is not None and spec.loader is not None:
            _register_after(spec.loader, self)
        return spec


def _register_after(loader: Loader, waiting: _Waiting) -> None:
    """Make `loader` register the format once it has executed its module."""
    run = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        run(module)
        if waiting in sys.meta_path:  # what is searched for may not be imported, or fail
            sys.meta_path.remove(waiting)
        _register()

    loader.exec_module = exec_module  # type: ignore[method-assign]


WAITING = _Waiting()
