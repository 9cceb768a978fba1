"""The journal of a run: every finished layer is on disk, so that a stopped run can go on.

A resumed run ends with the same result. The journal is one folder in the output's draft:
  run.json                  describes the run; another run's journal is never used
  layer-G-S.safetensors     the tensors that the passes of group G made in stage S
  layer-G-S.json            the nodes that use them (`moecc.pipeline.record`)
  kept-G-KEY.safetensors    work that a pass over the whole model kept (`Context.keep`)
  digests                   the SHA-256 of every file that was written, as sha256sum prints it
A group is what runs together (`moecc.pipeline.order.groups`): layer passes that go through the
layers as one, or a pass over the whole model.
A layer that cannot be restored is done again; a pass over the whole model runs again, and finds the
work that it kept. What does not match its digest is done again too, and this is said. So are a
group one of whose passes consists of a file that has changed since, and the groups behind it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

from torch import Tensor

from moecc.checkpoint.files import TensorFile, make_room, write_safetensors
from moecc.errors import MoeccError
from moecc.ir.program import Program
from moecc.ir.tensors import Held
from moecc.pipeline import record
from moecc.pipeline.passes import UNIT, Context, Kept
from moecc.types import Json, Say

_DIGESTS = "digests"
_WORK = re.compile(r"(?:layer|kept)-(\d+)-")


def finished(folder: Path) -> int:
    """Return the number of finished stages in a journal's folder, over all rounds."""
    return len(list(folder.glob("layer-*.json")))


def has_work(folder: Path) -> bool:
    """Return whether a run could go on from anything in a journal's folder."""
    return finished(folder) > 0 or any(folder.glob("kept-*.safetensors"))


class Journal:
    """The journal in `folder` of the run that `identity`, as JSON holds it, describes.

    files: the digest of every file that passes consist of or read, by path, for each group. One
    process at a time may write the journal. `say` takes remarks on files that are damaged or have
    changed. Raise MoeccError if it holds the work of another run.
    """

    def __init__(
        self,
        folder: Path,
        identity: Mapping[str, object],
        say: Say,
        files: Sequence[Mapping[str, str]] = (),
    ):
        self.folder, self._say = folder, say
        self.identity = {**identity, "files": [dict(group) for group in files]}
        self._group = 0
        self._before = Held()  # the tensors held before the layer's passes ran
        if has_work(folder):
            self._require_same_run()
        self.found = self.resuming = has_work(folder)
        if not self.found:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            self._write("run.json", self.identity)

    def _require_same_run(self) -> None:
        """Raise MoeccError if it is another run; drop what files made that have changed."""
        before = self._read("run.json") if self._is_whole("run.json") else {}
        now = json.loads(json.dumps(self.identity))
        was, files = before.pop("files", None), now.pop("files")
        if before != now:
            why = _differences(before, now) if before else "its run.json is damaged"
            advice = f"remove {self.folder.parent}, or choose another output folder"
            raise MoeccError(f"{self.folder.parent} belongs to another run ({why}); {advice}")
        changed = [i for i, group in enumerate(files) if was[i] != group]
        if changed:
            first = changed[0]
            file = min(f for f, _ in was[first].items() ^ files[first].items())
            self._say(f"note: {file} has changed; its work, and what came after, is done again")
            self._drop(first)
            self._write("run.json", self.identity)

    def _drop(self, group: int) -> None:
        """Remove the work of a group and of those behind it."""
        for file in self.folder.iterdir():
            found = _WORK.match(file.name)
            if found and int(found[1]) >= group:
                file.unlink()

    def begin(self, group: int) -> None:
        """Take what is saved and kept from now on for the work of this group."""
        self._group = group

    def save(self, stage: int, program: Program, ctx: Context) -> None:
        """Note a finished layer and spill its tensors; called after the last pass of the layer."""
        tensors = record.made(program, stage, self._before)
        self._before = Held()
        self._write_tensors(self._name(stage, "safetensors"), tensors)
        noted = record.describe(program, stage, tensors)
        noted |= {"audit": ctx.audit, "notes": ctx.notes, "ledger": ctx.ledger}
        self._write(self._name(stage, "json"), noted)
        record.spill(program, tensors, TensorFile(self.folder / self._name(stage, "safetensors")))
        for file in self.folder.glob(f"kept-{self._group}-{quote(UNIT, safe='')}*"):
            file.unlink()  # the layer holds what its units made

    def restore(self, stage: int, program: Program, ctx: Context) -> bool:
        """Put a finished layer back into `program` and `ctx`; called before a layer's passes.

        Return False, and from then on always, if the layer is not there.
        """
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
        names = [self._name(stage, kind) for kind in ("json", "safetensors")]
        if not (self.folder / names[0]).exists() or not all(map(self._is_whole, names)):
            return None
        noted, tensors = self._read(names[0]), TensorFile(self.folder / names[1])
        try:
            copy = record.restore(program, stage, noted, tensors)
        except (KeyError, MoeccError):  # the program is another one than when it was written
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
        facts = {"facts": json.dumps(work.facts)}
        return Kept(self._write_tensors(self._kept(key), work.tensors, facts), work.facts)

    def kept(self, key: str) -> Kept | None:
        """Return the work kept under `key`; None if there is none or its file is damaged."""
        name = self._kept(key)
        if not (self.folder / name).exists() or not self._is_whole(name):
            return None
        file = TensorFile(self.folder / name)
        return Kept(file, json.loads(file.metadata["facts"]))

    def forget(self, key: str) -> None:
        """Remove the work kept under `key`."""
        (self.folder / self._kept(key)).unlink(missing_ok=True)

    def _name(self, stage: int, kind: str) -> str:
        return f"layer-{self._group}-{stage:04d}.{kind}"

    def _kept(self, key: str) -> str:
        return f"kept-{self._group}-{quote(key, safe='')}.safetensors"

    def _read(self, name: str) -> Json:
        found: Json = json.loads((self.folder / name).read_text(encoding="utf-8"))
        return found

    def _write(self, name: str, value: Mapping[str, object]) -> None:
        draft = self.folder / f".{name}.part"
        draft.write_text(json.dumps(value), encoding="utf-8")
        self._put(draft, name)

    def _write_tensors(
        self, name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
    ) -> TensorFile:
        draft = self.folder / f".new-{name}"
        write_safetensors(draft, tensors, metadata)
        self._put(draft, name)
        return TensorFile(self.folder / name)

    def _put(self, draft: Path, name: str) -> None:
        """Note the digest of a file, then give it its name.

        A run that is killed in between leaves the earlier file of that name, whose digest is noted
        as well. A line that a full disk has cut must not swallow the next one, so that each begins
        with a line break.
        """
        try:
            with open(self.folder / _DIGESTS, "a", encoding="utf-8") as log:
                log.write(f"\n{_digest(draft)}  {name}\n")
                log.flush()
                os.fsync(log.fileno())
            draft.replace(self.folder / name)
        except OSError as error:
            raise MoeccError(
                f"can't write {self.folder / name}: {error.strerror or error}; {make_room(error)}"
            ) from error

    def _is_whole(self, name: str) -> bool:
        """Return whether a file is as it was written; say so if it is not."""
        try:
            log = (self.folder / _DIGESTS).read_text(encoding="utf-8", errors="replace")
            if f"{_digest(self.folder / name)}  {name}" in log.splitlines():
                return True
            why = "does not match its digest"
        except OSError as error:
            why = f"can't be read ({error.strerror})"
        self._say(f"note: {self.folder / name} {why}; its work is done again")
        return False


def _digest(file: Path) -> str:
    with open(file, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


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
