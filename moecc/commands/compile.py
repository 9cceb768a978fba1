"""`moecc compile`, whole: read the passes, trace the model, run the passes layer by layer, write, reload, compare, rename.

Nothing is called done before the written folder has been loaded again and its logits compared with the program's. Until then all
of it lives in OUT.partial; a run that is killed leaves that folder and goes on from it, a run that fails removes it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import moecc
from moecc.artifact import verify
from moecc.artifact.audit import plan
from moecc.artifact.schema import summary
from moecc.artifact.write import write_artifact
from moecc.checkpoint.files import free_space
from moecc.checkpoint.low_bit import Decoded
from moecc.checkpoint.source import checkpoint_folder
from moecc.commands.inspect import least_bytes
from moecc.commands.rows import longest, require_rows, rows_digest, token_rows, tokenizer_of
from moecc.errors import MoeccError
from moecc.frontend.config import read_config
from moecc.frontend.trace import trace
from moecc.ir import vq4
from moecc.ir.program import Program
from moecc.pipeline.journal import Busy, Journal
from moecc.pipeline.order import require_whole, resolve
from moecc.pipeline.parse import parse_passes
from moecc.pipeline.passes import Context, Pass
from moecc.pipeline.run import Hooks, PassReport, run_passes
from moecc.target import Target, parse_target
from moecc.types import Progress

BATCH = 2  # calibration rows that go through a layer together
CHECKED = (2, 64)  # rows and tokens of the reload check


@dataclass(frozen=True)
class Job:
    """What a run is; two runs with equal jobs on machines of a kind write the same bytes."""

    source: str
    source_digest: str
    passes: str
    pass_files: dict[str, str]  # SHA-256 of each pass of one's own, and of what passes read
    calibration: str
    seed: int
    threads: int  # how sums are split among threads is in their last bits
    backend: str
    versions: dict[str, str]


def compile_model(
    model: str, passes: str, out: Path, *, bits: float | None = None, calib: Path | None = None, rows: int = 64, length: int = 512,
    backend: str | None = None, seed: int = 0, dump: Path | None = None, trust_remote_code: bool = False,
    progress: Progress = lambda items, label: items, say: Callable[[str], None] = print,
) -> dict[str, Any]:  # fmt: skip
    """Compile `model` (folder or hub id) with the pipeline text `passes` into the new folder `out`; a summary of what was written.

    calib: text file (by default text that comes with Python); rows x length: calibration tokens. MoeccError for bad input, in one
    line, with nothing left behind.
    """
    partial = _partial_of(out)
    _require_dump(dump, resumes=(partial / "journal").is_dir())
    target = None if backend is None else parse_target(backend)
    resolved = _pipeline(passes, bits, say)
    folder = checkpoint_folder(model)
    read_config(folder)  # a broken one would look like a broken tokenizer
    batches, calibration = _calibration(folder, calib, rows, length, resolved, trust_remote_code)
    say(f"tracing {model}")
    program = trace(folder, dtype=torch.float32)
    _require_fresh(program, model, say)
    if batches:
        require_rows(program, torch.cat(batches))
    if program.restriction:
        say(f"note: the trace holds for {program.restriction} only")
    store: Any = program.store
    job = Job(
        str(model), store.digest(), ",".join(map(str, resolved)), _pass_files(resolved), calibration, seed,
        torch.get_num_threads(), "" if target is None else str(target), versions(),
    )  # fmt: skip
    if _is_empty(partial):  # of a run that was killed at its first step or its last
        partial.rmdir()
    made = [p for p in (partial, *partial.parents) if not p.exists()]
    journal = None
    try:
        held = sum(
            f.stat().st_size for f in partial.rglob("*") if f.is_file()
        )  # by a run that goes on
        free_space(
            partial, least_bytes(program, resolved) - held
        )  # a full disk is better met now than later
        same = {
            k: v for k, v in vars(job).items() if k != "source"
        }  # its digest tells; it may be typed another way
        journal = Journal(partial / "journal", same)
        result = _run(
            program, resolved, batches, job, target, journal, partial, folder, dump, progress, say
        )
        (partial / "artifact").rename(out)
        journal.remove()
        shutil.rmtree(partial, ignore_errors=True)
        return result
    except Exception as e:
        if not isinstance(e, Busy):
            _remove(made, partial)
        if not isinstance(e, OSError):
            raise
        raise MoeccError(
            f"writing {e.filename or out} failed: {e.strerror or e}; make room or choose another place"
        ) from e
    finally:  # where it is interrupted too, and goes on in the same process
        if journal is not None:
            journal.close()


def _partial_of(out: Path) -> Path:
    """The folder that `out` lives in until it is done; MoeccError, before any work, where either can't be made."""
    if os.path.lexists(out):
        raise MoeccError(f"{out} exists; choose another output folder or remove it")
    partial = out.with_name(out.name + ".partial")
    if os.path.lexists(partial) and not (partial / "journal").is_dir() and not _is_empty(partial):
        raise MoeccError(
            f"{partial} is there and holds no interrupted run; move it away or choose another output folder"
        )
    above = next(p for p in out.absolute().parents if os.path.lexists(p))
    if not above.is_dir():
        raise MoeccError(
            f"{out} can't be made: {above} is not a folder; choose another output folder"
        )
    if not os.access(above, os.W_OK | os.X_OK):
        raise MoeccError(
            f"{out} can't be made: no permission to write in {above}; choose another output folder"
        )
    return partial


