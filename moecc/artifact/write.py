"""Writing the artifact: a folder that transformers loads, with an account of every weight in it.

  config.json            the model's own, with the quantization_config of `moecc.checkpoint.schema`
  model*.safetensors     compressed tensors in the canonical form of `moecc.ir.vq4`, everything else
                         as it was
  tokenizer and other small files of the source
  moecc.json             format and package versions, resolved pipeline, source digest, notes, audit
                         (`moecc.artifact.schema`)

Writing fails if the bytes of the audit's rows are not those of the weight files.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from moecc.artifact.audit import Plan
from moecc.artifact.schema import Row, read_manifest, summary
from moecc.checkpoint.files import INDEX, SINGLE, LazyTensor, free_space, write_safetensors
from moecc.checkpoint.schema import REFUSALS
from moecc.checkpoint.source import SMALL_FILES, has_code
from moecc.errors import MoeccError
from moecc.ir.program import Program
from moecc.pipeline.fate import HEADER
from moecc.types import Json, Progress

SHARD_BYTES = 4 << 30
_LARGEST_SMALL_FILE = 64 << 20  # bytes
_NOT_COPIED = ("config.json", "moecc.json", INDEX)


def write_artifact(
    folder: Path,
    found: Plan,
    program: Program,
    source: Path | None,
    facts: Json,
    progress: Progress = lambda items, label: items,
) -> list[Row]:
    """Write the artifact into the existing folder `folder`, and return the complete audit.

    source: the folder that the model came from, None for a model in memory. facts: what moecc.json
    says besides the audit.
    """
    files = write_weights(folder, found.tensors, progress)
    on_disk = sum((folder / name).stat().st_size for name in files)
    header = Row("(safetensors headers)", "file format", (), HEADER, on_disk - found.nbytes)
    rows = [*found.rows, header]
    _require_total(rows, on_disk)
    copy_small_files(source, folder)
    _json(folder / "config.json", _config(program, source, found))
    audit = [row.as_json() for row in rows]
    _json(folder / "moecc.json", {**facts, "summary": summary(rows), "audit": audit})
    return rows


def write_weights(
    folder: Path, tensors: Mapping[str, LazyTensor], progress: Progress = lambda items, label: items
) -> list[str]:
    """Write tensors as a checkpoint's safetensors file, or as shards with their index.

    Return the names of the files.
    """
    nbytes = sum(t.nbytes for t in tensors.values())
    free_space(folder, int(nbytes * 1.01) + (1 << 20))
    shards = _shards(tensors)
    count = len(shards)
    names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    files = dict(zip(names if count > 1 else [SINGLE], shards, strict=True))
    for name, keys in progress(list(files.items()), "writing"):
        write_safetensors(folder / name, {k: tensors[k] for k in keys}, {"format": "pt"})
    if count > 1:
        index = {k: name for name, keys in files.items() for k in keys}
        _json(folder / INDEX, {"metadata": {"total_size": nbytes}, "weight_map": index})
    return list(files)


def _shards(tensors: Mapping[str, LazyTensor]) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, tensor in tensors.items():
        if shards[-1] and filled + tensor.nbytes > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += tensor.nbytes
    return shards


def _require_total(rows: Sequence[Row], on_disk: int) -> None:
    accounted = sum(r.nbytes for r in rows)
    if on_disk != accounted:
        what = f"the audit accounts for {accounted} bytes but the files hold {on_disk}"
        raise MoeccError(f"{what}; this is a fault of moecc")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Give a folder to write in, which becomes `out` if nothing fails and is gone otherwise.

    It has a name of its own beside `out`, so that nothing that lies there is touched. Raise
    MoeccError if `out` exists or can't be made.
    """
    if os.path.lexists(out):
        raise MoeccError(f"{out} exists; give another folder or remove it")
    draft = out.with_name(f".{out.name}.{uuid4().hex[:8]}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        draft.mkdir()
    except OSError as error:
        why = error.strerror or str(error)
        raise MoeccError(f"{out} can't be made: {why}; give another folder") from error
    try:
        yield draft
        draft.rename(out)
    except OSError as error:
        raise _failed(out, draft, error) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)  # nothing is there if it was renamed


def _failed(out: Path, draft: Path, error: OSError) -> MoeccError:
    """Return what to say of a failure while `out` was written: of its file, if another's is named.

    Where writing fails, as on a full disk, the system names no file.
    """
    why, file = error.strerror or error, error.filename
    if isinstance(file, str) and not Path(file).is_relative_to(draft):
        return MoeccError(f"can't read {file}: {why}; mend it and run again")
    return MoeccError(f"writing {out} failed: {why}; make room or choose another place")


def copy_small_files(source: Path | None, folder: Path) -> None:
    """Copy the tokenizer, generation settings and the like of a model's folder."""
    if source is None:
        return
    for pattern in (*SMALL_FILES, *(["*.py"] if has_code(source) else [])):
        for file in sorted(source.glob(pattern)):
            if file.name in _NOT_COPIED or file.name.endswith(".index.json"):
                continue
            if file.stat().st_size < _LARGEST_SMALL_FILE:
                shutil.copyfile(file, folder / file.name)


def write_kept(artifact: Path, folder: Path) -> None:
    """Say in `folder`, as moecc.json of `artifact` does, which of the source's experts it has."""
    kept = read_manifest(artifact).get("experts_kept")
    if kept:
        _json(folder / "moecc.json", {"experts_kept": kept})


def _config(program: Program, source: Path | None, found: Plan) -> Json:
    config: Json = (
        json.loads((source / "config.json").read_text())
        if source is not None
        else program.config.to_dict()
    )
    float_config(config)
    for path, value in program.config_edits.items():
        *outer, key = path.split(".")
        part = config
        for name in outer:
            part = part.setdefault(name, {})
        part[key] = value
    if found.compression.experts or found.compression.linears:
        config["quantization_config"] = found.compression.as_config()
        config |= REFUSALS
    return config


def float_config(config: Json, dtype: str | None = None) -> None:
    """Make `config`, as config.json has it, and its text_config those of plain float weights.

    dtype: what they say of the weights from now on, such as "float16"; None leaves it as it is.
    """
    for part in (config, config.get("text_config")):
        if isinstance(part, dict):
            # how the weights were stored (`moecc.checkpoint.low_bit`, `moecc.checkpoint.schema`)
            part.pop("quantization_config", None)
            for key, value in REFUSALS.items():
                if part.get(key) == value:
                    del part[key]
            if dtype is not None:
                part.pop("torch_dtype", None)  # the older name
                part["dtype"] = dtype


def _json(path: Path, value: Json) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n")
