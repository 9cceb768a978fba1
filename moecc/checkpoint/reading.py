"""Files of a model's folder, which may come from anyone: which are opened, and how much is read.

1. A file is regular, and lies in the folder or in the hub cache around it, wherever links lead.
   A pipe would never answer, and a link could copy any file of the user into an artifact.
2. The bytes that are read are counted, because a file may be longer than the system says.
3. JSON is UTF-8, nested a little, and without half characters, which nothing can write again. It
   has a bounded number of values, because `[],` takes twenty times its bytes in memory.
"""

from __future__ import annotations

import json
import os
import re
import stat
from io import BufferedReader
from pathlib import Path, PurePath

from moecc.errors import MoeccError, quoted
from moecc.types import Json

JSON_LIMIT = 100 << 20  # bytes of a JSON file or of a safetensors header, whose own limit this is
_DEPTH = 64  # lists and objects inside one another
_VALUES = 5_000_000  # of a JSON file, counted by commas and brackets: half a million tensors
_HALF_CHARACTER = re.compile(rb"\\u[dD][89a-fA-F]")


def inside(folder: Path, name: str) -> Path:
    """Return the path of the file `name` in a model's folder.

    Raise MoeccError unless it is a regular file, in this folder or in the blobs of its hub cache.
    """
    file = folder / name
    if PurePath(name).is_absolute() or ".." in PurePath(name).parts:
        raise MoeccError(f"{folder}: the path {quoted(name)} leads out of the folder")
    try:
        home, found = folder.resolve(), file.resolve(strict=True)
        regular = stat.S_ISREG(found.stat().st_mode)
    except (OSError, RuntimeError, ValueError) as error:  # no file, a loop of links, a NUL
        why = getattr(error, "strerror", None) or error
        raise MoeccError(f"can't read {quoted(name)} in {folder}: {why}: fetch it again") from error
    if not any(found.is_relative_to(place) for place in (home, *_blobs(home))):
        raise MoeccError(
            f"{quoted(name)} in {folder} is a link to {quoted(found)}, outside this folder and its "
            "hub cache; put the file itself there"
        )
    if not regular:
        raise _irregular(file)
    return file


def _blobs(home: Path) -> list[Path]:
    """Return the folder that the links of a hub cache's snapshot lead to, none of another folder.

    The blobs may be a link themselves in the user's own cache, which people spread over disks. In a
    folder from anyone such a link could lead anywhere.
    """
    from huggingface_hub import constants

    repository = home.parent.parent
    if home.parent.name != "snapshots":
        return []
    own = repository.parent == Path(constants.HF_HUB_CACHE).resolve()
    return [(repository / "blobs").resolve() if own else repository / "blobs"]


def opened(file: Path) -> BufferedReader:
    """Open a regular file for reading; raise MoeccError if it is something else, OSError as `open`.

    Opening a pipe doesn't wait for somebody to write to it.
    """
    stream = open(file, "rb", opener=_without_waiting)
    if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
        stream.close()
        raise _irregular(file)
    return stream


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _irregular(file: Path) -> MoeccError:
    return MoeccError(
        f"{file} isn't a regular file (a folder, a pipe or a device); put the file itself there"
    )


def read_json(file: Path, todo: str = "fetch it again") -> Json:
    """Return the object that a JSON file of a model's folder holds.

    todo: the end of the message for a damaged file. Raise MoeccError if the file can't be read,
    leads out of its folder, has more than JSON_LIMIT bytes or holds no JSON object.
    """
    try:
        with opened(inside(file.parent, file.name)) as stream:
            raw = stream.read(JSON_LIMIT + 1)
    except OSError as error:
        raise MoeccError(f"can't read {file}: {error.strerror or error}") from error
    if len(raw) > JSON_LIMIT:
        raise MoeccError(f"{file} has more than {JSON_LIMIT >> 20} MiB; {todo}")
    try:
        return parse_json(raw)
    except ValueError as error:
        raise MoeccError(f"{file} isn't valid JSON ({error}); {todo}") from error


def read_json_if_there(file: Path, todo: str = "fetch it again") -> Json:
    """Return what `read_json` returns, or {} if there is no such file."""
    return read_json(file, todo) if os.path.lexists(file) else {}


def parse_json(raw: bytes) -> Json:
    """Return the JSON object that UTF-8 text holds.

    Raise ValueError if it holds none, or more than any model's file.
    """
    if sum(map(raw.count, (b",", b"[", b"{"))) > _VALUES:
        raise ValueError("it holds too many values")
    try:
        found = json.loads(raw.decode("utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(found, dict):
        raise ValueError("it holds no object")
    level: list[Json | list[object]] = [found]
    for _ in range(_DEPTH):
        below = (v for box in level for v in (box.values() if isinstance(box, dict) else box))
        level = [value for value in below if isinstance(value, dict | list)]
    if level:
        raise ValueError("it is nested too deeply")
    if _HALF_CHARACTER.search(raw):
        json.dumps(found, ensure_ascii=False).encode("utf-8")
    return found