def _is_empty(folder: Path) -> bool:
    return folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir())


def _require_dump(dump: Path | None, *, resumes: bool) -> None:
    """Texts of two runs in one folder could not be told apart; only a run that goes on adds to its own."""
    if dump is None or not os.path.lexists(dump):
        return
    if not dump.is_dir():
        raise MoeccError(f"--dump {dump} is a file; give a folder for the texts")
    if any(dump.iterdir()) and not resumes:
        raise MoeccError(f"--dump {dump} is not empty; give a new folder for the texts")


def _remove(made: list[Path], partial: Path) -> None:
    """Remove what this run has made, and nothing that was there before or that another run put beside it."""
    for folder in made:  # the innermost first
        if folder == partial:
            shutil.rmtree(folder, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):  # not empty
                folder.rmdir()


def _run(
    program: Program, resolved: list[Pass], batches: list[Tensor], job: Job, target: Target | None, journal: Journal,
    partial: Path, folder: Path,
    dump: Path | None, progress: Progress, say: Callable[[str], None],
) -> dict[str, Any]:  # fmt: skip
    ctx = Context(seed=job.seed, progress=progress, keep=journal.keep, kept=journal.kept)
    if journal.found:
        done_before = f"{journal.finished()} stages of it are finished"
        say(f"going on with the run that {journal.folder.parent} holds; {done_before}")
    dumper = _dumper(dump)
    dumper("00-traced", program, None)
    hooks = Hooks(
        after_pass=lambda report, now: say(report.line()), after_layer=journal.save, restore_layer=journal.restore, dump=dumper
    )  # fmt: skip
    reports = run_passes(program, resolved, ctx, batches, hooks)
    assert ctx.traced is not None
    planned = plan(program, ctx.traced, ctx)
    for note in ctx.notes:
        say(f"note: {note}")
    made = partial / "artifact"
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir(parents=True)
    facts = _facts(job, reports, ctx)
    rows = write_artifact(made, planned, program, folder, facts, progress)
    check = verify.reload_and_compare(made, program, _check_ids(program, batches))
    say(check.line())
    lowered = None if target is None else _lower(target, made, say)
    from moecc.commands.report import write_report

    write_report(made, facts, rows)
    return {
        "out": str(partial.with_name(partial.name.removesuffix(".partial"))), "passes": job.passes, **summary(rows),
        "reload_difference": check.difference, "reloaded_by": check.loaded_by, "notes": ctx.notes, "backend": lowered,
    }  # fmt: skip


