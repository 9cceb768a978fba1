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

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from moecc.artifact.audit import Plan
from moecc.artifact.schema import Row, read_manifest, summary
from moecc.checkpoint.files import LazyTensor, free_space, size, write_safetensors
from moecc.checkpoint.reading import opened
from moecc.checkpoint.schema import REFUSALS
from moecc.checkpoint.shards import INDEX, SINGLE
from moecc.checkpoint.source import ADAPTER, adapter_beside, small_files
from moecc.errors import MoeccError
from moecc.ir.program import Program
from moecc.pipeline.fate import HEADER
from moecc.types import Json, Progress, Say

SHARD_BYTES = 4 << 30
_LARGEST_SMALL_FILE = 64 << 20  # bytes
_NOT_COPIED = ("config.json", "moecc.json", INDEX, ADAPTER)


def write_artifact(
    folder: Path,
    found: Plan,
    program: Program,
    config: Json,
    facts: Json,
    progress: Progress = lambda items, label: items,
) -> list[Row]:
    """Write the artifact into `folder`, which has the small files; return the complete audit.

    config: the content of the source's config.json. facts: what moecc.json says besides the audit.
    """
    files = write_weights(folder, found.tensors, progress)
    on_disk = sum((folder / name).stat().st_size for name in files)
    header = Row("(safetensors headers)", "file format", (), HEADER, on_disk - found.nbytes)
    rows = [*found.rows, header]
    _require_total(rows, on_disk)
    write_json(folder / "config.json", _config(program, config, found), allow_nan=True)
    audit = [row.as_json() for row in rows]
    write_json(folder / "moecc.json", {**facts, "summary": summary(rows), "audit": audit})
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
        write_json(folder / INDEX, {"metadata": {"total_size": nbytes}, "weight_map": index})
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


def copy_small_files(source: Path, folder: Path, say: Say) -> None:
    """Copy tokenizer, chat templates, licence and the like of a model's folder; say what isn't."""
    if left := adapter_beside(source):
        say(f"note: {source}: {left}")
    for name in small_files(source):
        if name in _NOT_COPIED or name.endswith(".index.json"):
            continue
        if not (source / name).is_file():
            say(f"note: {source / name} is left out: it is no file, or a link to none")
            continue
        with opened(source / name) as file:
            content = file.read(_LARGEST_SMALL_FILE + 1)
        if len(content) > _LARGEST_SMALL_FILE:
            say(f"note: {source / name} is left out: it has more than {size(_LARGEST_SMALL_FILE)}")
            continue
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)


def write_kept(artifact: Path, folder: Path) -> None:
    """Say in `folder`, as moecc.json of `artifact` does, which of the source's experts it has."""
    kept = read_manifest(artifact).get("experts_kept")
    if kept:
        write_json(folder / "moecc.json", {"experts_kept": kept})


def _config(program: Program, source: Json, found: Plan) -> Json:
    config = copy.deepcopy(source)
    float_config(config)
    config.pop("return_dict", None)  # transformers runs no model whose outputs are tuples
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


def write_json(path: Path, value: Json, *, allow_nan: bool = False) -> None:
    """Write an object as an indented text with its keys in order.

    allow_nan: as transformers writes and reads it, with Infinity.
    """
    text = json.dumps(value, indent=1, sort_keys=True, allow_nan=allow_nan)
    path.write_text(text + "\n", encoding="utf-8")
