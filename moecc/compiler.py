"""`moecc compile`, whole: read the passes, trace the model, run the passes layer by layer, write, reload, compare, rename.

Nothing is called done before the written folder has been loaded again and its logits compared with the program's. Until then all
of it lives in OUT.partial; a run that is killed leaves that folder and goes on from it, a run that fails removes it.
"""

from __future__ import annotations

import importlib
import platform
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import moecc
from moecc import artifact, pipeline, text, verify, vq4
from moecc.base import Context, MoeccError, Pass
from moecc.ir import Program
from moecc.journal import Journal
from moecc.trace import trace
from moecc.weights import resolve

Progress = Callable[[Iterable[Any], str], Iterable[Any]]
BATCH = 2  # calibration rows that go through a layer together
CHECKED = (2, 64)  # rows and tokens of the reload check


@dataclass(frozen=True)
class Job:
    """What a run is; two runs with equal jobs on the same machine write the same bytes."""

    source: str
    source_digest: str
    passes: str
    calibration: str
    seed: int
    backend: str
    versions: dict[str, str]


def compile_model(
    model: str, passes: str, out: Path, *, bits: int | None = None, calib: Path | None = None, rows: int = 64, length: int = 512,
    backend: str = "reference", seed: int = 0, dump: Path | None = None, trust_remote_code: bool = False,
    progress: Progress = lambda items, label: items, say: Callable[[str], None] = print,
) -> dict[str, Any]:  # fmt: skip
    """Compile `model` (folder or hub id) with the pipeline text `passes` into the new folder `out`; a summary of what was written.

    calib: text file (by default text that comes with Python); rows x length: calibration tokens. MoeccError for bad input, in one
    line, with nothing left behind.
    """
    if out.exists():
        raise MoeccError(f"{out} exists; choose another output folder or remove it")
    require_backend(backend)
    resolved = _pipeline(passes, bits, say)
    folder = resolve(model)
    batches, calibration = _calibration(folder, calib, rows, length, resolved, trust_remote_code)
    say(f"tracing {model}")
    program = trace(folder, dtype=torch.float32, trust_remote_code=trust_remote_code)
    _require_fresh(program, model)
    if program.restriction:
        say(f"note: the trace holds for {program.restriction} only")
    job = Job(str(model), program.store.digest(), ",".join(map(str, resolved)), calibration, seed, backend, versions())  # type: ignore[union-attr]
    partial = out.with_name(out.name + ".partial")
    fresh = not partial.exists()
    try:
        journal = Journal(partial / "journal", vars(job))
        result = _run(program, resolved, batches, job, journal, partial, folder, dump, progress, say)
        (partial / "artifact").rename(out)
        journal.remove()
        shutil.rmtree(partial, ignore_errors=True)
        return result
    except MoeccError:
        if fresh:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    except OSError as e:
        if fresh:
            shutil.rmtree(partial, ignore_errors=True)
        raise MoeccError(f"writing {out} failed: {e.strerror or e}; make room or choose another place") from e


def _run(
    program: Program, resolved: list[Pass], batches: list[Tensor], job: Job, journal: Journal, partial: Path, folder: Path,
    dump: Path | None, progress: Progress, say: Callable[[str], None],
) -> dict[str, Any]:  # fmt: skip
    original = program.copy()
    ctx = Context(seed=job.seed, progress=progress)
    if journal.found:
        say(f"going on with the run that {journal.folder.parent} holds")
    dumper = _dumper(dump)
    dumper("00-traced", program)
    done: list[pipeline.PassReport] = []

    def after_pass(report: pipeline.PassReport, now: Program) -> None:
        done.append(report)
        say(report.line())
        dumper(f"{len(done):02d}-after-{report.text.split('{')[0]}", now)

    hooks = pipeline.Hooks(after_pass=after_pass, after_layer=journal.save, restore_layer=journal.restore, dump=dumper)
    reports = pipeline.run(program, resolved, ctx, batches, hooks).reports
    for note in ctx.notes:
        say(f"note: {note}")
    target = partial / "artifact"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    facts = _facts(job, reports, ctx)
    rows = artifact.write(target, artifact.plan(program, original, ctx), program, folder, facts, progress)
    check = verify.reload_and_compare(target, program, _check_ids(program, batches))
    say(check.line())
    lowered = importlib.import_module(f"moecc.backends.{job.backend}").emit(target, program)
    from moecc.report import write_report

    write_report(target, facts, rows)
    return {
        "out": str(partial.with_name(partial.name.removesuffix(".partial"))), "passes": job.passes, **artifact.summary(rows),
        "reload_difference": check.difference, "reloaded_by": check.loaded_by, "notes": ctx.notes, "backend": lowered,
    }  # fmt: skip


