"""The command line: arguments are read first, and the packages that a command needs are imported after.

Results go to stdout (with --json exactly one object), remarks and progress to stderr. Exit codes: 0 done; 1 `diff`
found a difference; 2 bad input, in one line; 3 a fault of moecc's own; 130 interrupted, 143 terminated. MOECC_DEBUG=1 shows
tracebacks.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from moecc import __version__
from moecc.errors import MoeccError
from moecc.types import Progress

_BITS = "default of every pass option called bits; see moecc passes NAME"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code."""
    debug = os.environ.get("MOECC_DEBUG", "0") not in ("", "0")
    try:
        with _termination():
            options = _parser().parse_args(argv)
            return _run(options, debug)
    except SystemExit as stop:  # --help and --version
        return int(stop.code or 0)
    except KeyboardInterrupt as stop:
        terminated = isinstance(stop, Terminated)
        return _fail(
            "terminated" if terminated else "interrupted", 143 if terminated else 130, False
        )
    except (
        BrokenPipeError
    ):  # whoever read stdout has gone; nothing can be said to it, not even at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141
    except MoeccError as error:
        return _fail(f"error: {error}", 2, debug)
    except Exception as error:
        hint = "" if debug else "; MOECC_DEBUG=1 shows where"
        return _fail(f"internal error: {type(error).__name__}: {error}{hint}", 3, debug)


class Terminated(KeyboardInterrupt):
    """SIGTERM, which whoever stops a job sends: what an interrupt leaves in order, it leaves too."""


@contextlib.contextmanager
def _termination() -> Iterator[None]:
    """SIGTERM raises Terminated inside."""

    def stop(*args: Any) -> NoReturn:
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
    with (
        _quiet(debug),
        contextlib.redirect_stdout(sys.stderr),
    ):  # nothing that a library prints may join the result
        code, result, text = options.run(options)
    print(json.dumps(result) if options.json else text)
    sys.stdout.flush()
    return int(code)


