"""`moecc targets [NAME]`: the forms in which an artifact can be written, and the options of one."""

from __future__ import annotations

from moecc.commands.passes import describe_options, option_lines, summary_of
from moecc.target import TARGETS, Target
from moecc.types import Json


def describe_target(name: str) -> Json:
    """Return what the target `name` writes and its options; raise MoeccError if there is none."""
    return _described(TARGETS.find(name))


def describe_targets() -> list[Json]:
    """Describe every target that can be named without a path; skip broken ones with a note."""
    return [_described(cls) for cls in TARGETS.classes().values()]


def _described(cls: type[Target]) -> Json:
    return {"name": cls.name, "summary": summary_of(cls), "options": describe_options(cls)}


def target_line(target: Json) -> str:
    """Return one target in a line."""
    return f"{target['name']:<12} {target['summary']}"


def target_text(target: Json) -> str:
    """Return the text about one target and its options."""
    return "\n".join([target_line(target), *option_lines(target["options"])])
