"""What a pass may record of a weight: the types that moecc.json and report.html rely on."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from moecc.errors import MoeccError
from moecc.pipeline.fate import Fate


def require(name: str, facts: Mapping[str, object]) -> None:
    """Raise MoeccError if a fact of the weight `name` has a type that cannot be shown."""
    if not isinstance(name, str):
        raise MoeccError(f"can't record anything of {name!r}; give the name of a weight")
    for key, value in facts.items():
        if key in _COUNTED:
            raise MoeccError(f"{name}: can't record {key}, which moecc counts; take another name")
        holds, what = _KINDS.get(key, (_terms, "a dict of numbers for both before and after"))
        if not holds(value):
            raise MoeccError(f"{name}: can't record {key}={value!r}; give {what}")


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _count(value: object) -> bool:
    return type(value) is int and value >= 0


def _counts(value: object) -> bool:
    return isinstance(value, list) and all(map(_count, value))


def _counts_by_expert(value: object) -> bool:
    return isinstance(value, dict) and all(
        str(expert).isdecimal() and _count(count) for expert, count in value.items()
    )


def _terms(value: object) -> bool:
    """Tell whether any other value can be shown: one of before and after is a loss by its terms."""
    if not (isinstance(value, dict) and {"before", "after"} <= value.keys()):
        return True
    both = value["before"], value["after"]
    return all(isinstance(terms, dict) and all(map(_number, terms.values())) for terms in both)


_COUNTED = ("bytes", "source_bits")
_KINDS: dict[str, tuple[Callable[[object], bool], str]] = {
    "fate": (lambda value: isinstance(value, Fate), "a Fate"),
    "error": (_number, "a number"),
    "in_sample_error": (_number, "a number"),
    "tokens": (_counts, "a list of counts"),
    "starved": (_counts_by_expert, "a dict of counts by expert"),
    "fallback": (lambda value: isinstance(value, str), "text"),
}