def _fail(message: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print("moecc: " + " ".join(message.split()), file=sys.stderr)
    return code


@contextlib.contextmanager
def _quiet(debug: bool) -> Iterator[None]:
    """No warnings and bars of libraries among ours, unless debugging."""
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


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _progress(options: argparse.Namespace) -> Progress:
    from tqdm import tqdm

    asked = options.progress if options.progress is not None else sys.stderr.isatty()
    return lambda items, label: tqdm(
        items, desc=label, file=sys.stderr, disable=not asked, leave=False
    )


# ---------------------------------------------------------------- commands: options -> exit code, result, text

Outcome = tuple[int, Any, str]


def _compile(options: argparse.Namespace) -> Outcome:
    from moecc.checkpoint.files import size
    from moecc.commands.compile import compile_model

    result = compile_model(
        options.model,
        options.passes,
        options.out,
        bits=options.bits,
        calib=options.calib,
        rows=options.rows,
        length=options.length,
        backend=options.backend,
        seed=options.seed,
        dump=options.dump,
        trust_remote_code=options.trust_remote_code,
        progress=_progress(options),
        say=_say,
    )
    bits = [
        f"{result[key]:.3f} bits per {what}"
        for key, what in (
            ("bits_per_weight_experts", "routed-expert weight"),
            ("bits_per_weight", "weight"),
        )
        if result[key] is not None
    ]
    return 0, result, f"{result['out']}: " + ", ".join([size(result["bytes"]), *bits])


def _inspect(options: argparse.Namespace) -> Outcome:
    from moecc.commands.inspect import inspect_model, table

    if options.bits is not None and options.passes is None:
        raise MoeccError("--bits says something about passes; give --passes too")
    found = inspect_model(options.model, passes=options.passes, bits=options.bits)
    return 0, found, table(found)


def _eval(options: argparse.Namespace) -> Outcome:
    from moecc.commands.evaluate import evaluate_models, table

    found = evaluate_models(
        options.model,
        options.reference,
        text=options.text,
        rows=options.rows,
        length=options.length,
        batch=options.batch,
        trust_remote_code=options.trust_remote_code,
        progress=_progress(options),
        say=_say,
    )
    return 0, found, table(found)


def _generate(options: argparse.Namespace) -> Outcome:
    from moecc.commands.generate import generate

    found = generate(
        options.model,
        options.prompt,
        new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        seed=options.seed,
        trust_remote_code=options.trust_remote_code,
    )
    return 0, found, found["prompt"] + found["text"]


def _export(options: argparse.Namespace) -> Outcome:
    from moecc.commands.export import export_artifact

    found = export_artifact(options.model, options.to, options.out, say=_say)
    return 0, {"out": None if found.out is None else str(found.out), **found.facts}, found.summary


def _bench(options: argparse.Namespace) -> Outcome:
    from moecc.commands.export import bench_export

    target, rows = bench_export(
        Path(options.model),
        threads=options.threads,
        prompt=options.prompt_tokens,
        new_tokens=options.new_tokens,
        say=_say,
    )
    return 0, {"model": options.model, "rows": rows}, target.table(rows)


def _build_ops(options: argparse.Namespace) -> Outcome:
    from moecc.commands.export import build_libraries

    found = [str(path) for path in build_libraries(_say)]
    return 0, {"libraries": found}, "\n".join(found)


def _diff(options: argparse.Namespace) -> Outcome:
    from moecc.commands.diff import compare_models, table

    found = compare_models(options.a, options.b, _progress(options))
    return int(not found["identical"]), found, table(found)


def _passes(options: argparse.Namespace) -> Outcome:
    from moecc.commands.passes import describe_pass, describe_passes, pass_line, pass_text

    if options.name is not None:
        found = describe_pass(options.name)
        return 0, found, pass_text(found)
    every = describe_passes()
    return 0, {"passes": every}, "\n".join(map(pass_line, every))


def _targets(options: argparse.Namespace) -> Outcome:
    from moecc.commands.targets import (
        describe_target,
        describe_targets,
        target_line,
        target_text,
    )

    if options.name is not None:
        found = describe_target(options.name)
        return 0, found, target_text(found)
    every = describe_targets()
    return 0, {"targets": every}, "\n".join(map(target_line, every))


# ---------------------------------------------------------------- arguments


class _Parser(argparse.ArgumentParser):
    """Errors are one line, as all others are."""

    def error(self, message: str) -> NoReturn:
        raise MoeccError(f"{message}; see `{self.prog} --help`")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="moecc", description="A compiler for Mixture-of-Experts language models.")
    parser.add_argument("--version", action="version", version=f"moecc {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_compile(
        _command(
            commands, "compile", _compile, "compress a model into a new folder", tokenizer=True
        )
    )
    _add_inspect(
        _command(commands, "inspect", _inspect, "MoE structure and sizes, without reading weights")
    )
    _add_eval(
        _command(
            commands,
            "eval",
            _eval,
            "perplexity, KL, experts chosen and output error",
            tokenizer=True,
        )
    )
    _add_generate(_command(commands, "generate", _generate, "continue a prompt", tokenizer=True))
    _add_export(
        _command(commands, "export", _export, "an artifact as a folder for another runtime")
    )
    _add_bench(
        _command(commands, "bench", _bench, "tokens per second and memory of an exported model")
    )
    _command(
        commands,
        "build-ops",
        _build_ops,
        "compile the native libraries of all targets ahead of their first use",
    )
    passes = _command(
        commands, "passes", _passes, "what passes there are; NAME shows one's options"
    )
    passes.add_argument(
        "name", nargs="?", metavar="NAME", help="a pass, or the path of a file that defines one"
    )
    targets = _command(
        commands, "targets", _targets, "the forms that export writes; NAME shows one's options"
    )
    targets.add_argument(
        "name", nargs="?", metavar="NAME", help="a target, or the path of a file that defines one"
    )
    diff = _command(
        commands, "diff", _diff, "compare two artifacts or checkpoints; exit code 1 if they differ"
    )
    diff.add_argument("a", metavar="A", help="folder or hub id")
    diff.add_argument("b", metavar="B", help="folder or hub id")
    return parser


