"""Token rows for calibration and for evaluation.

  1. The documents of a text file (`texts`), or of several as if they were one, are tokenized and
     cut into consecutive rows of equal length. `count` evenly spaced rows are taken.
  2. Without a file the text is what comes with the running Python: standard-library sources and
     `pydoc_data.topics`. A hash of a document's name decides whether it is for calibration or for
     evaluation, so that no compression is judged on the text it was made with.
  3. If the tokenizer begins every text with a token (BOS), every row begins with it: many models
     give poor predictions without it.

The same text, tokenizer, count and length give the same rows.
"""

from __future__ import annotations

import hashlib
import itertools
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from moecc.checkpoint.source import has_code
from moecc.commands.texts import documents
from moecc.errors import MoeccError, counted, reason
from moecc.frontend import shapes
from moecc.frontend.config import longest_row, text_config
from moecc.ir.program import Program, output_node
from moecc.types import Say, Tokenizer

Purpose = Literal["calibration", "evaluation"]
# characters taken of one document of the default text, so that a few long ones don't fill it
_EXCERPT = 8192
# tables and test suites; pydoc_data's topics are taken by name
_NOT_TEXT = {"encodings", "idlelib", "pydoc_data", "test"}
_COPY = "copy the model's tokenizer files (tokenizer.json, tokenizer_config.json) into it"
_UNBOUNDED = 1 << 30


