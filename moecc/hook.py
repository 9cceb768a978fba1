"""Register the artifact format with transformers and PEFT once they are used, without importing
them.

If transformers' quantizers are imported already, `register_when_needed` registers at once.
Otherwise it puts a finder on `sys.meta_path` that waits for their import, which every
`from_pretrained` triggers, and registers right after it. It does the same for PEFT.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

# a module that is waited for -> the one of moecc that registers with it, by its last lines
_WANTED = {
    "transformers.quantizers.auto": "moecc.artifact.hf",
    "peft.tuners.tuners_utils": "moecc.artifact.tuners",
}


def register_when_needed() -> None:
    """Register now or when the modules are imported; a second call does nothing."""
    for wanted, ours in _WANTED.items():
        if wanted in sys.modules:
            importlib.import_module(ours)
        elif not any(isinstance(f, _Waiting) and f.wanted == wanted for f in sys.meta_path):
            sys.meta_path.insert(0, _Waiting(wanted))


class _Waiting(MetaPathFinder):
    """A finder that leaves the search to the others, and registers after the import of `wanted`."""

    def __init__(self, wanted: str):
        self.wanted = wanted

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.wanted:
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
    """Make `loader` register the format once it has executed its module.

    Programs that use transformers or PEFT for other models must go on where that fails.
    """
    run = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        run(module)
        if waiting in sys.meta_path:  # what is searched for may not be imported, or fail
            sys.meta_path.remove(waiting)
        try:
            importlib.import_module(_WANTED[waiting.wanted])
        except Exception as error:
            import logging  # which takes time, and every program with moecc imports this module

            library = waiting.wanted.partition(".")[0]
            what = f"moecc can't register with {library} ({error}); artifacts can't be used with it"
            logging.getLogger("moecc").warning("%s", what)  # a warning may be made an error

    loader.exec_module = exec_module  # type: ignore[method-assign]
