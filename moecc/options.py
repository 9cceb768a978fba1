"""Options of passes and targets: the fields of a frozen dataclass, printed and read back as text.

`vq{bits=3,codebook=layer}` builds a pass and `onnx{profile=native}` a target; `str()` of either
prints the text that builds it again. `option` makes a field with its help text and the values it
takes.
"""

from __future__ import annotations

import difflib
import re
from abc import ABC
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, ClassVar, Self

from moecc.errors import MoeccError
from moecc.types import Json

_ITEM = re.compile(r"\s*([^,{}]*[^\s,{}])\s*(?:\{([^{}]*)\})?\s*(,|$)")


def option(
    default: object,
    *,
    help: str,
    choices: Sequence[object] = (),
    low: float | None = None,
    high: float | None = None,
) -> Any:  # as dataclasses.field: a type checker sees the default assigned to the field's type
    """Return a dataclass field that takes one of `choices`, or a number from `low` to `high`."""
    return field(
        default=default,
        metadata={"help": help, "choices": tuple(choices), "low": low, "high": high},
    )


def accepts(f: Field[object], value: object) -> bool:
    """Return whether option `f` takes `value`."""
    choices, low, high = (f.metadata.get(k) for k in ("choices", "low", "high"))
    if choices and value in choices:
        return True
    if not isinstance(value, int | float) or (low is None and high is None):
        return not choices
    return (low is None or value >= low) and (high is None or value <= high)


def accepted(f: Field[object]) -> str:
    """Return the values that option `f` takes, in words."""
    choices, low, high = (f.metadata.get(k) for k in ("choices", "low", "high"))
    if isinstance(f.default, bool):
        return "true | false"
    parts = [" | ".join(map(str, choices))] if choices else []
    if low is not None or high is not None:
        least = "" if low is None else f"{low:g} <= "
        most = "" if high is None else f" <= {high:g}"
        parts.append(f"{least}number{most}")
    return " | ".join(parts) or "any value"


@dataclass(frozen=True, kw_only=True)
class Options(ABC):
    """A named thing with options; subclasses are frozen dataclasses.

    Raise MoeccError if an option is out of range.
    """

    name: ClassVar[str]
    file: ClassVar[str] = ""  # the path of its Python file; "" if the registry finds it by name

    def __post_init__(self) -> None:
        for f in self.options():
            if not accepts(f, value := getattr(self, f.name)):
                raise MoeccError(
                    f"{self.name}: {f.name}={value} is out of range; it takes {accepted(f)}"
                )

    @classmethod
    def options(cls) -> list[Field[object]]:
        """Return the fields that a user may set."""
        return [f for f in fields(cls) if "help" in f.metadata]

    @classmethod
    def option_names(cls) -> set[str]:
        """Return the names that the text of an instance may give."""
        return {f.name for f in cls.options()}

    @classmethod
    def build_from(cls, text: str, defaults: Json | None = None) -> Self:
        """Build the instance that `text` describes, such as `bits=3,codebook=layer`.

        An option that `text` leaves out is taken from `defaults`.
        """
        return cls(**{**(defaults or {}), **cls.read(text)})

    @classmethod
    def read(cls, text: str) -> Json:
        """Return the options that `text` gives, by name.

        Raise MoeccError if an option is unknown or its value is out of range.
        """
        given: Json = {}
        for key, value in _pairs(cls.name, text):
            given[key] = read_option(cls.name, cls.option_called(key), value)
        return given

    @classmethod
    def option_called(cls, key: str) -> Field[object]:
        """Return the option `key`; raise MoeccError, with the nearest name, if there is none."""
        known = {f.name: f for f in cls.options()}
        if key not in known:
            names = sorted(cls.option_names())
            near = nearest(key, names)
            hint = f"did you mean {near!r}?" if near else f"it has {names}"
            raise MoeccError(f"{cls.name} has no option {key!r}; {hint}")
        return known[key]

    def changed(self) -> Json:
        """Return the options that differ from their defaults."""
        return {f.name: v for f in self.options() if (v := getattr(self, f.name)) != f.default}

    def __str__(self) -> str:
        changed = [
            f"{k}={str(v).lower() if isinstance(v, bool) else v}" for k, v in self.changed().items()
        ]
        return (self.file or self.name) + ("{" + ",".join(changed) + "}" if changed else "")


def items(text: str, what: str = "pipeline") -> list[tuple[str, str]]:
    """Return (name, options) for each item of a list such as `vsraq,kbvq{bits=2}`.

    Raise MoeccError, with the column, if the text is not such a list. what: its name in messages.
    """
    found, at = [], 0
    while at < len(text):
        m = _ITEM.match(text, at)
        if not m or (re.search(r"\s", m[1]) and not m[1].endswith(".py")):
            where = f"can't read the {what} at column {at + 1}"
            raise MoeccError(f"{where}: {text[at:]!r}; expected name or name{{key=value,...}}")
        found.append((m[1], m[2] or ""))
        at = m.end()
        if m[3] and not text[at:].strip():
            raise MoeccError(
                f"the {what} {text!r} ends in a comma; take it away or name what follows"
            )
    return found


def nearest(name: str, names: Sequence[str]) -> str | None:
    """Return the name that is most like `name`, in letters of any case, None if none is."""
    folded = {n.casefold(): n for n in names}
    found = difflib.get_close_matches(name.casefold(), folded, n=1)
    return folded[found[0]] if found else None


def _pairs(owner: str, text: str) -> list[tuple[str, str]]:
    found: dict[str, str] = {}
    for item in text.split(",") if text.strip() else ():
        if not item.strip():
            raise MoeccError(f"{owner}: there is a comma too many in {{{text}}}; take it away")
        key, equals, value = (part.strip() for part in item.partition("="))
        if key in found:
            raise MoeccError(f"{owner}: option {key!r} is there twice; leave one out")
        if not equals:
            raise MoeccError(f"{owner}: option {key!r} lacks a value; write {key}=VALUE")
        found[key] = value
    return list(found.items())


def read_option(owner: str, f: Field[object], text: str) -> object:
    """Convert `text` to a value of option `f`, by its choices and the type of its default.

    Raise MoeccError if `f` takes no such value.
    """
    choices: Sequence[object] = f.metadata.get("choices", ())
    for choice in choices:
        if text == str(choice):
            return choice
    default = None if f.default is MISSING else f.default
    kinds: list[Callable[[str], object]] = []
    if isinstance(default, float):
        kinds = [float]
    elif "float" in str(f.type):  # int | float
        kinds = [int, float]
    elif isinstance(default, bool):
        if text in ("true", "false"):
            return text == "true"
    elif isinstance(default, int) or (
        isinstance(default, str) and f.metadata.get("low") is not None
    ):
        kinds = [int]
    elif isinstance(default, str) and not choices:
        return text
    for kind in kinds:
        try:
            return kind(text)
        except ValueError:
            continue
    whole = "whole " if kinds == [int] else ""
    wrong = f"is no {whole}number" if kinds else "is out of range"
    raise MoeccError(f"{owner}: {f.name}={text!r} {wrong}; it takes {accepted(f)}")
