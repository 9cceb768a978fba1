"""The commands that soak.py plays, their inputs, and a process that is ready to run them."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from _runs import UNDISTURBED, Case, Runner, Scenario

ROOT = Path(__file__).resolve().parent.parent
ROWS = ("--rows", "8", "--length", "32")
QUICK = "vq{rounds=1,codebook=layer}"
# a compiler whose results take no time; what is tested is the cache that they go to
COMPILER = '#!/bin/sh\n[ "$1" = --version ] && exit\nfor last; do :; done\necho made > "$last"\n'


def compilation(
    work: Path, workers: int, name: str, passes: str, *more: str, inputs: str = "plain"
) -> Scenario:
    options = ("-o", "out", *ROWS, "--workers", str(workers), *more)
    settings = {"moecc.artifact.write:SHARD_BYTES": 30_000} if inputs == "shards" else {}
    return Scenario(
        name,
        ("compile", "model", "--passes", passes, *options),
        work / "inputs" / inputs,
        "out",
        settings=settings,
        workers=workers,
    )


def scenarios(work: Path, workers: int = 1) -> list[Scenario]:
    """Return every command. workers: of those that compile."""
    inputs, compiles = work / "inputs", partial(compilation, work, workers)
    return [
        compiles("vsraq,kbvq", "vsraq{steps=3},kbvq{rank=4,mean=2}"),
        compiles("sensitivity,kbvq", "sensitivity,kbvq{rank=4}", "--dump", "dump"),
        compiles("kbvq,rilq,merge", "kbvq{bits=3.5},rilq{steps=4,rank=2,lr=15},merge"),
        compiles("shards: vq,dense", f"{QUICK},dense{{group=16}}", inputs="shards"),
        compiles("vq --backend onnx", QUICK, "--backend", "onnx{profile=portable}"),
        Scenario(
            "export --to dense",
            ("export", "artifact", "--to", "dense", "-o", "new/folder"),
            inputs / "artifact",
            "new/folder",
        ),
        Scenario(
            "export --to onnx",
            ("export", "artifact", "--to", "onnx"),
            inputs / "artifact",
            "artifact/onnx",
        ),
        Scenario(
            "build-ops",
            ("build-ops",),
            inputs / "ops",
            "cache",
            at_once=False,
            environment={"CXX": str(inputs / "c++")},
        ),
    ]


def warm(work: Path, used: list[Scenario]) -> tuple[Runner, float]:
    """Make the inputs of scenarios, import what they need, and trace the models.

    Forks of this process need none of it again. Return the seconds too that a process of its own
    needs to import and trace.
    """
    start = time.perf_counter()
    command = _imported(onnx=any("onnx" in scenario.name for scenario in used))
    import torch

    from moecc.artifact.decode import float_tensors
    from moecc.frontend.trace import trace

    imported, runner = time.perf_counter() - start, Runner(work, command)
    made = {scenario.inputs for scenario in used}
    inputs = {name: work / "inputs" / name for name in ("plain", "shards", "artifact", "ops")}
    from made import checkpoint

    _forked(checkpoint, inputs["plain"] / "model")
    start = time.perf_counter()
    trace(inputs["plain"] / "model", dtype=torch.float32)
    traced = time.perf_counter() - start
    if inputs["shards"] in made:
        _forked(lambda: checkpoint(inputs["shards"] / "model", shard="60KB"))
    if inputs["artifact"] in made:
        _compile(runner, shutil.copytree(inputs["plain"], inputs["artifact"]))
        float_tensors(inputs["artifact"] / "artifact", None)  # traces it
    if inputs["ops"] in made:
        inputs["ops"].mkdir()
        (work / "inputs" / "c++").write_text(COMPILER, encoding="utf-8")
        (work / "inputs" / "c++").chmod(0o755)
    if len(os.listdir("/proc/self/task")) > 1:
        raise SystemExit("this process has threads, whose locks forks would wait for")
    return runner, imported + traced


def _imported(*, onnx: bool) -> Callable[[Sequence[str]], int]:
    """Import what commands need, and return the command line."""
    sys.path.append(str(ROOT / "tests"))
    import pytest
    import torch
    from traces import trace_once
    from transformers.utils import logging

    from moecc import cli
    from moecc.pipeline.parse import parse_passes

    warnings.simplefilter("ignore")
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    parse_passes("vsraq,kbvq,rilq,merge,dense")
    if onnx:  # not onnxruntime, which starts a thread
        importlib.import_module("onnxscript")
    trace_once(pytest.MonkeyPatch())
    return cli.main


def _compile(runner: Runner, box: Path) -> None:
    arguments = ("compile", "model", "--passes", QUICK, "-o", "artifact", *ROWS)
    scenario = Scenario("the artifact", arguments, box, "artifact")
    ended = runner.run(Case("", scenario), box, UNDISTURBED)
    if ended.code:
        raise SystemExit(f"the artifact can't be made:\n{ended.errors}")


def _forked(call: Callable[..., object], *arguments: object) -> None:
    """Call a function in a fork, where threads that it starts stay.

    Raise SystemExit if it fails.
    """
    process = multiprocessing.get_context("fork").Process(target=call, args=arguments)
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit("an input can't be made")
