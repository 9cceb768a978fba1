"""The command line: it reads its arguments first, and imports what a command needs after.

Results go to stdout (with --json exactly one object), remarks and progress to stderr, and what an
encoding lacks goes there as escapes. Exit codes: 0 done; 1 `diff` found a difference; 2 bad input,
in one line; 3 a fault of moecc's own; 130 interrupted; 141 stdout was closed; 143 terminated.
MOECC_DEBUG=1 shows tracebacks.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import io
import json
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn, TextIO

from moecc.cli.arguments import parser
from moecc.errors import (
    MoeccError,
    debugging,
    for_terminal,
    out_of_memory,
    printable,
    quoted,
    too_little_memory,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    _open_streams()
    with (
        _escaping(sys.stdout),
        _escaping(sys.stderr),
        contextlib.redirect_stderr(_Remarks(sys.stderr)),
    ):
        return _main(argv, debugging())


def _main(argv: Sequence[str] | None, debug: bool) -> int:
    try:
        with _termination():
            _require_text(sys.argv[1:] if argv is None else argv)
            try:
                options = parser().parse_args(argv)
            except SystemExit as stop:  # --help and --version
                _write()
                return int(stop.code or 0)
            return _run(options, debug)
    except Terminated:
        return _fail("terminated", 143, False)
    except KeyboardInterrupt:
        return _fail("interrupted", 130, False)
    except BrokenPipeError:
        _drop(1)  # whoever read stdout has gone
        return 141
    except MoeccError as error:
        return _fail(f"error: {error}", 2, debug)
    except (Exception, SystemExit) as error:  # a library's exit is no success of the command
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
            return _fail(f"error: {quoted(error.filename)}: the path is too long", 2, debug)
        if out_of_memory(error):
            return _fail(f"error: {too_little_memory(error)}", 2, debug)
        return _internal(error, debug)


def _require_text(arguments: Sequence[str]) -> None:
    """Raise MoeccError for an argument that is no path and no text that can be written again."""
    for argument in arguments:
        if "\0" in argument or any("\ud800" <= c <= "\udfff" for c in argument):
            raise MoeccError(f"{quoted(argument)} isn't UTF-8 text, or has a NUL in it")


def _open_streams() -> None:
    """Open what the caller has closed of stdin, stdout and stderr, to read and write nothing.

    Else the next file to be opened, such as one of weights, would have that number, and a
    library that prints would write into it.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            nothing = os.open(os.devnull, os.O_RDWR)
            os.dup2(nothing, number)
            setattr(sys, name, open(number, "r" if number == 0 else "w", encoding="utf-8"))


class _Remarks:
    """stderr, whose closing ends no run: what nobody reads is dropped."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, call: Callable[[], object]) -> None:
        try:
            call()
        except OSError:
            with contextlib.suppress(OSError):
                _drop(self._stream.fileno())


def _drop(number: int) -> None:
    """Make a stream write nothing from now on: what is in its buffer must not fail at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), number)


@contextlib.contextmanager
def _escaping(stream: TextIO) -> Iterator[None]:
    """Let a stream write a character that its encoding lacks as an escape, instead of failing.

    Windows gives a pipe one of 256 characters, and a locale of C gives ASCII.
    """
    if not isinstance(stream, io.TextIOWrapper):  # in memory: it holds any text
        yield
        return
    before = stream.errors
    stream.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # it flushes, but the reader may have gone
            stream.reconfigure(errors=before)


class Terminated(KeyboardInterrupt):
    """SIGTERM, by which a job is stopped: it leaves in order what an interrupt leaves in order."""


@contextlib.contextmanager
def _termination() -> Iterator[None]:
    """Raise Terminated inside on SIGTERM."""

    def stop(*args: object) -> NoReturn:
        raise Terminated

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not the main thread: its program says what signals do
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _run(options: argparse.Namespace, debug: bool) -> int:
    # nothing that a library prints may join the result
    with _quiet(debug), _unheard(debug), contextlib.redirect_stdout(sys.stderr):
        code, result, text = options.run(options)
    if sys.stdout.isatty():  # a model's text may come from anyone's tokenizer
        text = for_terminal(text)
    _write(json.dumps(result) if options.json else text, end="\n")
    return int(code)


def _write(text: str = "", end: str = "") -> None:
    """Write the result, and what is in the buffer of stdout.

    Raise MoeccError if stdout takes no more, as on a full disk.
    """
    try:
        print(text, end=end, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        _drop(1)
        why = f"stdout can't be written: {error.strerror}; free some space or write elsewhere"
        raise MoeccError(why) from error


@contextlib.contextmanager
def _unheard(debug: bool) -> Iterator[None]:
    """Drop what compiled libraries write to stdout, which don't know Python's; to stderr if debug.

    What is still in C's buffers goes the same way.
    """
    import ctypes

    sys.stdout.flush()
    kept, elsewhere = os.dup(1), os.dup(2) if debug else os.open(os.devnull, os.O_WRONLY)
    os.dup2(elsewhere, 1)
    os.close(elsewhere)
    try:
        yield
    finally:
        with contextlib.suppress(OSError, TypeError):  # no such library on Windows
            ctypes.CDLL(None).fflush(None)
        os.dup2(kept, 1)
        os.close(kept)


def _internal(error: BaseException, debug: bool) -> int:
    hint = "" if debug else "; MOECC_DEBUG=1 shows where"
    return _fail(f"internal error: {type(error).__name__}: {error}{hint}", 3, debug)


def _fail(message: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print("moecc: " + printable(" ".join(message.split())), file=sys.stderr)
    return code


@contextlib.contextmanager
def _quiet(debug: bool) -> Iterator[None]:
    """Keep warnings and bars of libraries from mixing with ours, unless debugging."""
    if debug:
        yield
        return
    from transformers.utils import logging as untyped

    logging: Any = untyped
    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()
