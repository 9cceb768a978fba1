"""What passes and targets share: a frozen dataclass whose fields are options, printed and read back as text.

`vq{bits=3,codebook=layer}` builds a pass, `onnx{profile=native}` a target, and `str()` of either prints the text that builds it
again. An option is a dataclass field made by `option`, which says what the option is for and what it takes.
"""

from __future__ import annotations

import difflib
import re
from abc import ABC
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, ClassVar, Self

from moecc.errors import MoeccError

_ITEM = re.compile(r"\s*([^,{}]*[^\s,{}])\s*(?:\{([^{}]*)\})?\s*(?:,|$)")


def option(
    default: Any,
    *,
    help: str,
    choices: Sequence[Any] = (),
    low: float | None = None,
    high: float | None = None,
) -> Any:
    """A dataclass field with its help text and what it takes: one of `choices`, or a number from `low` to `high`."""
    return field(
        default=default,
        metadata={"help": help, "choices": tuple(choices), "low": low, "high": high},
    )


def accepts(f: Field[Any], value: Any) -> bool:
    """Whether option `f` takes `value`."""
    choices, low, high = (f.metadata.get(k) for k in ("choices", "low", "high"))
    if choices and value in choices:
        return True
    if not isinstance(value, int | float) or (low is None and high is None):
        return not choices
    return (low is None or value >= low) and (high is None or value <= high)


def accepted(f: Field[Any]) -> str:
    """The values that option `f` takes, in words."""
    choices, low, high = (f.metadata.get(k) for k in ("choices", "low", "high"))
    parts = [" | ".join(map(str, choices))] if choices else []
    if low is not None or high is not None:
        parts.append(
            f"{'' if low is None else f'{low:g} <= '}number{'' if high is None else f' <= {high:g}'}"
        )
    return " | ".join(parts) or "any value"


@dataclass(frozen=True, kw_only=True)
class Options(ABC):
    """A named thing with options. Subclasses are frozen dataclasses; MoeccError where an option is out of range."""

    name: ClassVar[str]
    file: ClassVar[str] = (
        ""  # the path of the Python file that defines it, "" for what is found by name
    )

    def __post_init__(self) -> None:
        for f in self.options():
            if not accepts(f, value := getattr(self, f.name)):
                raise MoeccError(
                    f"{self.name}: {f.name}={value} is out of range; it takes {accepted(f)}"
                )

    @classmethod
    def options(cls) -> list[Field[Any]]:
        """The fields that a user may set."""
        return [f for f in fields(cls) if "help" in f.metadata]

    @classmethod
    def build_from(cls, text: str, defaults: dict[str, Any] | None = None) -> Self:
        """The instance that `text`, such as `bits=3,codebook=layer`, describes; `defaults` are for options it leaves out."""
        return cls(**{**(defaults or {}), **cls.read(text)})

    @classmethod
    def read(cls, text: str) -> dict[str, Any]:
        """The options that `text` gives, by name; MoeccError for an option that there is not, or a value out of range."""
        given: dict[str, Any] = {}
        for key, value in _pairs(cls.name, text):
            given[key] = read_option(cls.name, cls.option_called(key), value)
        return given

    @classmethod
    def option_called(cls, key: str) -> Field[Any]:
        """The option `key`; MoeccError, with what is like it, where there is none."""
        known = {f.name: f for f in cls.options()}
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {sorted(known)}"
            raise MoeccError(f"{cls.name} has no option {key!r}; {hint}")
        return known[key]

    def changed(self) -> dict[str, Any]:
        """The options that are not at their defaults."""
        return {f.name: v for f in self.options() if (v := getattr(self, f.name)) != f.default}

    def __str__(self) -> str:
        changed = [
            f"{k}={str(v).lower() if isinstance(v, bool) else v}" for k, v in self.changed().items()
        ]
        return (self.file or self.name) + ("{" + ",".join(changed) + "}" if changed else "")


def items(text: str) -> list[tuple[str, str]]:
    """The (name, options) of each item of a list such as `vsraq,kbvq{bits=2}`; MoeccError says at which column it ends."""
    found, at = [], 0
    while at < len(text):
        m = _ITEM.match(text, at)
        if not m or (re.search(r"\s", m[1]) and not m[1].endswith(".py")):
            what = "expected name or name{key=value,...}"
            raise MoeccError(f"can't read the pipeline at column {at + 1}: {text[at:]!r}; {what}")
        found.append((m[1], m[2] or ""))
        at = m.end()
    return found


def _pairs(owner: str, text: str) -> list[tuple[str, str]]:
    found: dict[str, str] = {}
    for item in filter(None, (o.strip() for o in text.split(","))):
        key, equals, value = item.partition("=")
        if key in found:
            raise MoeccError(f"{owner}: option {key!r} is there twice; leave one out")
        if not equals:
            raise MoeccError(f"{owner}: option {key!r} lacks a value; write {key}=VALUE")
        found[key] = value
    return list(found.items())


def read_option(owner: str, f: Field[Any], text: str) -> Any:
    """The value that `text` means for option `f`, by the type of its default and its choices."""
    choices = f.metadata.get("choices", ())
    for choice in choices:
        if text == str(choice):
            return choice
    default = None if f.default is MISSING else f.default
    kinds: list[Callable[[str], Any]] = []
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
    what = "true | false" if isinstance(default, bool) else accepted(f)
    raise MoeccError(f"{owner}: {f.name}={text!r} is out of range; it takes {what}")
