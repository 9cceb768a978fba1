"""The journal of a run: every finished layer on disk, so that an interrupted run goes on where it stopped and ends the same.

One folder next to the output holds `run.json` (what the run is: another run's journal is never used) and per finished layer a
safetensors file of the tensors that passes made and a JSON file of the nodes that use them. Restoring a layer puts those nodes and
tensors into a copy, and the copy's graph text is compared with what was noted; a layer that a journal can't express is done again.
Layer passes that a model pass separates go through the layers once each, in rounds; every round has files of its own.
A pass over the whole model runs again, and finds what it kept of its work (`Context.keep`), a safetensors file for each key.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

from filelock import FileLock, Timeout
from torch import fx

from moecc.checkpoint.files import TensorFile, write_safetensors
from moecc.errors import MoeccError
from moecc.ir import ops
from moecc.ir.program import Program, stage_nodes
from moecc.ir.tensors import Held
from moecc.pipeline.passes import Context, Kept

_OPS = {str(t): t for t in (*sorted(ops.MOE_OPS, key=str), ops.Q_LINEAR)}


class Busy(MoeccError):
    """Another process writes the journal."""


class Journal:
    """The journal in `folder` of the run that `identity` describes."""

    def __init__(self, folder: Path, identity: Mapping[str, Any]):
        self.folder, self.identity = folder, dict(identity)
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(folder / "lock", timeout=0)
        try:
            self._lock.acquire()
        except Timeout as e:
            raise Busy(
                f"{folder.parent} is in use by another run; wait for it, or choose another output folder"
            ) from e
        # nothing is in the folder of a run that was killed as it made it, but the lock and drafts
        self.found = any(f.name != "lock" and not f.name.startswith(".") for f in folder.iterdir())
        self.resuming = self.found
        self._round = self._stage = 0
        self._before = Held()  # what was held before the layer's passes ran
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
            why = (
                _differences(before, now)
                if isinstance(before, dict)
                else "its run.json can't be read"
            )
            advice = f"remove {self.folder.parent}, or choose another output folder"
            raise MoeccError(f"{self.folder.parent} belongs to another run ({why}); {advice}")

    def finished(self) -> int:
        """How many stages of the program it holds, each round counted."""
        return len(list(self.folder.glob("layer-*.json")))

    def save(self, stage: int, program: Program, ctx: Context) -> None:
        """Note a finished layer; called after the last pass of a group of layer passes."""
        new = [
            name for name in _held(program, stage) if not program.tensors.same(self._before, name)
        ]
        tensors = {name: program.tensors[name] for name in new}
        self._before = Held()
        write_safetensors(self._file(stage, "safetensors"), tensors)
        nodes = [
            _describe(program, n) for n in stage_nodes(program, stage) if n.target in _OPS.values()
        ]
        rounded = [name for name in new if name in program.rounded]
        record = {
            "nodes": nodes, "rounded": rounded, "text": _digest(program, stage),
            "audit": ctx.audit, "notes": ctx.notes, "ledger": ctx.ledger,
        }  # fmt: skip
        self._write(self._file(stage, "json").name, record)
        _spill(program, tensors, TensorFile(self._file(stage, "safetensors")))

    def restore(self, stage: int, program: Program, ctx: Context) -> bool:
        """Put a finished layer back; False where there is none, and from then on. Called before a layer's passes."""
        self._round += stage <= self._stage
        self._stage = stage
        record = self._restored(stage, program) if self.resuming else None
        self.resuming = record is not None
        if record is None:
            self._before = Held(program.tensors)
            return False
        for there, noted in ((ctx.audit, record["audit"]), (ctx.ledger, record["ledger"])):
            there.clear()
            there.update(noted)
        ctx.notes[:] = record["notes"]
        return True

    def _restored(self, stage: int, program: Program) -> Any:
        """The record of a layer, which `program` now is as noted; None, and nothing changed, where that can't be done."""
        copy = program.copy()
        try:
            record = json.loads(self._file(stage, "json").read_text())
            tensors = TensorFile(self._file(stage, "safetensors"))
            for entry in record["nodes"]:
                _restore(copy, entry, tensors)
            for name in tensors.keys() - {w for e in record["nodes"] for w in _weights_in(e)}:
                copy.add(name, tensors[name])
            copy.rounded.update(record["rounded"])
            if _digest(copy, stage) != record["text"]:
                return None
        except (OSError, ValueError, KeyError, MoeccError):
            return None
        _spill(copy, tensors, tensors)
        program.module, program.weights, program.tensors = copy.module, copy.weights, copy.tensors
        program.rounded = copy.rounded
        return record

    def keep(self, key: str, work: Kept) -> Kept:
        """Note part of a model pass's work, in place of what `key` stood for before; the same, its tensors now on disk."""
        write_safetensors(self._kept(key), work.tensors, {"facts": json.dumps(work.facts)})
        return Kept(TensorFile(self._kept(key)), work.facts)

    def kept(self, key: str) -> Kept | None:
        """What `key` stands for; None where there is nothing, or a file that can't be read."""
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
        shutil.rmtree(self.folder, ignore_errors=True)

    def close(self) -> None:
        """Let another run have the folder."""
        self._lock.release()

    def _write(self, name: str, value: Any) -> None:
        draft = self.folder / f".{name}.part"
        draft.write_text(json.dumps(value))
        draft.replace(self.folder / name)


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The entries that are not the same, with both values: "seed was 0, now 1"."""
    parts = []
    for key in [*before, *(k for k in now if k not in before)]:
        was, is_now = before.get(key), now.get(key)
        if isinstance(was, dict) and isinstance(is_now, dict):
            parts += [_differences(was, is_now)] if was != is_now else []
        elif was != is_now:
            parts.append(f"{key} was {_short(was)}, now {_short(is_now)}")
    return "; ".join(parts)


def _short(value: Any) -> str:
    """A digest is told from another by its first figures."""
    text = "none" if value in (None, "", {}) else str(value)
    return text[:8] if re.fullmatch("[0-9a-f]{16,64}", text) else text


def _describe(program: Program, node: fx.Node) -> dict[str, Any]:
    def describe(value: Any) -> Any:
        if not isinstance(value, fx.Node):
            return {"value": value}
        weight = program.weights.get(value.name)
        return {"node": value.name} if weight is None else {"weight": weight.name}

    return {
        "name": node.name,
        "op": str(node.target),
        "args": [describe(a) for a in node.args],
        "kwargs": dict(node.kwargs),
    }


def _weights_in(entry: dict[str, Any]) -> list[str]:
    return [a["weight"] for a in entry["args"] if "weight" in a]


def _restore(program: Program, entry: dict[str, Any], tensors: TensorFile) -> None:
    nodes = {n.name: n for n in program.graph.nodes}
    placeholders = {w.name: nodes[p] for p, w in program.weights.items()}

    def operand(arg: dict[str, Any]) -> Any:
        if "weight" in arg:
            name = arg["weight"]
            return program.add(name, tensors[name]) if name in tensors else placeholders[name]
        return nodes[arg["node"]] if "node" in arg else arg["value"]

    args = tuple(operand(a) for a in entry["args"])
    program.replace(nodes[entry["name"]], _OPS[entry["op"]], args, entry["kwargs"])


def _held(program: Program, stage: int) -> list[str]:
    """The names of the held tensors that a layer's nodes read, those that derived weights are computed from among them."""
    inputs = {
        i.name
        for n in stage_nodes(program, stage)
        for i in n.all_input_nodes
        if i.name in program.weights
    }
    names = {s for i in inputs for s in (program.weights[i].name, *program.weights[i].sources)}
    return sorted(name for name in names if name in program.tensors)


def _spill(program: Program, names: Iterable[str], file: TensorFile) -> None:
    """From here on these tensors are on disk, so that a finished layer takes no memory."""
    for name in names:
        if name in program.tensors:
            program.tensors.spill(name, partial(file.__getitem__, name))


def _digest(program: Program, stage: int) -> str:
    """A digest of the layer's lines of the graph text, weights' own lines included."""
    nodes = stage_nodes(program, stage)
    lines = [program.line(n) for n in {*nodes, *(i for n in nodes for i in n.all_input_nodes)}]
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()
