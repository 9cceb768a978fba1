"""`moecc passes [NAME]`: the passes there are, and the options of one."""

from __future__ import annotations

import sys
from typing import Any

from moecc.options import accepted
from moecc.pipeline.parse import find_pass, pass_names
from moecc.pipeline.passes import Composite, LayerPass, Pass


def describe_pass(name: str) -> dict[str, Any]:
    """What the pass `name` does, needs and gives, and its options, as JSON holds it."""
    cls = find_pass(name)
    summary = (sys.modules[cls.__module__].__doc__ or cls.__doc__ or "").strip().split("\n")[0]
    composite = issubclass(cls, Composite)
    scope = "composite" if composite else "layer" if issubclass(cls, LayerPass) else "model"
    return {
        "name": cls.name,
        "summary": summary,
        "scope": scope,
        "needs": sorted(cls.requires),
        "after": sorted(cls.after),
        "gives": sorted(cls.provides),
        "spoils": sorted(cls.spoils),
        "needs_data": cls.needs_data,
        "options": _options(cls),
        "passes_on": _passed_on(cls) if issubclass(cls, Composite) else [],
        "expands": ",".join(map(str, cls().expand())) if issubclass(cls, Composite) else None,
    }


def describe_passes() -> list[dict[str, Any]]:
    """Every pass that can be named without a path."""
    return [describe_pass(name) for name in pass_names()]


def _options(cls: type[Pass]) -> list[dict[str, Any]]:
    return [
        {"name": f.name, "default": f.default, "takes": accepted(f), "help": f.metadata["help"]}
        for f in cls.options()
    ]


def _passed_on(cls: type[Composite]) -> list[dict[str, str]]:
    """Options of parts that the composite lacks, each with its owner."""
    own, found = {f.name for f in cls.options()}, {}
    for part in cls.parts:
        for f in part.options():
            if f.name not in own:
                found[f.name] = {"name": f.name, "of": part.name}
    return list(found.values())


def pass_line(p: dict[str, Any]) -> str:
    """One pass in two lines: what it does, what it needs and gives."""
    return f"{p['name']:<12} {p['summary']}\n{'':<12} {', '.join(p['needs']) or '-'} -> {', '.join(p['gives']) or '-'}"


def pass_text(p: dict[str, Any]) -> str:
    """One pass with its options."""
    lines = [pass_line(p)]
    if p["expands"]:
        lines.append(f"{'':<12} stands for {p['expands']}")
    for key, what in (("after", "comes after"), ("spoils", "spoils")):
        if p[key]:
            lines.append(f"{'':<12} {what} {', '.join(p[key])}")
    for o in p["options"]:
        lines.append(
            f"  {o['name']}={str(o['default']).lower() if isinstance(o['default'], bool) else o['default']}"
        )
        lines.append(f"      {o['help']} ({o['takes']})")
    if p["passes_on"]:
        lines.append(
            "  passes on " + ", ".join(f"{o['name']} to {o['of']}" for o in p["passes_on"])
        )
    return "\n".join(lines if p["options"] else [*lines, "  no options"])
