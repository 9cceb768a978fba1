"""The arguments of every command, and which function of `moecc.cli.calls` it runs."""

from __future__ import annotations

import argparse
import difflib
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from moecc import __version__
from moecc.cli import calls
from moecc.errors import MoeccError

Add = Callable[[argparse.ArgumentParser], None]
_BITS = "default of every pass option called bits; see moecc passes NAME"


class _Once(argparse.Action):
    """An option that takes one value: what is given twice would be lost without a word."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        _require_once(self, namespace)
        setattr(namespace, self.dest, values)


class _OnceOrNot(argparse.BooleanOptionalAction):
    """A switch that can't be both on and off."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        _require_once(self, namespace)
        super().__call__(parser, namespace, values, option_string)


def _require_once(action: argparse.Action, namespace: argparse.Namespace) -> None:
    given = vars(namespace).setdefault("given", set())
    if action.dest in given:
        raise argparse.ArgumentError(action, "is given twice; leave one out")
    given.add(action.dest)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, as all others are, and that drops no argument."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register("action", None, _Once)

    def error(self, message: str) -> NoReturn:
        raise MoeccError(f"{message}; see `{self.prog} --help`")


class CommandParser(Parser):
    """The parser of one command. It names a misspelt option before options that are missing."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self._require_options(args)
        found, others = super().parse_known_args(args, namespace)
        if others:
            self.error(f"unrecognized arguments: {' '.join(others)}")
        return found, others

    def _require_options(self, args: Sequence[str]) -> None:
        known = [*self._option_string_actions]
        for argument in args:
            name = argument.partition("=")[0]
            if name == "--":  # the rest are no options
                return
            # with a space it is a value, for argparse too
            if name.startswith("--") and " " not in argument and name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                self.error(f"no option {name}" + (f"; did you mean {near[0]}?" if near else ""))


@dataclass(frozen=True)
class Command:
    """One command. arguments adds its own; tokenizer: whether it may run a tokenizer that is Python
    code; progress: whether it shows bars.
    """

    name: str
    run: Callable[[argparse.Namespace], calls.Outcome]
    help: str
    arguments: Add
    tokenizer: bool = False
    progress: bool = False


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line; its result has the command's function as `run`."""
    made = Parser(prog="moecc", description="A compiler for Mixture-of-Experts language models.")
    made.add_argument("--version", action="version", version=f"moecc {__version__}")
    group = made.add_subparsers(
        title="commands", metavar="COMMAND", required=True, parser_class=CommandParser
    )
    for command in COMMANDS:
        one = group.add_parser(
            command.name, help=command.help, description=command.help, allow_abbrev=False
        )
        one.set_defaults(run=command.run)
        one.add_argument("--json", action="store_true", help="one JSON object on stdout")
        if command.progress:
            one.add_argument(
                "--progress",
                action=_OnceOrNot,
                help="progress bars on stderr (default: on a terminal)",
            )
        if command.tokenizer:
            one.add_argument(
                "--trust-remote-code",
                action="store_true",
                help="run Python code that the model's tokenizer comes with",
            )
        command.arguments(one)
    return made


def _nothing(parser: argparse.ArgumentParser) -> None:
    return None


def _named(what: str) -> Add:
    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "name",
            nargs="?",
            metavar="NAME",
            help=f"a {what}, or the path of a file that defines one",
        )

    return add


def _diff(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", metavar="A", help="folder or hub id")
    parser.add_argument("b", metavar="B", help="folder or hub id")


def _compile(parser: argparse.ArgumentParser) -> None:
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
        type=_path,
        metavar="OUT",
        help="folder to write; must not exist",
    )
    _text(parser, "--calib", "calibration")
    _rows(parser)
    parser.add_argument(
        "--backend",
        metavar="TARGET",
        help="write the result in the form of a target too, NAME{option=value}; see moecc targets",
    )
    parser.add_argument(
        "--seed",
        type=_seed,
        default=0,
        metavar="S",
        help="of everything that is random (default: 0)",
    )
    parser.add_argument(
        "--dump",
        type=_path,
        metavar="DIR",
        help="write the program's text after every pass into DIR",
    )
    parser.add_argument(
        "--ray",
        metavar="ADDRESS",
        help="code on a Ray cluster: HOST:PORT, ray://HOST:PORT, auto, or local to start one here",
    )
    _machine(parser)