def _command(
    commands: Any,
    name: str,
    run: Callable[[argparse.Namespace], Outcome],
    what: str,
    *,
    tokenizer: bool = False,
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=what, description=what, allow_abbrev=False
    )
    parser.set_defaults(run=run)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument(
        "--progress",
        action=argparse.BooleanOptionalAction,
        help="progress bars on stderr (default: on a terminal)",
    )
    if tokenizer:
        parser.add_argument(
            "--trust-remote-code",
            action="store_true",
            help="run Python code that the model's tokenizer comes with",
        )
    return parser


def _add_compile(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="checkpoint folder or hub id")
    parser.add_argument(
        "--passes",
        required=True,
        metavar="P",
        help="passes and their options, NAME{option=value},NAME; see moecc passes",
    )
    parser.add_argument("--bits", type=_bits, metavar="B", help=_BITS)
    parser.add_argument(
        "-o",
        "--out",
        required=True,
        type=Path,
        metavar="OUT",
        help="folder to write; must not exist",
    )
    parser.add_argument(
        "--calib", type=Path, metavar="FILE", help="calibration text (default: text of this Python)"
    )
    _add_rows(parser)
    parser.add_argument(
        "--backend",
        metavar="TARGET",
        help="write the result in the form of a target too, NAME{option=value}; see moecc targets",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="S", help="of everything that is random (default: 0)"
    )
    parser.add_argument(
        "--dump",
        type=Path,
        metavar="DIR",
        help="write the program's text after every pass into DIR",
    )


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="folder (a config.json is enough) or hub id")
    parser.add_argument("--passes", metavar="P", help="say what this pipeline would give")
    parser.add_argument("--bits", type=_bits, metavar="B", help=_BITS)


def _add_eval(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="OUT", help="artifact or checkpoint: folder or hub id")
    parser.add_argument(
        "--reference", required=True, metavar="MODEL", help="the model it was compiled from"
    )
    parser.add_argument(
        "--text", type=Path, metavar="FILE", help="evaluation text (default: text of this Python)"
    )
    _add_rows(parser)
    parser.add_argument(
        "--batch",
        type=_positive,
        default=8,
        metavar="N",
        help="rows computed together (default: 8)",
    )


def _add_generate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="OUT", help="artifact or checkpoint: folder or hub id")
    parser.add_argument(
        "--prompt", default="import ", metavar="TEXT", help="text to continue (default: 'import ')"
    )
    parser.add_argument(
        "--max-new-tokens", type=_positive, default=64, metavar="N", help="at most (default: 64)"
    )
    parser.add_argument(
        "--temperature",
        type=_temperature,
        default=0.0,
        metavar="T",
        help="0 is greedy (the default)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="S", help="for a temperature above 0 (default: 0)"
    )


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="OUT", help="artifact or checkpoint: folder or hub id")
    parser.add_argument(
        "--to",
        required=True,
        metavar="TARGET",
        help="a target and its options, NAME{option=value}; see moecc targets",
    )
    parser.add_argument(
        "-o",
        "--out",
        type=Path,
        metavar="DIR",
        help="folder to write (default: OUT/NAME of the target)",
    )


def _add_bench(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="OUT", help="exported folder, or an artifact with one in it"
    )
    parser.add_argument(
        "--threads", type=_positive, nargs="+", default=[1, 2], metavar="N", help="(default: 1 2)"
    )
    parser.add_argument(
        "--prompt-tokens",
        type=_positive,
        default=128,
        metavar="N",
        help="of a prefill (default: 128)",
    )
    parser.add_argument(
        "--new-tokens",
        type=_positive,
        default=64,
        metavar="N",
        help="decoded one by one (default: 64)",
    )


def _add_rows(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--rows", type=_positive, default=64, metavar="N", help="rows of text (default: 64)"
    )
    parser.add_argument(
        "--length", type=_positive, default=512, metavar="L", help="tokens of a row (default: 512)"
    )


def _positive(text: str) -> int:
    if not text.strip().isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 1 or more")
    return int(text)


def _bits(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no number of bits")
    return value


def _temperature(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a temperature of 0 or more")
    return value


if __name__ == "__main__":
    sys.exit(main())