def require_backend(name: str) -> None:
    """MoeccError where there is no such backend."""
    import pkgutil

    import moecc.backends

    there = sorted(m.name for m in pkgutil.iter_modules(moecc.backends.__path__) if not m.name.startswith("_"))
    if name not in there:
        raise MoeccError(f"no backend {name!r}; there is {', '.join(there)}")


def _pipeline(passes: str, bits: int | None, say: Callable[[str], None]) -> list[Pass]:
    parsed, remarks = pipeline.parse(passes, bits=bits)
    resolved, more = pipeline.resolve(parsed)
    for remark in (*remarks, *more):
        say(remark)
    say("pipeline: " + ",".join(map(str, resolved)))
    return resolved


def _calibration(
    folder: Path, calib: Path | None, rows: int, length: int, passes: list[Pass], trust_remote_code: bool
) -> tuple[list[Tensor], str]:
    """Calibration rows in batches [B, S], and their digest; none where no pass needs them."""
    if not any(p.needs_data for p in passes):
        return [], ""
    ids = text.rows(text.tokenizer_of(folder, trust_remote_code=trust_remote_code), calib, count=rows, length=length)
    return list(ids.split(BATCH)), text.digest(ids)


def _require_fresh(program: Program, model: str) -> None:
    store: Any = program.store
    if store is None:
        raise MoeccError(f"{model}: no *.safetensors weights in this folder; give a complete checkpoint")
    store.check()
    if getattr(program.config, "quantization_config", None) is not None:
        raise MoeccError(f"{model} is compressed already; give the checkpoint it was made from")


def _check_ids(program: Program, batches: list[Tensor]) -> list[Tensor]:
    """Token ids for the reload check: of the calibration text, else evenly spread over the vocabulary."""
    if batches:
        return [batches[0][: CHECKED[0], : CHECKED[1]]]
    size = program.config.get_text_config().vocab_size
    return [(torch.arange(CHECKED[0] * CHECKED[1]) * 7919 % size).view(CHECKED)]


def versions() -> dict[str, str]:
    """Of everything that the bytes of an artifact depend on."""
    import transformers

    return {
        "moecc": moecc.__version__, "format": str(vq4.VERSION), "torch": torch.__version__,
        "transformers": transformers.__version__, "python": platform.python_version(),
    }  # fmt: skip


def _facts(job: Job, reports: list[pipeline.PassReport], ctx: Context) -> dict[str, Any]:
    # no times in here: the same job must give the same bytes
    return {
        "format": vq4.VERSION, "pipeline": job.passes, "seed": job.seed, "calibration_digest": job.calibration,
        "source": job.source, "source_digest": job.source_digest, "versions": job.versions, "backend": job.backend,
        "notes": ctx.notes, "passes": [{"pass": r.text, "bits": r.bits, "nodes": r.nodes, "error": r.error} for r in reports],
    }  # fmt: skip


def _dumper(folder: Path | None) -> Callable[[str, Program], None]:
    if folder is None:
        return lambda name, program: None
    folder.mkdir(parents=True, exist_ok=True)
    return lambda name, program: (folder / f"{name}.txt").write_text(program.text()) and None
