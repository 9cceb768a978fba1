"""The journal of a run: every finished layer is on disk, so that an interrupted run can go on.

A resumed run ends with the same result. The journal is one folder next to the output:
  run.json                  describes the run; another run's journal is never used
  layer-R-S.safetensors     the tensors that passes made in stage S of round R
  layer-R-S.json            the nodes that use them (`moecc.pipeline.record`)
  kept-KEY.safetensors      work that a pass over the whole model kept (`Context.keep`)
Layer passes that a pass over the whole model separates go through the layers once each, in rounds.
A layer that cannot be restored is done again; a pass over the whole model runs again, and finds the
work that it kept.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote

from filelock import FileLock, Timeout

from moecc.checkpoint.files import TensorFile, write_safetensors
from moecc.errors import MoeccError
from moecc.ir.program import Program
from moecc.ir.tensors import Held
from moecc.pipeline import record
from moecc.pipeline.passes import Context, Kept
from moecc.types import Json


class Busy(MoeccError):
    """Another process writes the journal."""


class Journal:
    """The journal in `folder` of the run that `identity`, as JSON holds it, describes.

    Raise Busy if another process writes it, MoeccError if it is another run's.
    """

    def __init__(self, folder: Path, identity: Mapping[str, object]):
        self.folder, self.identity = folder, dict(identity)
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(folder / "lock", timeout=0)
        try:
            self._lock.acquire()
        except Timeout as e:
            advice = "wait for it, or choose another output folder"
            raise Busy(f"{folder.parent} is in use by another run; {advice}") from e
        # a run that was killed while it made the folder leaves only the lock and drafts in it
        self.found = any(f.name != "lock" and not f.name.startswith(".") for f in folder.iterdir())
        self.resuming = self.found
        self._round = self._stage = 0
        self._before = Held()  # the tensors held before the layer's passes ran
        try:
            if self.found:
                self._require_same_run()
            else:
                self._write("run.json", self.identity)
        except BaseException:
            self.close()
            raise

    def _require_same_run(self) -> None:
        try:
            before = json.loads((self.folder / "run.json").read_text())
        except (OSError, ValueError):
            before = None
        now = json.loads(json.dumps(self.identity))
        if before != now:
            unreadable = "its run.json can't be read"
            why = _differences(before, now) if isinstance(before, dict) else unreadable
            advice = f"remove {self.folder.parent}, or choose another output folder"
            raise MoeccError(f"{self.folder.parent} belongs to another run ({why}); {advice}")

    def finished(self) -> int:
        """Return the number of finished stages, over all rounds."""
        return len(list(self.folder.glob("layer-*.json")))

    def save(self, stage: int, program: Program, ctx: Context) -> None:
        """Note a finished layer and spill its tensors; called after the last pass of the layer."""
        tensors = record.made(program, stage, self._before)
        self._before = Held()
        write_safetensors(self._file(stage, "safetensors"), tensors)
        noted = record.describe(program, stage, tensors)
        noted |= {"audit": ctx.audit, "notes": ctx.notes, "ledger": ctx.ledger}
        self._write(self._file(stage, "json").name, noted)
        record.spill(program, tensors, TensorFile(self._file(stage, "safetensors")))

    def restore(self, stage: int, program: Program, ctx: Context) -> bool:
        """Put a finished layer back into `program` and `ctx`; called before a layer's passes.

        Return False, and from then on always, if the layer is not there.
        """
        self._round += stage <= self._stage
        self._stage = stage
        noted = self._restored(stage, program) if self.resuming else None
        self.resuming = noted is not None
        if noted is None:
            self._before = Held(program.tensors)
            return False
        for there, found in ((ctx.audit, noted["audit"]), (ctx.ledger, noted["ledger"])):
            there.clear()
            there.update(found)
        ctx.notes[:] = noted["notes"]
        return True

    def _restored(self, stage: int, program: Program) -> Json | None:
        """Restore a layer and return its record; if that fails, change nothing and return None."""
        try:
            noted: Json = json.loads(self._file(stage, "json").read_text())
            tensors = TensorFile(self._file(stage, "safetensors"))
            copy = record.restore(program, stage, noted, tensors)
        except (OSError, ValueError, KeyError, MoeccError):
            return None
        if copy is None:
            return None
        record.spill(copy, tensors, tensors)
        program.module, program.weights, program.tensors = copy.module, copy.weights, copy.tensors
        program.rounded = copy.rounded
        return noted

    def keep(self, key: str, work: Kept) -> Kept:
        """Keep a part of a pass's work under `key`; return it with its tensors on disk.

        Earlier work under the same key is replaced.
        """
        write_safetensors(self._kept(key), work.tensors, {"facts": json.dumps(work.facts)})
        return Kept(TensorFile(self._kept(key)), work.facts)

    def kept(self, key: str) -> Kept | None:
        """Return the work kept under `key`; None if there is none or its file cannot be read."""
        try:
            file = TensorFile(self._kept(key))
            return Kept(file, json.loads(file.metadata["facts"]))
        except (MoeccError, ValueError, KeyError):
            return None

    def _kept(self, key: str) -> Path:
        return self.folder / f"kept-{quote(key, safe='')}.safetensors"

    def _file(self, stage: int, kind: str) -> Path:
        return self.folder / f"layer-{self._round}-{stage:04d}.{kind}"

    def remove(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def close(self) -> None:
        """Release the folder for other runs."""
        self._lock.release()

    def _write(self, name: str, value: Mapping[str, object]) -> None:
        draft = self.folder / f".{name}.part"
        draft.write_text(json.dumps(value))
        draft.replace(self.folder / name)


def _differences(before: Mapping[str, object], now: Mapping[str, object]) -> str:
    """Return the entries that differ, with both values: "seed was 0, now 1"."""
    parts = []
    for key in [*before, *(k for k in now if k not in before)]:
        was, is_now = before.get(key), now.get(key)
        if isinstance(was, dict) and isinstance(is_now, dict):
            parts += [_differences(was, is_now)] if was != is_now else []
        elif was != is_now:
            parts.append(f"{key} was {_short(was)}, now {_short(is_now)}")
    return "; ".join(parts)


def _short(value: object) -> str:
    """Return a value as text; of a digest, the first digits, which suffice to tell two apart."""
    text = "none" if value in (None, "", {}) else str(value)
    return text[:8] if re.fullmatch("[0-9a-f]{16,64}", text) else text
