"""Tensors in safetensors files: read on demand, written whole or not at all.

Files are read with plain reads and not mapped. A mapped file counts towards the process's memory as
it is touched. One that shrinks or sits on a failing disk kills the process instead of raising.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, cast

import torch
from torch import Tensor

from moecc.checkpoint.reading import JSON_LIMIT, opened, parse_json
from moecc.errors import MoeccError, quoted
from moecc.types import Json

LONGEST_NAME = 100  # characters of a path inside a folder that moecc writes
_DIMENSIONS = 64  # of one tensor; more make no tensor in torch
MOST_TENSORS = 300_000  # of a checkpoint; one of 10^12 parameters in FP8 has 140 000

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "BOOL": torch.bool,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a safetensors file. `start` counts bytes from the beginning of the file."""

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    nbytes: int

    def read(self, rows: Sequence[int] | None = None) -> Tensor:
        """Return the tensor, or the given rows of its first dimension, reading only their bytes.

        Raise MoeccError if the file can't be read or ends inside the tensor.
        """
        if rows is None:
            out = torch.empty(self.shape, dtype=self.dtype)
            parts = [(out, self.start)]
        else:
            out = torch.empty((len(rows), *self.shape[1:]), dtype=self.dtype)
            at = [range(self.shape[0])[row] for row in rows]
            parts = [
                (out[i], self.start + row * (self.nbytes // self.shape[0]))
                for i, row in enumerate(at)
            ]
        try:
            with opened(self.file) as file:
                for part, start in parts:
                    self._fill(file, part, start)
        except OSError as error:
            raise MoeccError(
                f"can't read {quoted(self.name)} from {self.file}: {error.strerror or error}"
            ) from error
        return out

    def _fill(self, file: BufferedReader, part: Tensor, start: int) -> None:
        view = as_bytes(part)
        file.seek(start)
        while len(view):  # one call reads at most 2 GiB
            got = file.readinto(view)
            if not got:
                raise MoeccError(
                    f"{self.file} ends inside {quoted(self.name)}; it was cut while in use: "
                    "fetch it again"
                ) from EOFError()
            view = view[got:]


def as_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous CPU tensor; writing to them writes to the tensor."""
    array = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    return memoryview(cast(Any, array))  # numpy declares its buffer from Python 3.12 on


def read_header(file: Path) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """Return the tensors and the metadata of a safetensors file.

    Raise MoeccError if the header is invalid or the file isn't as long as the header says.
    """
    try:
        with opened(file) as f:
            size = os.fstat(f.fileno()).st_size
            length = int.from_bytes(f.read(8), "little")
            head = f.read(length) if length <= min(size - 8, JSON_LIMIT) else b""
    except OSError as error:
        raise MoeccError(f"can't read {file}: {error.strerror or error}") from error
    try:
        table = parse_json(head)
        require_few(len(table), str(file))
        metadata = table.pop("__metadata__", None) or {}
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("__metadata__")
        entries = {name: _entry(name, file, 8 + length, item) for name, item in table.items()}
    except MoeccError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise MoeccError(
            f"{file} has no valid safetensors header (truncated or corrupt): fetch it again"
        ) from error
    end = _end_of_data(file, entries.values(), 8 + length)
    if end != size:
        raise MoeccError(
            f"{file} is {size} bytes and its header says {end} (truncated or corrupt): "
            "fetch it again"
        )
    return entries, metadata


def require_few(count: int, what: str) -> None:
    """Raise MoeccError if `what`, a file or a folder, has more tensors than any model."""
    if count > MOST_TENSORS:
        raise MoeccError(
            f"{what} has {count} tensors, and moecc takes at most {MOST_TENSORS}: fetch it again"
        )


def _end_of_data(file: Path, entries: Iterable[TensorEntry], start: int) -> int:
    """Return where the last tensor ends. The format wants tensors without gap or overlap."""
    for entry in sorted(entries, key=lambda e: (e.start, e.nbytes)):
        if entry.start != start:
            fault = (
                "overlaps the tensor before it" if entry.start < start else "leaves a gap before it"
            )
            raise MoeccError(
                f"{quoted(entry.name)} in {file} {fault} (corrupt data_offsets): fetch it again"
            )
        start += entry.nbytes
    return start


def _entry(name: str, file: Path, base: int, item: Json) -> TensorEntry:
    if item["dtype"] not in DTYPES:
        raise MoeccError(
            f"{quoted(name)} in {file} has dtype {quoted(item['dtype'])}, which torch can't hold; "
            "use a bf16 checkpoint"
        )
    dtype, shape, (start, end) = DTYPES[item["dtype"]], tuple(item["shape"]), item["data_offsets"]
    whole = all(type(n) is int and 0 <= n < 1 << 63 for n in (start, end, *shape))
    if not whole or len(shape) > _DIMENSIONS or end - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(name)
    return TensorEntry(name, file, dtype, shape, base + start, end - start)


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is read only when it is written; its shape and dtype are known before."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_safetensors(
    path: Path,
    tensors: Mapping[str, Tensor | LazyTensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write `path` whole or not at all: a temporary file beside it is synced, then renamed.

    Equal tensors give equal bytes. safetensors' own writer orders metadata at random and copies
    every tensor. Raise MoeccError if the disk refuses.
    """
    # The largest items first: this aligns every tensor.
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    head, end = _header(tensors, order, metadata or {})
    part = path.with_name(f".{path.name}.part")
    try:
        with open(part, "wb") as file:
            file.write(len(head).to_bytes(8, "little") + head)
            for name in order:
                file.write(as_bytes(_value(name, tensors[name]).cpu().contiguous()))
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise MoeccError(
            f"can't write {path} ({8 + len(head) + end} bytes): {error.strerror or error}; "
            f"{make_room(error)}"
        ) from error
    finally:
        part.unlink(missing_ok=True)


def _header(
    tensors: Mapping[str, Tensor | LazyTensor], order: Iterable[str], metadata: Mapping[str, str]
) -> tuple[bytes, int]:
    """Return the JSON header, padded to a multiple of 8 bytes, and the number of data bytes."""
    table: Json = {"__metadata__": dict(sorted({"format": "pt", **metadata}.items()))}
    end = 0
    for name in order:
        start, end = end, end + tensors[name].nbytes
        dtype, shape = DTYPE_NAMES[tensors[name].dtype], list(tensors[name].shape)
        table[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    head = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    return head + b" " * (-len(head) % 8), end


def _value(name: str, tensor: Tensor | LazyTensor) -> Tensor:
    if isinstance(tensor, Tensor):
        return tensor
    found = tensor.read()
    if tuple(found.shape) != tensor.shape or found.dtype != tensor.dtype:
        got, said = (f"{t.dtype} {list(t.shape)}" for t in (found, tensor))
        raise MoeccError(f"'{name}' is {got} but was announced as {said}; this is a fault of moecc")
    return found


def free_space(path: Path, needed_bytes: int) -> None:
    """Raise MoeccError if fewer than `needed_bytes` are free on the disk of `path`.

    `path` need not exist yet.
    """
    there = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    free = shutil.disk_usage(there).free
    if free < needed_bytes:
        raise MoeccError(
            f"{path} needs {size(needed_bytes)} and its disk has {size(free)} free; "
            "free some or write elsewhere"
        ) from OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def make_room(error: OSError) -> str:
    """Return what to do about a failed write."""
    if error.errno == errno.EFBIG:
        return "raise the limit on file sizes (ulimit -f)"
    if error.errno == errno.ENOMEM:
        return "end other programs"
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return "free some space or write elsewhere" if full else "write elsewhere"


def try_folder(folder: Path) -> None:
    """Raise OSError if files can't be written in `folder`; leave everything as it was.

    It need not exist, and is then made for the trial.
    """
    made = [p for p in (folder, *folder.parents) if not os.path.lexists(p)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=folder, prefix="moecc-", suffix="x" * LONGEST_NAME):
            pass
    finally:
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()


def size(count: float) -> str:
    """Return a number of bytes as people read it, in powers of 1000."""
    for unit, divisor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= divisor:
            return f"{count / divisor:.2f} {unit}"
    return f"{count:.0f} B"


class TensorFile(Mapping[str, Tensor]):
    """The tensors of one safetensors file by name; each is read when it is looked up."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries, self.metadata = read_header(path)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def __getitem__(self, name: str) -> Tensor:
        return self.entries[name].read()
