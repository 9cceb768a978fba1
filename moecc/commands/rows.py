"""Token rows for calibration and for evaluation.

  1. A text file is tokenized whole (of a huge one, evenly spaced slices) and cut into consecutive rows of equal length,
     of which `count` evenly spaced ones are taken. A NUL character in it separates documents.
  2. Without a file the text is what comes with the running Python: standard-library sources and `pydoc_data.topics`.
     Calibration and evaluation get different documents, by a hash of the document's name, so that no compression is
     ever judged on the text it was made with.
  3. Where the tokenizer begins every text with a token (BOS), every row begins with it: many models lose their footing
     without.

The same text, tokenizer, count and length give the same rows.
"""

from __future__ import annotations

import codecs
import hashlib
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from moecc.checkpoint.source import has_code
from moecc.errors import MoeccError
from moecc.frontend import shapes
from moecc.frontend.config import longest_row, text_config
from moecc.ir.program import Program, output_node

Purpose = Literal["calibration", "evaluation"]
_EXCERPT = (
    8192  # characters of one document of the default text, so that a few long ones don't fill it
)
_WHOLE = 8 << 20  # bytes of a file that is read whole whatever is wanted
_NOT_TEXT = {
    "encodings",
    "idlelib",
    "pydoc_data",
    "test",
}  # tables and test suites; the topics are taken by name
_UNBOUNDED = 1 << 30
_SLICE = 16  # bytes per wanted token of a file too large for that; tokenizers make one token of 2 to 6 bytes


