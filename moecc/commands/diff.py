"""`moecc diff A B`: compare two artifacts or checkpoints, tensor by tensor.

Two tensors are the same if dtype, shape and every byte agree. Otherwise the difference is a number:

  floats             the relative error |B - A| / |A| (Frobenius norms, sums in float64)
  codes, integers    the share of entries that are not equal

Two folders are identical if all tensors are the same and all JSON files except the shard index say
the same; how tensors are spread over files does not count. Large tensors are read and compared a
few rows at a time.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moecc.artifact.schema import read_manifest
from moecc.checkpoint.files import TensorEntry, read_header, size
from moecc.checkpoint.reading import inside, opened, read_json
from moecc.checkpoint.shards import INDEX, SINGLE, checkpoint_entries
from moecc.checkpoint.source import checkpoint_folder, small_files
from moecc.errors import MoeccError, printable_lines
from moecc.ir.relative import relative
from moecc.types import Json, Progress

_AT_ONCE = 64 << 20  # bytes of a tensor that are compared together


@dataclass(frozen=True)
class Side:
    """One of the two models: its tensors by name, the bytes of its weight files, its moecc.json."""

    name: str
    folder: Path
    entries: dict[str, TensorEntry]
    nbytes: int
    manifest: Json

    def as_dict(self) -> Json:
        """Return what `moecc diff --json` says about this model alone."""
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


def compare_models(a: str, b: str, progress: Progress = lambda items, label: items) -> Json:
    """Return what `moecc diff --json` prints; its `identical` is true if nothing differs.

    a, b: folders or hub ids. Raise MoeccError if one of them is no checkpoint.
    """
    left, right = _side(a), _side(b)
    shared = [name for name in left.entries if name in right.entries]
    different = []
    for name in progress(shared, "comparing"):
        found = compare(left.entries[name], right.entries[name])
        if found is not None:
            different.append({"name": name, **found})
    only_left = [name for name in left.entries if name not in right.entries]
    only_right = [name for name in right.entries if name not in left.entries]
    files = _other_files(left, right)
    return {
        "identical": not (different or only_left or only_right or files),
        "a": left.as_dict(),
        "b": right.as_dict(),
        "same_tensors": len(shared) - len(different),
        "different_tensors": different,
        "only_in_a": only_left,
        "only_in_b": only_right,
        "different_files": files,
    }


def compare(a: TensorEntry, b: TensorEntry) -> Json | None:
    """Return None if both hold the same bytes, else both kinds and how far the values are apart.

    Only values of one meaning have a distance: two float tensors of any dtype, or integers of one
    dtype. Codes and weights have none.
    """
    floating = a.dtype.is_floating_point and b.dtype.is_floating_point
    kinds = {"a": _kind(a), "b": _kind(b)}
    if a.shape != b.shape or not (floating or a.dtype == b.dtype):
        return kinds
    if a.dtype == b.dtype and not a.nbytes:  # a header may list any number of these
        return None
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
        return {**kinds, "relative_error": float(relative(error, norm).sqrt())}
    return {**kinds, "unequal": unequal / math.prod(a.shape)}


def _kind(entry: TensorEntry) -> str:
    return f"{str(entry.dtype).removeprefix('torch.')} {list(entry.shape)}"


def _parts(a: TensorEntry, b: TensorEntry) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield both tensors, whole or as equal ranges of rows with at most _AT_ONCE bytes."""
    if not a.shape or max(a.nbytes, b.nbytes) <= _AT_ONCE:
        yield a.read(), b.read()
        return
    step = max(1, _AT_ONCE // (max(a.nbytes, b.nbytes) // a.shape[0]))
    for i in range(0, a.shape[0], step):
        chunk = range(i, min(i + step, a.shape[0]))
        yield a.read(chunk), b.read(chunk)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


# ---------------------------------------------------------------- folders


def _side(name: str) -> Side:
    folder = checkpoint_folder(name)
    entries = _entries(folder)
    nbytes = sum(f.stat().st_size for f in {entry.file for entry in entries.values()})
    return Side(name, folder, dict(sorted(entries.items())), nbytes, read_manifest(folder))


def _entries(folder: Path) -> dict[str, TensorEntry]:
    """Return the tensors of a model."""
    if any((folder / name).is_file() for name in (SINGLE, INDEX)):
        return checkpoint_entries(folder)[0]
    names = sorted(file.name for file in folder.glob("*.safetensors"))
    return {k: v for name in names for k, v in read_header(inside(folder, name))[0].items()}


def _other_files(a: Side, b: Side) -> list[str]:
    """Return the names of other files of a model that one side lacks or whose content differs.

    These are configurations, tokenizer files and code.
    """
    names = {n for side in (a, b) for n in small_files(side.folder, code=True) if n != INDEX}
    both = {n for n in names if (a.folder / n).is_file() and (b.folder / n).is_file()}
    return sorted(
        n for n in names if n not in both or _content(a.folder / n) != _content(b.folder / n)
    )


def _content(file: Path) -> object:
    """Return the values of a JSON file, whose layout does not count; of any other, its digest."""
    if file.suffix == ".json":
        return read_json(file)
    try:
        with opened(file) as stream:
            return hashlib.file_digest(stream, "sha256").digest()
    except OSError as error:
        raise MoeccError(f"can't read {file}: {error.strerror or error}") from error


# ---------------------------------------------------------------- for people


def table(found: Json, most: int = 40) -> str:
    """Return what `moecc diff` prints without --json, at most `most` lines of each list."""
    lines = [_side_line(key, found[key]) for key in ("a", "b")]
    same, different = found["same_tensors"], found["different_tensors"]
    if found["identical"]:
        return printable_lines([*lines, f"identical: {same} tensors"])
    lines.append(f"{same} tensors are the same, {len(different)} differ")
    lines += _first([f"{row['name']}: {_difference(row)}" for row in different], most)
    for key, side in (("only_in_a", "A"), ("only_in_b", "B")):
        if found[key]:
            lines.append(f"{len(found[key])} only in {side}")
            lines += _first(found[key], most)
    if found["different_files"]:
        lines.append(f"other files: {', '.join(found['different_files'])}")
    return printable_lines(lines)


def _first(texts: list[str], most: int) -> list[str]:
    shown = [f"  {text}" for text in texts[:most]]
    left = len(texts) - len(shown)
    return [*shown, f"  ... and {left} more (--json lists all)"] if left else shown


def _side_line(key: str, side: Json) -> str:
    bits = f", {side['bits_per_weight']:.3f} bits per weight" if side["bits_per_weight"] else ""
    origin = f"; {side['pipeline']} of {side['source']}" if side["pipeline"] is not None else ""
    sizes = f"{side['tensors']} tensors, {size(side['bytes'])}"
    return f"{key.upper()} {side['name']}: {sizes}{bits}{origin}"


def _difference(row: Json) -> str:
    kind = row["a"] if row["a"] == row["b"] else f"{row['a']} and {row['b']}"
    if "unequal" in row:
        return f"{kind}, {100 * row['unequal']:.3g} % of the entries"
    if "relative_error" not in row:
        return str(kind)
    return f"{kind}, relative error {row['relative_error']:.3g}"
