"""`moecc passes [NAME]`: list the passes, or show one with its options."""

from __future__ import annotations

import sys

from moecc.options import Options, accepted
from moecc.pipeline.parse import find_pass, pass_classes
from moecc.pipeline.passes import Composite, LayerPass, Pass
from moecc.types import Json

_INDENT = " " * 12


def describe_pass(name: str) -> Json:
    """Return the facts and options of the pass `name`; raise MoeccError if there is none."""
    return _described(find_pass(name))


def describe_passes() -> list[Json]:
    """Describe every pass that can be named without a path; skip broken ones with a note."""
    return [_described(cls) for cls in pass_classes().values()]


def _described(cls: type[Pass]) -> Json:
    composite = issubclass(cls, Composite)
    scope = "composite" if composite else "layer" if issubclass(cls, LayerPass) else "model"
    return {
        "name": cls.name,
        "summary": summary_of(cls),
        "scope": scope,
        "needs": sorted(cls.requires),
        "after": sorted(cls.after),
        "gives": sorted(cls.provides),
        "spoils": sorted(cls.spoils),
        "needs_data": cls.needs_data,
        "options": describe_options(cls),
        "passes_on": _passed_on(cls) if issubclass(cls, Composite) else [],
        "expands": ",".join(map(str, cls().expand())) if issubclass(cls, Composite) else None,
    }


def summary_of(cls: type[Options]) -> str:
    """Return the first line of the docstring of the file that defines a pass or a target.

    If the file has none, it is that of the class.
    """
    return (sys.modules[cls.__module__].__doc__ or cls.__doc__ or "").strip().split("\n")[0]


def describe_options(cls: type[Options]) -> list[Json]:
    """Return the options of a pass or a target, each with default, range and help."""
    return [
        {"name": f.name, "default": f.default, "takes": accepted(f), "help": f.metadata["help"]}
        for f in cls.options()
    ]


def option_lines(options: list[Json]) -> list[str]:
    """Return two lines about each option, or one that says there are none."""
    lines = []
    for o in options:
        default = str(o["default"])
        shown = default.lower() if isinstance(o["default"], bool) else default
        lines += [f"  {o['name']}={shown}", f"      {o['help']} ({o['takes']})"]
    return lines or ["  no options"]


def _passed_on(cls: type[Composite]) -> list[Json]:
    """Return the options of parts that the composite lacks, each with its owner."""
    own, found = {f.name for f in cls.options()}, {}
    for part in cls.parts:
        for f in part.options():
            if f.name not in own:
                found[f.name] = {"name": f.name, "of": part.name}
    return list(found.values())


def pass_line(p: Json) -> str:
    """Return two lines about a pass: its summary, and the facts that it needs and gives."""
    facts = f"{', '.join(p['needs']) or '-'} -> {', '.join(p['gives']) or '-'}"
    return f"{p['name']:<12} {p['summary']}\n{_INDENT} {facts}"


def pass_text(p: Json) -> str:
    """Return the text about one pass and its options."""
    lines = [pass_line(p)]
    if p["expands"]:
        lines.append(f"{_INDENT} stands for {p['expands']}")
    for key, what in (("after", "comes after"), ("spoils", "spoils")):
        if p[key]:
            lines.append(f"{_INDENT} {what} {', '.join(p[key])}")
    lines += option_lines(p["options"])
    if p["passes_on"]:
        passed = ", ".join(f"{o['name']} to {o['of']}" for o in p["passes_on"])
        lines.append(f"  passes on {passed}")
    return "\n".join(lines)