def token_rows(
    tokenizer: Tokenizer,
    files: Path | Sequence[Path] | None = None,
    *,
    count: int = 64,
    length: int = 512,
    purpose: Purpose = "calibration",
    say: Say = lambda line: print(line, file=sys.stderr),
) -> Tensor:
    """Return token ids i64 [count, length] of text files, or of the default text of `purpose`.

    A text that is too short for `count` rows gives fewer, and `say` gets a remark. Raise MoeccError
    if it is too short for one row, or is no text.
    """
    if count < 1 or length < 2:
        many = f"{counted(count, 'row')} of {counted(length, 'token')}"
        raise MoeccError(f"{many}; give at least 1 row of 2 tokens")
    start = _beginning(tokenizer)
    body = length - len(start)
    given = [Path(f) for f in ([files] if isinstance(files, str | Path) else files or ())]
    name = ", ".join(map(str, given))
    if given:
        parts = [documents(file, tokenizer, count, length) for file in given]
        stream = _tokens(tokenizer, itertools.chain(*parts))
    else:
        stream = _default_stream(tokenizer, purpose, count * body)
    found = len(stream) // body
    if found == 0:
        shorter = f"--length {len(stream)}" if len(stream) > 1 else "a smaller --length"
        raise MoeccError(
            f"{name or 'the text that comes with Python'} has {counted(len(stream), 'token')}, "
            f"fewer than one row of {length}; give a longer text or {shorter}"
        )
    if found < count:
        rows = f"{counted(found, 'row')} of {length} tokens, not {count}"
        say(f"note: {name or 'the default text'} has {rows}; all are taken")
    take = min(count, found)
    cut = torch.tensor(stream[: found * body], dtype=torch.int64).view(found, body)
    picked = cut[torch.tensor([i * found // take for i in range(take)])]
    return torch.cat([torch.tensor(start, dtype=torch.int64).expand(take, -1), picked], 1)


def longest(program: Program) -> int:
    """Return the most tokens of a row that the trace holds for and the model has positions for."""
    return min(program.restriction.high or _UNBOUNDED, longest_row(program.config) or _UNBOUNDED)


def require_rows(program: Program, ids: Tensor) -> None:
    """Raise MoeccError if `program` cannot take the rows i64 [count, S].

    Their length must be one that its trace holds for and its model has positions for, and every
    token must be in its vocabulary.
    """
    length, most = ids.shape[1], longest(program)
    advice = f"give --length {min(most, max(length, shapes.SHORT + 1))}"
    if not program.restriction.holds(length):
        raise MoeccError(
            f"rows of {length} tokens, but the trace holds for {program.restriction} only; {advice}"
        )
    if length > most:
        limit = f"positions for {most} (max_position_embeddings in its config.json)"
        raise MoeccError(f"rows of {length} tokens, but the model has {limit}; {advice}")
    size = getattr(text_config(program.config), "vocab_size", None)
    size = size or output_node(program).meta["val"].shape[-1]
    wrong = ids[(ids < 0) | (ids >= size)]
    if len(wrong):
        raise MoeccError(
            f"token {int(wrong[0])} is outside the model's vocabulary of {size}; "
            "copy the model's own tokenizer files"
        )


def rows_digest(ids: Tensor) -> str:
    """Return the first 16 hexadecimal digits of the SHA-256 of the rows and their shape."""
    sha = hashlib.sha256(str(tuple(ids.shape)).encode())
    sha.update(ids.contiguous().numpy().tobytes())
    return sha.hexdigest()[:16]


def tokenizer_of(folder: str | Path, *, trust_remote_code: bool = False) -> Tokenizer:
    """Return the tokenizer beside a checkpoint; nothing is fetched.

    trust_remote_code: run the Python code that the tokenizer may come with; models are
    transformers' own in any case. Raise MoeccError if there is no tokenizer or it makes no tokens.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # each family raises errors of its own
        raise MoeccError(_no_tokenizer(folder, error, trust_remote_code)) from error
    # transformers makes an empty tokenizer for a folder that holds a config.json alone
    if not _ids(tokenizer, "Hello, world"):
        raise MoeccError(f"{folder} has no tokenizer; {_COPY}")
    return tokenizer


def _no_tokenizer(folder: str | Path, error: Exception, trust_remote_code: bool) -> str:
    """Return the message for a tokenizer that cannot be loaded."""
    why = reason(error)
    if has_code(Path(folder)) and not trust_remote_code:
        return f"{folder}: its tokenizer is Python code; read it, then --trust-remote-code"
    if Path(folder, "tokenizer.json").is_file():
        return _unusable(folder, why)
    return f"{folder} has no tokenizer that can be used ({why}); {_COPY}"


def _unusable(folder: str | Path, why: str) -> str:
    return f"{folder}: its tokenizer can't be used ({why}); {_COPY} again"


# ---------------------------------------------------------------- tokens


@contextmanager
def using(tokenizer: Tokenizer) -> Iterator[None]:
    """Raise MoeccError for what a tokenizer raises: some of its settings are read at each use."""
    try:
        yield
    except Exception as error:
        where = getattr(tokenizer, "name_or_path", "the model")
        raise MoeccError(_unusable(where, reason(error))) from error


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    with using(tokenizer):
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _beginning(tokenizer: Tokenizer) -> list[int]:
    """Return [the token that begins every text], [] if the tokenizer puts none there."""
    with using(tokenizer):
        first = tokenizer("", verbose=False)["input_ids"][:1]
    return first if first and first[0] == getattr(tokenizer, "bos_token_id", None) else []


def _tokens(tokenizer: Tokenizer, documents: Iterable[str], enough: int | None = None) -> list[int]:
    """Return the ids of the documents, with the end-of-text token between them.

    No further document is tokenized once there are `enough` ids.
    """
    end = getattr(tokenizer, "eos_token_id", None)
    separator = [end] if isinstance(end, int) else []
    stream: list[int] = []
    for document in documents:
        if enough is not None and len(stream) >= enough:
            break
        if document:
            stream += (separator if stream else []) + _ids(tokenizer, document)
    return stream


# ---------------------------------------------------------------- the text that comes with Python


def _default_stream(tokenizer: Tokenizer, purpose: Purpose, tokens: int) -> list[int]:
    """Return `tokens` or more ids of the default text: excerpts, then the rest of each one."""
    stream = _tokens(tokenizer, (text[:_EXCERPT] for _, text in default_text(purpose)), tokens)
    if len(stream) >= tokens:
        return stream
    return stream + _tokens(
        tokenizer, (text[_EXCERPT:] for _, text in default_text(purpose)), tokens - len(stream)
    )


def default_text(purpose: Purpose) -> Iterator[tuple[str, str]]:
    """Yield (name, text) of the documents for `purpose`, read as they are asked for.

    The first bit of a name's hash decides the purpose of a document. The hash also orders them,
    which mixes manual pages and code.
    """
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
    except ImportError:  # some distributions of Python leave it out
        return {}
    return {f"topic {name}": text for name, text in topics.items()}


def _sources() -> dict[str, str | Path]:
    """Return the modules of the standard library by path, without tests and code tables."""
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
