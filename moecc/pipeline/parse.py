"""Parse `--passes vsraq,kbvq{bits=2}`: find each pass and read its options."""

from __future__ import annotations

import math
from collections.abc import Mapping

from moecc.errors import MoeccError
from moecc.options import accepted, accepts, items
from moecc.pipeline.passes import Composite, Pass
from moecc.registry import Registry
from moecc.types import Json

FACTS = ("requires", "after", "provides", "spoils", "leads_to", "within_layer")


def _require_facts(cls: type[Pass], where: str) -> None:
    for kind in FACTS:
        facts = getattr(cls, kind)
        if not isinstance(facts, set | frozenset) or not all(isinstance(f, str) for f in facts):
            raise MoeccError(
                f"{where}: {cls.__name__}.{kind} is {facts!r}; give a frozenset of facts"
            )
    if issubclass(cls, Composite):
        parts = getattr(cls, "parts", None)
        if not isinstance(parts, tuple) or not all(
            isinstance(p, type) and issubclass(p, Pass) for p in parts
        ):
            advice = "give a tuple of the passes that it may stand for"
            raise MoeccError(f"{where}: {cls.__name__}.parts is {parts!r}; {advice}")


PASSES: Registry[Pass] = Registry(
    Pass,  # type: ignore[type-abstract]
    "moecc.passes",
    "pass",
    "passes",
    _require_facts,
)


def pass_classes() -> dict[str, type[Pass]]:
    """Return every pass that needs no path, by name; one that is broken is left out with a note."""
    return PASSES.classes()


def pass_names() -> list[str]:
    """Return the name of every pass that needs no path."""
    return PASSES.names()


def find_pass(name: str) -> type[Pass]:
    """Return the pass called `name`; raise MoeccError if there is none.

    name: the path of a Python file, an installed entry point, or that of `moecc/passes/<name>.py`.
    """
    return PASSES.find(name)


def parse_passes(text: str, **defaults: object) -> tuple[list[Pass], list[str]]:
    """Return the passes that `text` names, and remarks.

    defaults: values by option name; None stands for no default. A default goes to every pass that
    has the option, takes the value and is given no other one. Raise MoeccError if no pass takes it.
    """
    if not text.strip():
        raise MoeccError("no passes given; `moecc passes` lists what there is")
    for key, value in defaults.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise MoeccError(f"{key}={value} is no number that a pass takes; give a finite one")
    wanted = {
        k: int(v) if isinstance(v, float) and v == int(v) else v
        for k, v in defaults.items()
        if v is not None
    }
    found: list[Pass] = []
    remarks: list[str] = []
    for name, options in items(text):
        cls = find_pass(name)
        found.append(cls.build_from(options, _taken(cls, options, wanted, remarks)))
    for key, value in wanted.items():
        if not any(getattr(p, key, None) == value for p in found):
            why = f": {'; '.join(remarks)}" if remarks else ""
            raise MoeccError(f"no pass of {text!r} takes --{key} {value}{why}")
    return found, remarks


def _taken(cls: type[Pass], options: str, wanted: Mapping[str, object], remarks: list[str]) -> Json:
    """Return the wanted defaults that a pass takes; add a remark for each value that it refuses."""
    known, given, taken = {f.name: f for f in cls.options()}, cls.read(options), {}
    for key, value in wanted.items():
        if key not in known or key in given:
            continue
        if accepts(known[key], value):
            taken[key] = value
        else:
            why = f"it takes {accepted(known[key])}, not {value}"
            remarks.append(f"{cls.name} keeps {key}={known[key].default} ({why})")
    return taken