def token_rows(
    tokenizer: Any,
    file: Path | None = None,
    *,
    count: int = 64,
    length: int = 512,
    purpose: Purpose = "calibration",
    say: Callable[[str], None] = lambda line: print(line, file=sys.stderr),
) -> Tensor:
    """Token ids i64 [count, length] of the text file, or of the default text of `purpose`.

    Fewer rows, and a remark through `say`, where a file is too short for `count`; MoeccError where it is too short for
    one, or is no text.
    """
    if count < 1 or length < 2:
        raise MoeccError(f"{count} rows of {length} tokens; give at least 1 row of 2 tokens")
    start = _beginning(tokenizer)
    body = length - len(start)
    if file is None:
        stream = _default_stream(tokenizer, purpose, count * body)
    else:
        stream = _tokens(tokenizer, _read(Path(file), count, length).split("\0"))
    found = len(stream) // body
    if found == 0:
        raise MoeccError(
            f"{file or 'the text that comes with Python'} has {len(stream)} tokens, fewer than one row of {length}; "
            f"give a longer text or {'--length ' + str(len(stream)) if len(stream) > 1 else 'a smaller --length'}"
        )
    if found < count:
        say(
            f"note: {file or 'the default text'} has {found} rows of {length} tokens, not {count}; all are taken"
        )
    take = min(count, found)
    cut = torch.tensor(stream[: found * body], dtype=torch.int64).view(found, body)
    picked = cut[torch.tensor([i * found // take for i in range(take)])]
    return torch.cat([torch.tensor(start, dtype=torch.int64).expand(take, -1), picked], 1)


def longest(program: Program) -> int:
    """The most tokens of a row that the trace holds for and the model has positions for."""
    return min(
        shapes.longest(program.restriction) or _UNBOUNDED, longest_row(program.config) or _UNBOUNDED
    )


def require_rows(program: Program, ids: Tensor) -> None:
    """MoeccError where rows i64 [count, S] are of a length that `program` doesn't hold for, or of tokens that it doesn't have."""
    length, most = ids.shape[1], longest(program)
    advice = f"give --length {min(most, max(length, shapes.SHORT + 1))}"
    if not shapes.holds(program.restriction, length):
        raise MoeccError(
            f"rows of {length} tokens, but the trace holds for {program.restriction} only; {advice}"
        )
    if length > most:
        what = f"the model has positions for {most} (max_position_embeddings in its config.json)"
        raise MoeccError(f"rows of {length} tokens, but {what}; {advice}")
    size = (
        getattr(text_config(program.config), "vocab_size", None)
        or output_node(program).meta["val"].shape[-1]
    )
    wrong = ids[(ids < 0) | (ids >= size)]
    if len(wrong):
        raise MoeccError(
            f"token {int(wrong[0])} is outside the model's vocabulary of {size}; copy the model's own tokenizer files"
        )


def rows_digest(ids: Tensor) -> str:
    """SHA-256 of the rows and their shape, 16 hexadecimal digits."""
    sha = hashlib.sha256(str(tuple(ids.shape)).encode())
    sha.update(ids.contiguous().numpy().tobytes())
    return sha.hexdigest()[:16]


def tokenizer_of(folder: str | Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer beside a checkpoint; nothing is fetched. MoeccError where there is none or it makes no tokens.

    trust_remote_code: run the Python code that the tokenizer may come with; models are transformers' own in any case.
    """
    from transformers import AutoTokenizer

    advice = "copy the model's tokenizer files (tokenizer.json, tokenizer_config.json) into it"
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=trust_remote_code
        )
    except (
        Exception
    ) as error:  # a missing file, a broken one, a missing package: each family raises what it likes
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if has_code(Path(folder)) and not trust_remote_code:
            raise MoeccError(
                f"{folder}: its tokenizer is Python code; read it, then --trust-remote-code"
            ) from error
        if Path(folder, "tokenizer.json").is_file():
            raise MoeccError(
                f"{folder}: its tokenizer can't be used ({why}); {advice} again"
            ) from error
        raise MoeccError(f"{folder} has no tokenizer that can be used ({why}); {advice}") from error
    if not _ids(
        tokenizer, "Hello, world"
    ):  # what transformers makes of a folder with a config.json alone
        raise MoeccError(f"{folder} has no tokenizer; {advice}")
    return tokenizer


# ---------------------------------------------------------------- tokens


def _ids(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _beginning(tokenizer: Any) -> list[int]:
    """The token that the tokenizer puts in front of every text, if it does."""
    first = tokenizer("", verbose=False)["input_ids"][:1]
    return first if first and first[0] == getattr(tokenizer, "bos_token_id", None) else []


def _tokens(tokenizer: Any, documents: Iterable[str], enough: int | None = None) -> list[int]:
    """The ids of the documents, one after the other with the end-of-text token between, up to `enough`."""
    end = getattr(tokenizer, "eos_token_id", None)
    separator = [end] if isinstance(end, int) else []
    stream: list[int] = []
    for document in documents:
        if enough is not None and len(stream) >= enough:
            break
        if document:
            stream += (separator if stream else []) + _ids(tokenizer, document)
    return stream


# ---------------------------------------------------------------- a file


def _read(file: Path, count: int, length: int) -> str:
    """The text of a file; of one that is much longer than `count` rows need, a slice for each from all over it."""
    if file.is_dir():
        raise MoeccError(f"{file} is a folder; give a text file")
    if not file.is_file():
        raise MoeccError(
            f"no text file {file}; give the path of a UTF-8 text"
            + (" file" if not file.exists() else "")
        )
    try:
        size = file.stat().st_size
        whole = size <= max(_WHOLE, 2 * _SLICE * count * length)
        raw = [file.read_bytes()] if whole else list(_slices(file, size, count, _SLICE * length))
    except OSError as error:
        raise MoeccError(f"can't read {file}: {error.strerror or error}") from error
    text = "\0".join(_decode(part, file) for part in raw).removeprefix("\ufeff")
    if text.count("\0") > 16 + len(text) // 100:
        raise MoeccError(f"{file} is binary; give a UTF-8 text file")
    if not text.strip("\0 \t\r\n"):
        raise MoeccError(f"{file} is empty; give a text file with some paragraphs")
    return text.replace("\r\n", "\n")


def _slices(file: Path, size: int, parts: int, each: int) -> Iterator[bytes]:
    """`parts` evenly spaced slices of `each` bytes, less what comes before the first line break in them."""
    with open(file, "rb") as f:
        for i in range(parts):
            f.seek(i * size // parts)
            part = f.read(each)
            if i:
                cut = part.find(b"\n") + 1
                part = (
                    part[cut:] if cut else part.lstrip(bytes(range(0x80, 0xC0)))
                )  # the middle of a character
            yield part


def _decode(raw: bytes, file: Path) -> str:
    try:
        return codecs.getincrementaldecoder("utf-8")().decode(
            raw
        )  # the last character may be cut off
    except UnicodeDecodeError as error:
        raise MoeccError(
            f"{file} is no UTF-8 text (byte {error.start}: {error.reason}); convert it (iconv -t utf-8) or give another"
        ) from error


# ---------------------------------------------------------------- the text that comes with Python


def _default_stream(tokenizer: Any, purpose: Purpose, tokens: int) -> list[int]:
    """At least `tokens` ids of the default text; excerpts first, whole documents where those don't reach."""
    stream = _tokens(tokenizer, (text[:_EXCERPT] for _, text in default_text(purpose)), tokens)
    if len(stream) >= tokens:
        return stream
    return stream + _tokens(
        tokenizer, (text[_EXCERPT:] for _, text in default_text(purpose)), tokens - len(stream)
    )


def default_text(purpose: Purpose) -> Iterator[tuple[str, str]]:
    """(name, text) of the documents for `purpose`, in an order that mixes manual pages and code, read as they are asked
    for. A document belongs to one purpose: the first bit of its name's hash says to which."""
    if purpose not in ("calibration", "evaluation"):
        raise MoeccError(f"no purpose {purpose!r}; there are calibration and evaluation")
    documents = {**_topics(), **_sources()}
    half = 0 if purpose == "calibration" else 1
    hashed = sorted((hashlib.sha256(name.encode()).hexdigest(), name) for name in documents)
    for key, name in hashed:
        if int(key[0], 16) >> 3 == half:
            text = documents[name]
            content = text if isinstance(text, str) else _source_text(text)
            if content.strip():
                yield name, content


def _topics() -> dict[str, str | Path]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions leave it out
        return {}
    return {f"topic {name}": text for name, text in topics.items()}


def _sources() -> dict[str, str | Path]:
    """Modules of the standard library and of its packages, without tests and code tables, by path."""
    root = Path(sysconfig.get_path("stdlib"))
    files = [
        f
        for name in sys.stdlib_module_names
        for f in (root / f"{name}.py", *sorted(root.glob(f"{name}/*.py")))
    ]
    kept = [f for f in files if f.is_file() and f.relative_to(root).parts[0] not in _NOT_TEXT]
    return {f.relative_to(root).as_posix(): f for f in kept if f.stat().st_size > 512}


def _source_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError):  # a module in another encoding, or gone since it was listed
        return ""
