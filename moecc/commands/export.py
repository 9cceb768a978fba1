"""`moecc export OUT --to TARGET`, `moecc bench OUT`, `moecc build-ops`: what targets make of an artifact."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moecc.checkpoint.source import checkpoint_folder
from moecc.errors import MoeccError
from moecc.target import TARGETS, Emitted, Target, parse_target
from moecc.types import Say


def export_artifact(
    model: str, to: str, out: Path | None = None, *, say: Say = lambda line: None
) -> Emitted:
    """Write the artifact or checkpoint `model` (folder or hub id) in the form that the target text `to` names.

    out: the new folder, by default one with the target's name in the model's. MoeccError in one line, with nothing left behind.
    """
    target, folder = parse_target(to), checkpoint_folder(model)
    return target.emit(folder, out or folder / target.name, say)


def bench_export(
    folder: Path,
    *,
    threads: Sequence[int] = (1, 2),
    prompt: int = 128,
    new_tokens: int = 64,
    say: Say = lambda line: None,
) -> tuple[Target, Any]:
    """The target that wrote `folder`, or a folder in it that has the target's name, and rows of how fast that is here."""
    for name in TARGETS.names():
        target = TARGETS.find(name)()
        if (
            found := next((f for f in (folder, folder / name) if target.exported(f)), None)
        ) is not None:
            target.require()
            return target, target.bench(
                found, threads=threads, prompt=prompt, new_tokens=new_tokens, say=say
            )
    raise MoeccError(
        f"{folder} holds nothing that was exported; run `moecc export {folder} --to TARGET` first"
    )


def build_libraries(say: Say = lambda line: None) -> list[Path]:
    """Compile the native libraries of all targets that have one."""
    found: list[Path] = []
    for name in TARGETS.names():
        cls = TARGETS.find(name)
        if cls.build is not Target.build:
            cls().require()
            found += cls().build(say)
    return found
