"""The documents of a text file.

A file is text, and NUL characters separate its documents. In a .jsonl (or .ndjson) file each line
is a row, in a .json file each entry of a list: `{"text": "..."}` is a document, and
`{"messages": [{"role": "...", "content": "..."}]}` a chat, which the tokenizer's chat template
turns into one. Of a huge file, evenly spaced parts are read.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path

from moecc.errors import MoeccError, reason
from moecc.types import Tokenizer

_WHOLE = 8 << 20  # bytes; a smaller file is always read whole
# bytes read of a huge file for each wanted token; tokenizers make one token of 2 to 6 bytes
_SLICE = 16
_LINES = (".jsonl", ".ndjson")
_GIVE = 'give rows of {"text": "..."} or {"messages": [{"role": "...", "content": "..."}]}'


def documents(file: Path, tokenizer: Tokenizer, count: int, length: int) -> list[str]:
    """Return the documents of a file, or of parts of it that suffice for count x length tokens.

    Raise MoeccError if the file, or a row of it, is no text and no chat that the tokenizer has a
    template for.
    """
    _require_file(file)
    kind = file.suffix.lower()
    try:
        if kind in _LINES:
            found = [_document(row, tokenizer, at) for row, at in _lines(file, count, length)]
        elif kind == ".json":
            found = [_document(row, tokenizer, at) for row, at in _entries(file)]
        else:
            found = [_read(file, count, length)]
    except OSError as error:
        raise MoeccError(f"can't read {file}: {error.strerror or error}") from error
    if not any(text.strip("\0 \t\r\n") for text in found):
        raise MoeccError(f"{file} is empty; give a text file with some paragraphs")
    return [part for text in found for part in text.split("\0")]


def _require_file(file: Path) -> None:
    if file.is_dir():
        raise MoeccError(f"{file} is a folder; give a text file")
    if not file.is_file():
        wanted = "a UTF-8 text" + (" file" if not file.exists() else "")
        raise MoeccError(f"no text file {file}; give the path of {wanted}")


def _whole(size: int, count: int, length: int) -> bool:
    """Tell whether a file of `size` bytes is read whole."""
    return size <= max(_WHOLE, 2 * _SLICE * count * length)


# ---------------------------------------------------------------- text


def _read(file: Path, count: int, length: int) -> str:
    """Return the text of a file, or slices from all over a file that is much too long.

    There is a slice for each of `count` rows, and a NUL between two. Raise MoeccError if the file
    is no text.
    """
    size = file.stat().st_size
    if _whole(size, count, length):
        raw = [file.read_bytes()]
    else:
        raw = list(_slices(file, size, count, _SLICE * length))
    text = "\0".join(_decode(part, file) for part in raw).removeprefix("\ufeff")
    if text.count("\0") > 16 + len(text) // 100:
        raise MoeccError(f"{file} is binary; give a UTF-8 text file")
    _require_no_rows(text, file)
    return text.replace("\r\n", "\n")


def _require_no_rows(text: str, file: Path) -> None:
    """Raise MoeccError if the first line is a row: braces and keys are no text of a model's."""
    try:
        row = json.loads(text.lstrip().partition("\n")[0])
    except (ValueError, RecursionError):
        return
    if isinstance(row, dict) and row.keys() & {"text", "messages"}:
        raise MoeccError(f"{file} holds rows of JSON; give it a name that ends in .jsonl")


def _slices(file: Path, size: int, parts: int, each: int) -> Iterator[bytes]:
    """Yield `parts` evenly spaced slices of `each` bytes, each from its first line break on."""
    with open(file, "rb") as f:
        for i in range(parts):
            f.seek(i * size // parts)
            part = f.read(each)
            if i:
                cut = part.find(b"\n") + 1
                # without a line break, drop at least the rest of a character that was cut in two
                part = part[cut:] if cut else part.lstrip(bytes(range(0x80, 0xC0)))
            yield part


def _decode(raw: bytes, file: Path) -> str:
    try:
        # an incremental decoder allows that the last character is cut off
        return codecs.getincrementaldecoder("utf-8")().decode(raw)
    except UnicodeDecodeError as error:
        raise MoeccError(
            f"{file} is no UTF-8 text (byte {error.start}: {error.reason}); "
            "convert it (iconv -t utf-8) or give another"
        ) from error


# ---------------------------------------------------------------- rows


def _lines(file: Path, count: int, length: int) -> Iterator[tuple[object, str]]:
    """Yield the rows of a file with a row on each line, and where each is.

    Of a file that is much too long, take the first lines of each of `count` equal parts.
    """
    size, offset = file.stat().st_size, 0
    most = size if _whole(size, count, length) else _SLICE * length
    taken = [0] * count
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            part = min(offset * count // size, count - 1)
            offset += len(line)
            if line.strip() and taken[part] < most:
                taken[part] += len(line)
                where = f"{file}, line {number}"
                yield _parsed(line, where), where


def _entries(file: Path) -> Iterator[tuple[object, str]]:
    """Yield the rows of a file that is one list, and where each is."""
    rows = _parsed(file.read_bytes(), str(file))
    if not isinstance(rows, list):
        raise MoeccError(f"{file} holds no list of rows; {_GIVE}")
    for number, row in enumerate(rows, 1):
        yield row, f"{file}, row {number}"


def _parsed(raw: bytes, where: str) -> object:
    try:
        found: object = json.loads(raw.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        why = error.msg if isinstance(error, json.JSONDecodeError) else reason(error)
        raise MoeccError(f"{where}: no JSON ({why}); {_GIVE}") from error
    return found


def _document(row: object, tokenizer: Tokenizer, where: str) -> str:
    """Return the text of a row, or of its chat."""
    if not isinstance(row, dict) or not row.keys() & {"text", "messages"}:
        raise MoeccError(f"{where}: neither a text nor a chat; {_GIVE}")
    text = row["text"] if "text" in row else _chat(row["messages"], tokenizer, where)
    if not isinstance(text, str):
        raise MoeccError(f"{where}: its text is {type(text).__name__}, not a string; {_GIVE}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise MoeccError(f"{where}: its text holds half a character; correct it") from error
    return text


def _chat(messages: object, tokenizer: Tokenizer, where: str) -> object:
    if not (isinstance(messages, list) and messages and all(isinstance(m, dict) for m in messages)):
        raise MoeccError(f"{where}: its messages are no list of objects; {_GIVE}")
    if not getattr(tokenizer, "chat_template", None):
        advice = 'give rows of {"text": "..."}'
        raise MoeccError(f"{where}: a chat, but the tokenizer has no chat template; {advice}")
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:  # a template raises what it likes
        raise MoeccError(
            f"{where}: the tokenizer's chat template can't write it: {reason(error)}"
        ) from error
