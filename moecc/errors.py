"""The one error that users see: one line that says what is wrong, where, and what to do."""

from __future__ import annotations

import errno
import os
import re
import sys
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

_SHORT = re.compile(
    "out of memory|can't allocate memory|cannot allocate memory|bad_alloc|_alloc_failed", re.I
)
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # but line breaks and tabs
_LONGEST = 200  # characters that are shown of a name
_LONGEST_LINE = 900  # characters of a message
_LONGEST_REASON = 400  # characters that are shown of a library's message, with the names in it
# An error that was raised in another process has this attribute: files and lines, innermost last.
FRAMES = "frames_of_a_worker"


class MoeccError(ValueError):
    """Bad input, or a model that moecc cannot compile; the command line prints it, exit code 2.

    The message is one line of printable characters, whatever names of files and tensors are in it;
    of a very long one, the middle is left out.
    """

    def __init__(self, message: str = "") -> None:
        line = printable(" ".join(message.split()))
        end = _LONGEST_LINE // 3  # what to do is said there
        if len(line) > _LONGEST_LINE:
            line = f"{line[: _LONGEST_LINE - end]} ... {line[-end:]}"
        super().__init__(line)


class Mendable(MoeccError):
    """Code failed, or what the user may change: the same command can succeed once it is mended."""


def debugging() -> bool:
    """Return whether MOECC_DEBUG asks for tracebacks."""
    return os.environ.get("MOECC_DEBUG", "0") not in ("", "0")


def printable(text: str) -> str:
    """Return `text` with every character escaped that a terminal would obey and not show."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def printable_lines(lines: Iterable[str]) -> str:
    """Return a text of these lines, each `printable`: a name in one adds no line of its own."""
    return "\n".join(map(printable, lines))


def for_terminal(text: str) -> str:
    """Return a result with what a terminal would obey escaped, and all else as it is."""
    return _CONTROLS.sub(lambda found: ascii(found[0])[1:-1], text)


def quoted(name: object) -> str:
    """Return a name that a file gives as messages show it: in quotes, and cut if it is long."""
    text = str(name)
    return repr(text if len(text) <= _LONGEST else f"{text[:_LONGEST]}...")


def counted(number: int, noun: str) -> str:
    """Return a number of things in words: "1 token", "2 tokens"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def reason(error: BaseException) -> str:
    """Return a library's error message as one line: its first line, cut if it is long.

    If that line ends in a colon, the next line is appended. If memory was too short, it says so.
    """
    lines = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
    said = (" ".join(lines[:2]) if lines[0].endswith(":") else lines[0]).rstrip(".")
    if len(said) > _LONGEST_REASON:
        said = f"{said[:_LONGEST_REASON]}..."
    return f"out of memory ({said})" if out_of_memory(error) else said


def fault(error: BaseException, owner: object) -> str:
    """Return the type and message of an error in a pass or a target, and the line that raised it.

    owner: the pass or target, or what to call it. The line is the last one of its own file, else
    of any. Too little memory is no fault of a line.
    """
    if out_of_memory(error):
        return too_little_memory(error)
    cls = owner if isinstance(owner, type) else type(owner)
    file = getattr(sys.modules.get(cls.__module__), "__file__", None)
    here = [(f.filename, f.lineno) for f in traceback.extract_tb(error.__traceback__)]
    frames = [*here, *getattr(error, FRAMES, ())]
    path, line = [*frames, *(f for f in frames if f[0] == file)][-1]
    return f"{type(error).__name__}: {reason(error)} ({path}, line {line})"


@contextmanager
def naming(what: object) -> Iterator[None]:
    """Make any other error inside a Mendable that says `what` failed.

    A call of sys.exit is one too: the code inside is not moecc's, and its exit would end the
    command as if it were done.
    """
    try:
        yield
    except MoeccError:
        raise
    except (Exception, SystemExit) as error:
        raise Mendable(f"{what} failed: {fault(error, what)}") from error


def out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory was too short.

    Libraries have errors of their own for it, and some leave it to the message.
    """
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, ValueError):  # of a name in a file, say, as every MoeccError is one
        return False
    return isinstance(error, MemoryError) or bool(_SHORT.search(str(error)))


def too_little_memory(error: BaseException) -> str:
    """Return what to say of an error for which `out_of_memory` is true."""
    said = reason(error) if str(error) else "out of memory"
    return f"{said}; end other programs or give fewer rows"


def may_pass(error: BaseException) -> bool:
    """Return whether the same command can succeed later: not the input failed but the machine.

    That is an OSError, as of a full disk, or too little memory, anywhere among an error's causes.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError | EOFError) or out_of_memory(cause):
            return True
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return False
