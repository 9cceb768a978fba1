"""Find a pass or a target: by module name in its package, by entry point, or by file path."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import pkgutil
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Generic, TypeAlias, TypeVar

from moecc.errors import MoeccError, reason
from moecc.options import Options, nearest

T = TypeVar("T", bound=Options)

# module name -> path and content of the file that it was made of
Sources: TypeAlias = dict[str, tuple[str, bytes]]
# of the modules that were found by path; another process gets them as they are here, though their
# files may have changed since
SOURCES: Sources = {}


def take(sources: Sources) -> None:
    """Take the sources of another process, in the place of what is here under their names."""
    for name, source in sources.items():
        if SOURCES.get(name) != source:
            SOURCES[name] = source
            sys.modules.pop(name, None)


def provide(module: str) -> None:
    """Import a module of `SOURCES`, unless it is imported already; others are left alone."""
    if module in SOURCES and module not in sys.modules:
        _imported(module)


def _imported(name: str) -> ModuleType:
    """Run what a module of `SOURCES` consists of; no byte code is written beside its file."""
    path, source = SOURCES[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.origin is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    exec(compile(source, spec.origin, "exec"), vars(module))
    return module


@cache
def _note_once(line: str) -> None:
    logging.getLogger("moecc").warning("moecc: %s", line)


def _any(cls: type[Options], where: str) -> None:
    return None


@dataclass(frozen=True)
class Registry(Generic[T]):
    """The classes of one `kind`, found by name.

    Each module of `package` whose name has no leading underscore defines one class; entry points of
    the group `package` add others. Messages call a class `word`, several `plural`. `require` is an
    extra check: it gets the class and the place where it was found, and raises MoeccError.
    """

    kind: type[T]
    package: str
    word: str
    plural: str
    require: Callable[[type[T], str], None] = field(default=_any)

    def names(self) -> list[str]:
        """Return every name that needs no path, in alphabetical order."""
        package = importlib.import_module(self.package)
        local = [
            m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_")
        ]
        return sorted({*local, *(ep.name for ep in entry_points(group=self.package))})

    def classes(self) -> dict[str, type[T]]:
        """Return every class that needs no path, by name.

        An entry point of another package that cannot be used is left out, with a note.
        """
        found = {}
        installed = {ep.name for ep in entry_points(group=self.package)}
        for name in self.names():
            try:
                found[name] = self.find(name)
            except MoeccError as error:
                if name not in installed:
                    raise
                _note_once(f"{error}; it is left out")
        return found

    def find(self, name: str) -> type[T]:
        """Return the class called `name`.

        Raise MoeccError if there is none, or if it lacks something that such a class needs.
        """
        found = self._found(name)
        self._require_sound(found, Path(name).name)
        return found

    def _found(self, name: str) -> type[T]:
        if name.endswith(".py"):
            loaded = self._only(self._load(Path(name)), Path(name).name)
            loaded.file = name
            return loaded
        for ep in entry_points(group=self.package, name=name):
            return self._installed(ep)
        if name not in self.names():
            raise MoeccError(self._unknown(name))
        return self._only(importlib.import_module(f"{self.package}.{name}"), name)

    def _installed(self, ep: EntryPoint) -> type[T]:
        """Return the class of another package's entry point."""
        package = "" if ep.dist is None else f" of {ep.dist.name}"
        where = f"the entry point {ep.name} = {ep.value}{package}"
        try:
            found: type[T] = ep.load()
        except (Exception, SystemExit) as e:
            why = f"can't be loaded: {type(e).__name__}: {reason(e)}"
            raise MoeccError(f"{where} {why}; repair or uninstall its package") from e
        if not isinstance(found, type) or not issubclass(found, self.kind):
            raise MoeccError(f"{where} is {found!r}; it must be a subclass of {self.kind.__name__}")
        return found

    def _unknown(self, name: str) -> str:
        if "/" in name or Path(name).is_file():
            path = f"the path of a {self.word} file ends in .py, e.g. ./my_{self.word}.py"
            return f"{name} is no {self.word}: {path}"
        near = nearest(name, self.names())
        hint = f"did you mean {near!r}?" if near else f"there are {', '.join(self.names())}"
        return f"no {self.word} {name!r}; {hint}"

    def _load(self, path: Path) -> ModuleType:
        if not path.is_file():
            advice = f"give the path of a Python file that defines a {self.word}"
            raise MoeccError(f"no {self.word} file {path}; {advice}")
        key = f"moecc_{self.word}_{path.stem}"
        try:
            SOURCES[key] = str(path.absolute()), path.read_bytes()
            return _imported(key)
        except (Exception, SystemExit) as e:
            raise MoeccError(
                f"{self.word} file {path} can't be imported: {type(e).__name__}: {e}"
            ) from e

    def _only(self, module: ModuleType, where: str) -> type[T]:
        classes = [
            v for v in vars(module).values() if isinstance(v, type) and issubclass(v, self.kind)
        ]
        own = [c for c in classes if c.__module__ == module.__name__]
        if len(own) != 1:
            raise MoeccError(
                f"{where} defines {len(own)} {self.plural}; a {self.word} file defines one"
            )
        return own[0]

    def _require_sound(self, cls: type[T], where: str) -> None:
        name = getattr(cls, "name", None)
        if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*", name):
            advice = "give a word of letters, digits, '_', '-' and '.'"
            raise MoeccError(f"{where}: {cls.__name__}.name is {name!r}; {advice}")
        self.require(cls, where)
        if cls.__abstractmethods__:
            raise MoeccError(
                f"{where}: {cls.__name__} lacks {' and '.join(sorted(cls.__abstractmethods__))}"
            )
        # a field that is no option would be missing in the text that builds the instance again
        for f in fields(cls):
            if f not in cls.options() and "printed" not in f.metadata:
                raise MoeccError(f"{where}: write {f.name} as option(DEFAULT, help=...)")