def _lower(target: Target, artifact: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Write the artifact in the form of `target` into a folder of its own in it; what was written."""
    emitted = target.emit(artifact, artifact / target.name, say)
    files = [] if emitted.out is None else sorted(emitted.out.rglob("*"))
    return {
        "name": target.name,
        "target": str(target),
        "files": [f.relative_to(artifact).as_posix() for f in files if f.is_file()],
        **emitted.facts,
    }


def _pipeline(passes: str, bits: float | None, say: Callable[[str], None]) -> list[Pass]:
    parsed, remarks = parse_passes(passes, bits=bits)
    resolved, more = resolve(parsed)
    require_whole(resolved)
    for remark in (*remarks, *more):
        say(remark)
    say("pipeline: " + ",".join(map(str, resolved)))
    return resolved


def _calibration(
    folder: Path,
    calib: Path | None,
    rows: int,
    length: int,
    passes: list[Pass],
    trust_remote_code: bool,
) -> tuple[list[Tensor], str]:
    """Calibration rows in batches [B, S], and their digest; none where no pass needs them."""
    if not any(p.needs_data for p in passes):
        return [], ""
    ids = token_rows(
        tokenizer_of(folder, trust_remote_code=trust_remote_code), calib, count=rows, length=length
    )
    return list(ids.split(BATCH)), rows_digest(ids)


def _require_fresh(program: Program, model: str, say: Callable[[str], None]) -> None:
    store: Any = program.store
    if store is None:
        raise MoeccError(
            f"{model}: no *.safetensors weights in this folder; give a complete checkpoint"
        )
    store.check()
    if getattr(program.config, "quantization_config", None) is not None:
        raise MoeccError(f"{model} is compressed already; give the checkpoint it was made from")
    if packed := [
        name for name, entry in getattr(store, "entries", {}).items() if isinstance(entry, Decoded)
    ]:
        say(
            f"note: {len(packed)} tensors of {model} are stored in 8 or 4 bits and read as bfloat16, e.g. {packed[0]!r}"
        )
    if store.unexpected:
        left = f"{len(store.unexpected)} tensors of {model} fit nothing in the model"
        say(f"note: {left} and are left out, e.g. {store.unexpected[0]!r}")


def _check_ids(program: Program, batches: list[Tensor]) -> list[Tensor]:
    """Token ids for the reload check: of the calibration text, else evenly spread over the vocabulary."""
    if batches:
        return [batches[0][: CHECKED[0], : CHECKED[1]]]
    size = program.config.get_text_config().vocab_size
    rows, length = CHECKED[0], min(CHECKED[1], longest(program))
    return [(torch.arange(rows * length) * 7919 % size).view(rows, length)]


def _pass_files(passes: list[Pass]) -> dict[str, str]:
    files = [file for p in passes for file in p.files()]
    missing = next((f for f in files if not f.is_file()), None)
    if missing is not None:
        raise MoeccError(f"no file {missing}, which a pass needs; check its path")
    return {str(f): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def versions() -> dict[str, str]:
    """Of everything that the bytes of an artifact depend on."""
    import transformers

    return {
        "moecc": moecc.__version__, "format": str(vq4.VERSION), "torch": torch.__version__,
        "transformers": transformers.__version__, "python": platform.python_version(),
    }  # fmt: skip


def _facts(job: Job, reports: list[PassReport], ctx: Context) -> dict[str, Any]:
    # no times in here: the same job must give the same bytes
    return {
        "format": vq4.VERSION, "pipeline": job.passes, "pass_files": job.pass_files,
        "seed": job.seed, "threads": job.threads, "calibration_digest": job.calibration,
        "source": job.source, "source_digest": job.source_digest, "versions": job.versions, "backend": job.backend,
        "notes": ctx.notes, "passes": [{"pass": r.text, "bits": r.bits, "nodes": r.nodes, "error": r.error} for r in reports],
    }  # fmt: skip


def _dumper(folder: Path | None) -> Callable[[str, Program, int | None], None]:
    if folder is None:
        return lambda name, program, stage: None
    folder.mkdir(parents=True, exist_ok=True)

    def write(name: str, program: Program, stage: int | None) -> None:
        (folder / f"{name}.txt").write_text(program.text(stage))

    return write
