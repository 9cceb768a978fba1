"""One thin function per command: options -> exit code, result as JSON holds it, text.

Each imports what it needs when it is called, so that reading arguments takes no time.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from typing import Any

from moecc.errors import MoeccError, printable, printable_lines
from moecc.types import Json, Progress

Outcome = tuple[int, Json, str]


def say(line: str) -> None:
    """A remark: to stderr at once."""
    print(printable(line), file=sys.stderr, flush=True)


def progress(options: argparse.Namespace) -> Progress:
    """A bar on stderr, if asked for or on a terminal."""
    from tqdm import tqdm

    asked = options.progress if options.progress is not None else sys.stderr.isatty()

    def bar(items: Iterable[Any], label: str) -> Iterable[Any]:
        shown: Iterable[Any] = tqdm(
            items, desc=label, file=sys.stderr, disable=not asked, leave=False
        )
        return shown

    return bar


def compile(options: argparse.Namespace) -> Outcome:
    """Compress a model: 0, what `compile_model` returns, the folder with its size and bits.

    Raise MoeccError if the model, an option or the folder to write is refused.
    """
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
        workers=options.workers,
        ray=options.ray,
        max_memory=options.max_memory,
        device=options.device,
        progress=progress(options),
        say=say,
    )
    bits = [
        f"{result[key]:.3f} bits per {what}"
        for key, what in (
            ("bits_per_weight_experts", "routed-expert weight"),
            ("bits_per_weight", "weight"),
        )
        if result[key] is not None
    ]
    facts = ", ".join([size(result["bytes"]), *bits])
    return 0, result, printable(f"{result['out']}: {facts}")


def inspect(options: argparse.Namespace) -> Outcome:
    """Show a model's structure: 0, what `inspect_model` returns, its table.

    Raise MoeccError if the model or a pass is refused, or if an option of a pipeline is given
    without --passes.
    """
    from moecc.commands.inspect import inspect_model, table

    of_passes = ("bits", "rows", "length", "workers", "max_memory", "device")
    if options.passes is None and (given := [o for o in of_passes if o in options.given]):
        option = "--" + given[0].replace("_", "-")
        raise MoeccError(f"{option} says something about passes; give --passes too")
    found = inspect_model(
        options.model,
        passes=options.passes,
        bits=options.bits,
        rows=options.rows,
        length=options.length,
        workers=options.workers,
        max_memory=options.max_memory,
        device=options.device,
    )
    return 0, found, table(found)


def eval(options: argparse.Namespace) -> Outcome:
    """Compare a model with its reference: 0, what `evaluate_models` returns, its table.

    Raise MoeccError if a model or the text is refused, or if the two do not fit each other.
    """
    from moecc.commands.evaluate import evaluate_models, table

    found = evaluate_models(
        options.model,
        options.reference,
        text=options.text,
        rows=options.rows,
        length=options.length,
        batch=options.batch,
        device=options.device,
        trust_remote_code=options.trust_remote_code,
        progress=progress(options),
        say=say,
    )
    return 0, found, table(found)


def generate(options: argparse.Namespace) -> Outcome:
    """Continue a prompt: 0, what `generate` returns, the prompt with its continuation.

    Raise MoeccError if the model or the prompt is refused.
    """
    from moecc.commands.generate import generate

    found = generate(
        options.model,
        options.prompt,
        new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        seed=options.seed,
        device=options.device,
        trust_remote_code=options.trust_remote_code,
    )
    return 0, found, found["prompt"] + found["text"]


def export(options: argparse.Namespace) -> Outcome:
    """Write an artifact for a target: 0, the folder (None if none is needed) and facts, a summary.

    Raise MoeccError if the target is unknown or cannot write the model.
    """
    from moecc.commands.export import export_artifact

    found = export_artifact(options.model, options.to, options.out, say=say)
    summary = printable_lines(found.summary.splitlines())
    return 0, {"out": None if found.out is None else str(found.out), **found.facts}, summary


def bench(options: argparse.Namespace) -> Outcome:
    """Measure an export here: 0, the model and the rows of the target's `bench`, their table.

    Raise MoeccError if the folder holds no export that can be measured.
    """
    from moecc.commands.export import bench_export

    target, rows = bench_export(
        options.model,
        threads=options.threads,
        prompt=options.prompt_tokens,
        new_tokens=options.new_tokens,
        say=say,
    )
    return 0, {"model": str(options.model), "rows": rows}, target.table(rows)


def build_ops(options: argparse.Namespace) -> Outcome:
    """Compile the native libraries of all targets: 0, their paths, a path per line.

    Raise MoeccError if a compiler or a package is missing.
    """
    from moecc.commands.export import build_libraries

    found = [str(path) for path in build_libraries(say)]
    return 0, {"libraries": found}, "\n".join(found)


def diff(options: argparse.Namespace) -> Outcome:
    """Compare two models: 1 if they differ, else 0; what `compare_models` returns, its table.

    Raise MoeccError if one of them cannot be read.
    """
    from moecc.commands.diff import compare_models, table

    found = compare_models(options.a, options.b, progress(options))
    return int(not found["identical"]), found, table(found)


def passes(options: argparse.Namespace) -> Outcome:
    """List the passes or describe one: 0, their facts and options, lines of text.

    Raise MoeccError if no pass is called so.
    """
    from moecc.commands.passes import describe_pass, describe_passes, pass_line, pass_text

    if options.name is not None:
        found = describe_pass(options.name)
        return 0, found, pass_text(found)
    every = describe_passes()
    return 0, {"passes": every}, "\n".join(map(pass_line, every))


def targets(options: argparse.Namespace) -> Outcome:
    """List the targets or describe one: 0, their options, lines of text.

    Raise MoeccError if no target is called so.
    """
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
