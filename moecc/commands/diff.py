"""`moecc diff A B`: how two artifacts or checkpoints differ, tensor by tensor.

A tensor in both is the same (dtype, shape and every byte), or differs: floats by the relative error |B - A| / |A|
(Frobenius norms, float64 sums), codes and other integers by the share of entries that are not equal. Two folders are
identical where all tensors are and every JSON file but the shard index is; how tensors are spread over files doesn't
count. Large tensors are read and compared a few rows at a time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moecc.checkpoint.files import INDEX, SINGLE, TensorEntry, read_header, read_index, size
from moecc.checkpoint.source import SMALL_FILES, checkpoint_folder
from moecc.errors import MoeccError

_AT_ONCE = 64 << 20  # bytes of a tensor that are compared together


@dataclass(frozen=True)
class Side:
    """One of the two: its tensors by name and what is known of where it comes from."""

    name: str
    folder: Path
    entries: dict[str, TensorEntry]
    nbytes: int
    manifest: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        weights = sum(math.prod(e.shape) for e in self.entries.values())
        stored = sum(e.nbytes for e in self.entries.values())
        summary = self.manifest.get("summary", {})
        return {
            "name": self.name,
            "pipeline": self.manifest.get("pipeline"),
            "source": self.manifest.get("source"),
            "tensors": len(self.entries),
            "bytes": self.nbytes,
            "bits_per_weight": summary.get("bits_per_weight")
            or (8 * stored / weights if weights else None),
            "bits_per_weight_experts": summary.get("bits_per_weight_experts"),
        }


def compare_models(
    a: str,
    b: str,
    progress: Callable[[Iterable[Any], str], Iterable[Any]] = lambda items, label: items,
) -> Any:
    """What `moecc diff --json` prints; `identical` says whether there is any difference."""
    left, right = _side(a), _side(b)
    shared = [name for name in left.entries if name in right.entries]
    different = []
    for name in progress(shared, "comparing"):
        found = compare(left.entries[name], right.entries[name])
        if found is not None:
            different.append({"name": name, **found})
    only = [
        [n for n in one.entries if n not in other.entries]
        for one, other in ((left, right), (right, left))
    ]
    files = _other_files(left, right)
    return {
        "identical": not (different or only[0] or only[1] or files),
        "a": left.as_dict(),
        "b": right.as_dict(),
        "same_tensors": len(shared) - len(different),
        "different_tensors": different,
        "only_in_a": only[0],
        "only_in_b": only[1],
        "different_files": files,
    }


def compare(a: TensorEntry, b: TensorEntry) -> dict[str, Any] | None:
    """None for the same bytes; else both kinds, and how far the values are apart where they mean the same thing: two
    float tensors of any dtype, or integers of one dtype (codes are no values to hold against weights)."""
    kinds = [f"{str(e.dtype).removeprefix('torch.')} {list(e.shape)}" for e in (a, b)]
    floating = a.dtype.is_floating_point and b.dtype.is_floating_point
    if a.shape != b.shape or not (floating or a.dtype == b.dtype):
        return {"a": kinds[0], "b": kinds[1]}
    same, unequal, error, norm = a.dtype == b.dtype, 0, 0.0, 0.0
    for x, y in _parts(a, b):
        if a.dtype == b.dtype and torch.equal(_bytes(x), _bytes(y)):
            norm += float(x.double().square().sum()) if floating else 0.0
            continue
        same = False
        if floating:
            error += float((y.double() - x.double()).square().sum())
            norm += float(x.double().square().sum())
        else:
            unequal += int((x != y).sum())
    if same:
        return None
    if floating:
        return {
            "a": kinds[0],
            "b": kinds[1],
            "relative_error": math.sqrt(error / norm) if norm else None,
        }
    return {"a": kinds[0], "b": kinds[1], "unequal": unequal / math.prod(a.shape)}


def _parts(a: TensorEntry, b: TensorEntry) -> Iterator[tuple[Tensor, Tensor]]:
    if not a.shape or max(a.nbytes, b.nbytes) <= _AT_ONCE:
        yield a.read(), b.read()
        return
    step = max(1, _AT_ONCE // (max(a.nbytes, b.nbytes) // a.shape[0]))
    for i in range(0, a.shape[0], step):
        chunk = range(i, min(i + step, a.shape[0]))
        yield a.read(chunk), b.read(chunk)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _side(name: str) -> Side:
    folder = checkpoint_folder(name)
    files = _files(folder)
    entries: dict[str, TensorEntry] = {}
    for file in files:
        entries.update(read_header(file)[0])
    manifest = _json(folder / "moecc.json") if (folder / "moecc.json").is_file() else {}
    if not isinstance(manifest, dict):
        raise MoeccError(
            f"{folder / 'moecc.json'} isn't what moecc writes; compile the model again"
        )
    return Side(
        name, folder, dict(sorted(entries.items())), sum(f.stat().st_size for f in files), manifest
    )


def _files(folder: Path) -> list[Path]:
    if (folder / INDEX).is_file():
        return [folder / name for name in sorted(set(read_index(folder / INDEX).values()))]
    found = (
        [folder / SINGLE] if (folder / SINGLE).is_file() else sorted(folder.glob("*.safetensors"))
    )
    if not found:
        raise MoeccError(
            f"{folder} has no *.safetensors weights; give a complete checkpoint or artifact"
        )
    return found


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise MoeccError(f"can't read {file}: {error}; fetch it again") from error


def _other_files(a: Side, b: Side) -> list[str]:
    """Names of other files of a model (configurations, tokenizer, code) that only one has, or that say another thing."""
    names = {
        f.name
        for side in (a, b)
        for kind in (*SMALL_FILES, "*.py")
        for f in side.folder.glob(kind)
        if f.name != INDEX
    }
    both = {n for n in names if (a.folder / n).is_file() and (b.folder / n).is_file()}
    return sorted(
        n for n in names if n not in both or _content(a.folder / n) != _content(b.folder / n)
    )


def _content(file: Path) -> Any:
    """What a file says: of JSON whatever its layout."""
    if file.suffix == ".json":
        return _json(file)
    try:
        return file.read_bytes()
    except OSError as error:
        raise MoeccError(f"can't read {file}: {error.strerror or error}") from error


# ---------------------------------------------------------------- for people


def table(found: dict[str, Any], most: int = 40) -> str:
    """What `moecc diff` prints without --json."""
    lines = [_side_line(key, found[key]) for key in ("a", "b")]
    if found["identical"]:
        return "\n".join([*lines, f"identical: {found['same_tensors']} tensors"])
    lines.append(
        f"{found['same_tensors']} tensors are the same, {len(found['different_tensors'])} differ"
    )
    for row in _first(found["different_tensors"], most):
        lines.append(row if isinstance(row, str) else f"  {row['name']}: {_difference(row)}")
    for key, side in (("only_in_a", "A"), ("only_in_b", "B")):
        if found[key]:
            lines.append(f"{len(found[key])} only in {side}")
            lines += [f"  {name}".rstrip() for name in _first(found[key], most)]
    if found["different_files"]:
        lines.append(f"other files: {', '.join(found['different_files'])}")
    return "\n".join(lines)


def _first(rows: list[Any], most: int) -> list[Any]:
    return (
        rows
        if len(rows) <= most
        else [*rows[:most], f"  ... and {len(rows) - most} more (--json lists all)"]
    )


def _side_line(key: str, side: dict[str, Any]) -> str:
    bits = f", {side['bits_per_weight']:.3f} bits per weight" if side["bits_per_weight"] else ""
    origin = f"; {side['pipeline']} of {side['source']}" if side["pipeline"] is not None else ""
    return f"{key.upper()} {side['name']}: {side['tensors']} tensors, {size(side['bytes'])}{bits}{origin}"


def _difference(row: dict[str, Any]) -> str:
    kind = row["a"] if row["a"] == row["b"] else f"{row['a']} and {row['b']}"
    if "relative_error" in row:
        error = row["relative_error"]
        return f"{kind}, relative error {'not defined (A is zero)' if error is None else f'{error:.3g}'}"
    return f"{kind}, {100 * row['unequal']:.3g} % of the entries" if "unequal" in row else kind