def _inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="folder (a config.json is enough) or hub id")
    parser.add_argument("--passes", metavar="P", help="say what this pipeline would give")
    parser.add_argument("--bits", type=_bits, metavar="B", help=_BITS)
    _rows(parser)
    _machine(parser)


def _eval(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="OUT", help="artifact or checkpoint: folder or hub id")
    parser.add_argument(
        "--reference", required=True, metavar="MODEL", help="the model it was compiled from"
    )
    _text(parser, "--text", "evaluation")
    _rows(parser)
    parser.add_argument(
        "--batch",
        type=_positive,
        default=8,
        metavar="N",
        help="rows computed together (default: 8)",
    )
    _device(parser)


def _generate(parser: argparse.ArgumentParser) -> None:
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
        "--seed", type=_seed, default=0, metavar="S", help="for a temperature above 0 (default: 0)"
    )
    _device(parser)


def _export(parser: argparse.ArgumentParser) -> None:
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
        type=_path,
        metavar="DIR",
        help="folder to write (default: OUT/NAME of the target)",
    )


def _bench(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        type=_path,
        metavar="OUT",
        help="exported folder, or an artifact with one in it",
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


def _text(parser: argparse.ArgumentParser, option: str, purpose: str) -> None:
    parser.add_argument(
        option,
        action="append",
        type=_path,
        metavar="FILE",
        help=f"{purpose} text, or .jsonl of texts or chats; several are read as one "
        "(default: text of this Python)",
    )


def _rows(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--rows", type=_positive, default=64, metavar="N", help="rows of text (default: 64)"
    )
    parser.add_argument(
        "--length", type=_positive, default=512, metavar="L", help="tokens of a row (default: 512)"
    )


def _machine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--workers",
        type=_positive,
        metavar="N",
        help="processes that code experts (default: one per core, if memory allows)",
    )
    parser.add_argument(
        "--max-memory",
        type=_memory,
        metavar="SIZE",
        help="that all processes together may take, such as 16GiB (default: what is free)",
    )
    _device(parser)


def _device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device",
        default="cpu",
        metavar="DEVICE",
        help="what computes: cpu (the default), cuda, cuda:N, or auto for a GPU if there is one",
    )


def _path(text: str) -> Path:
    if not text:  # Path("") would be the current folder
        raise argparse.ArgumentTypeError("'' is no path; is a variable empty?")
    return Path(text)


def _positive(text: str) -> int:
    if not text.strip().isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 1 or more")
    return int(text)


def _seed(text: str) -> int:
    value = int(text)
    if not -(1 << 63) <= value < 1 << 64:  # those that torch takes
        raise argparse.ArgumentTypeError(f"{text} is no number of 64 bits")
    return value


def _bits(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no number of bits")
    return value


def _memory(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", text.strip(), re.IGNORECASE)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; give one such as 16GiB")
    number, unit, binary = found.groups()
    count = float(number) * (1024 if binary else 1000) ** " KMGT".index(unit.upper() or " ")
    if not 1 <= count < 1 << 60:
        raise argparse.ArgumentTypeError(f"{text} is no amount of memory; give one such as 16GiB")
    return int(count)


def _temperature(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a temperature of 0 or more")
    return value


COMMANDS = (
    Command(
        "compile",
        calls.compile,
        "compress a model into a new folder",
        _compile,
        tokenizer=True,
        progress=True,
    ),
    Command("inspect", calls.inspect, "MoE structure and sizes, without reading weights", _inspect),
    Command(
        "eval",
        calls.eval,
        "perplexity, KL, experts chosen and output error",
        _eval,
        tokenizer=True,
        progress=True,
    ),
    Command("generate", calls.generate, "continue a prompt", _generate, tokenizer=True),
    Command("export", calls.export, "an artifact as a folder for another runtime", _export),
    Command("bench", calls.bench, "tokens per second and memory of an exported model", _bench),
    Command(
        "build-ops",
        calls.build_ops,
        "compile the native libraries of all targets ahead of their first use",
        _nothing,
    ),
    Command(
        "passes", calls.passes, "what passes there are; NAME shows one's options", _named("pass")
    ),
    Command(
        "targets",
        calls.targets,
        "the forms in which an artifact runs; NAME shows one's options",
        _named("target"),
    ),
    Command(
        "diff",
        calls.diff,
        "compare two artifacts or checkpoints; exit code 1 if they differ",
        _diff,
        progress=True,
    ),
)
