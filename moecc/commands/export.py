"""`moecc export OUT --to TARGET`, `moecc bench OUT`, `moecc build-ops`: what targets do."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from moecc.artifact.draft import Busy
from moecc.checkpoint.source import checkpoint_folder
from moecc.errors import MoeccError, naming, quoted
from moecc.target import TARGETS, Emitted, Target, emit, parse_target
from moecc.types import Say


def export_artifact(
    model: str, to: str, out: Path | None = None, *, say: Say = lambda line: None
) -> Emitted:
    """Write the artifact or checkpoint `model` (folder or hub id) in the form that `to` names.

    to: a target with its options, such as `onnx{profile=native}`. out: the new folder, by default
    the target's name inside the model's folder. Raise MoeccError if the target cannot write the
    model. moecc's own targets then leave nothing behind; if another has left a part of the folder,
    the error says so: only the user knows that nobody else has put it there.
    """
    target, folder = parse_target(to), checkpoint_folder(model)
    where = out or folder / target.name
    before = os.path.lexists(where)
    try:
        found = emit(target, folder, where, say)
        if out is not None and found.out is None:
            why = "writes nothing, the artifact runs as it is"
            raise MoeccError(f"{target} {why}; leave -o {out} out")
    except Busy:  # what lies there is another's
        raise
    except MoeccError as error:
        if before or not os.path.lexists(where):
            raise
        raise MoeccError(f"{error}; a part of the export may lie in {where}; remove it") from error
    return found


def bench_export(
    folder: Path,
    *,
    threads: Sequence[int] = (1, 2),
    prompt: int = 128,
    new_tokens: int = 64,
    say: Say = lambda line: None,
) -> tuple[Target, object]:
    """Measure an exported model here: return the target that wrote it and the rows of its `bench`.

    Only targets that are found by name are asked. folder: the export, or an artifact with the
    export in a subfolder of the target's name. Raise MoeccError if there is no export.
    """
    if not folder.is_dir():
        raise MoeccError(f"no folder {quoted(folder)}; give that of an artifact or of an export")
    for name, cls in TARGETS.classes().items():
        with naming(name):
            target = cls()
            found = next((f for f in (folder, folder / name) if target.exported(f)), None)
            if found is not None:
                target.require()
                rows = target.bench(
                    found, threads=threads, prompt=prompt, new_tokens=new_tokens, say=say
                )
                return target, rows
    raise MoeccError(
        f"{folder} holds no export that can be measured here; "
        f"run `moecc export {folder} --to TARGET` with a target that has a benchmark first"
    )


def build_libraries(say: Say = lambda line: None) -> list[Path]:
    """Compile the native libraries of all targets that have any; return their paths."""
    found: list[Path] = []
    for name, cls in TARGETS.classes().items():
        if cls.build is not Target.build:
            with naming(name):
                cls().require()
                found += cls().build(say)
    return found
