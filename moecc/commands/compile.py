"""`moecc compile`: read the passes, trace the model, run, write, reload, compare, rename.

Nothing is called done before the written folder has been loaded again and its logits compared with
the program's. Until then all of it lives in OUT.partial. All that is needed at the end is read or
tried before the first pass. A run that is stopped, by a signal or by a full disk or too little
memory, or whose code fails, leaves OUT.partial and goes on from it; a run that would fail again
removes it.
"""

from __future__ import annotations

import hashlib
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import moecc
from moecc.artifact import verify
from moecc.artifact.audit import plan
from moecc.artifact.draft import Draft, failure
from moecc.artifact.schema import number_experts, summary
from moecc.artifact.write import copy_small_files, write_artifact
from moecc.checkpoint.files import free_space
from moecc.checkpoint.low_bit import Decoded
from moecc.checkpoint.reading import read_json
from moecc.checkpoint.source import checkpoint_folder
from moecc.checkpoint.store import CheckpointStore
from moecc.commands.dump import Dump, finish
from moecc.commands.inspect import least_sizes
from moecc.commands.report import write_report
from moecc.commands.rows import longest, require_rows, rows_digest, token_rows, tokenizer_of
from moecc.errors import (
    Mendable,
    MoeccError,
    may_pass,
    naming,
    out_of_memory,
    too_little_memory,
)
from moecc.frontend.config import read_config, require_generation
from moecc.frontend.trace import trace
from moecc.ir import vq4
from moecc.ir.program import Program
from moecc.pipeline.device import device_called, kind_of, repeatable
from moecc.pipeline.journal import Journal, finished, has_work
from moecc.pipeline.order import groups, require_whole, resolve
from moecc.pipeline.pace import total
from moecc.pipeline.parse import parse_passes
from moecc.pipeline.passes import Context, Pass
from moecc.pipeline.plan import BATCH, planned
from moecc.pipeline.run import Hooks, PassReport, run_passes
from moecc.pipeline.workers.base import Workers
from moecc.pipeline.workers.choice import require_one, workers_for
from moecc.target import Target, emit, parse_target
from moecc.types import Json, Progress, Say

CHECKED = (2, 64)  # rows and tokens of the reload check


@dataclass(frozen=True)
class Job:
    """The identity of a run.

    Two runs with equal jobs on machines of a kind write the same bytes.
    """

    source: str
    source_digest: str
    passes: str
    pass_files: dict[str, str]  # SHA-256 of each file that a pass consists of or reads
    calibration: str
    seed: int
    threads: int  # the last bits of a sum depend on how threads split it
    backend: str
    versions: dict[str, str]
    machinery: str  # what of the machine the last bits depend on, by `Pass.machinery`

    def identity(self) -> Json:
        """What a resumed run must share.

        The digest tells what model it is, however it was typed; no pass depends on the backend. If
        a file of a pass has changed, the work ahead of the pass is still good.
        """
        left_out = ("source", "backend", "pass_files")
        return {k: v for k, v in vars(self).items() if k not in left_out}


def compile_model(
    model: str,
    passes: str,
    out: Path,
    *,
    bits: float | None = None,
    calib: Path | Sequence[Path] | None = None,
    rows: int = 64,
    length: int = 512,
    backend: str | None = None,
    seed: int = 0,
    dump: Path | None = None,
    trust_remote_code: bool = False,
    workers: int | None = None,
    ray: str | None = None,
    max_memory: int | None = None,
    device: str = "cpu",
    progress: Progress = lambda items, label: items,
    say: Say = print,
) -> Json:
    """Compile `model` (folder or hub id) with the pipeline `passes` into the new folder `out`.

    bits: the default of every pass option called bits. calib: text files (`texts`), by default
    text that comes with Python; rows x length of their tokens are taken. backend: a target whose
    form is written too. dump: a folder for the program's text after every pass. workers: processes
    that code experts, by default as many as cores and memory allow; ray: the address of a Ray
    cluster that codes them, or "local". Neither changes a byte. max_memory: bytes that all
    processes together may take. device: what computes, by `device_called`. Return a summary of what
    was written. Raise MoeccError, in one line and with nothing left behind, for bad input. If the
    machine or code fails instead, finished work stays and the line says so.
    """
    where = device_called(device)
    require_one(workers, ray, where)
    with Draft(out, "partial", partial(finish, dump, out)) as draft, _outlived(draft, say):
        texts = Dump(dump, out, draft.folder)
        target = None if backend is None else parse_target(backend)
        resolved = _pipeline(passes, bits, say)
        files = [_pass_files(group) for group in groups(resolved)]
        read_config(folder := checkpoint_folder(model))  # broken, it looks like a broken tokenizer
        config = read_json(folder / "config.json")
        require_generation(folder)
        draft.start()
        copy_small_files(folder, draft.output, say)
        ids = _calibration(folder, calib, rows, length, resolved, trust_remote_code)
        say(f"tracing {model}")
        program = replace(trace(folder, dtype=torch.float32), device=where)
        digest = _require_fresh(program, model, say)
        number_experts(program, folder)
        if ids is not None:
            require_rows(program, ids)
        if target is not None:
            with naming(target):
                target.check(folder)
        if program.restriction:
            say(f"note: the trace holds for {program.restriction} only")
        job = Job(
            source=str(model),
            source_digest=digest,
            passes=",".join(map(str, resolved)),
            pass_files={f: digest for group in files for f, digest in group.items()},
            calibration="" if ids is None else rows_digest(ids),
            seed=seed,
            threads=torch.get_num_threads(),
            backend="" if target is None else str(target),
            versions=versions(),
            machinery=_machinery(resolved, where),
        )
        batches = [] if ids is None else list(ids.split(BATCH))
        tokens, row = sum(b.numel() for b in batches), batches[0].numel() if batches else 0
        intended = planned(program, resolved, tokens, row, workers=workers, most=max_memory)
        for line in intended.lines(resolved, torch.get_num_threads()):
            say(line)
        those = workers_for(intended.workers, ray, where, memory=intended.worker, say=say)
        with repeatable(where), those:
            run = _Run(
                job,
                folder,
                program,
                resolved,
                files,
                batches,
                target,
                config,
                draft,
                texts,
                those,
                intended.spare,
                None if max_memory is None else intended.left(max_memory),
                progress,
                say,
            )
            return run.run()


@contextmanager
def _outlived(draft: Draft, say: Say) -> Iterator[None]:
    """Keep what is finished if the run can go on after it failed inside, and say so.

    Otherwise remove what this run has made.
    """
    before = has_work(draft.journal)  # of a run that was stopped
    try:
        yield
    except BaseException as error:
        stopped = not isinstance(error, Exception)
        when, kept = _when_again(error), ""
        if not has_work(draft.journal) or draft.is_over():  # killed after its last step
            draft.remove()
        elif when is not None:
            stages = finished(draft.journal)
            what = f"{stages} finished stages are" if stages else "what is finished is"
            kept = f"{what} kept in {draft.folder}: run the same command again{when} to go on"
        elif not before:
            draft.remove()
        said = None if stopped else _one_line(draft, error)
        if kept and said is None:
            with suppress(OSError):
                say(f"note: {kept}")
        if said is None or (not kept and isinstance(error, MoeccError)):
            raise
        raise MoeccError(f"{said}; {kept}" if kept else said) from error


def _when_again(error: BaseException) -> str | None:
    """Return when the same command can succeed: as it is (""), once mended, or never (None)."""
    if not isinstance(error, Exception) or may_pass(error):
        return ""
    fault = isinstance(error, Mendable) or not isinstance(error, MoeccError)
    return ", once this is mended," if fault else None


def _one_line(draft: Draft, error: BaseException) -> str | None:
    """Return the line for a failure of the input or the machine, None for any other error."""
    if isinstance(error, MoeccError):
        return str(error)
    if out_of_memory(error):
        return f"{draft.out} was not finished: {too_little_memory(error)}"
    if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
        return failure(draft.out, draft.folder, error)
    return None


@dataclass
class _Run:
    """One compilation, from the traced program to the finished folder."""

    job: Job
    source: Path  # its folder
    program: Program
    passes: list[Pass]
    files: list[dict[str, str]]  # of each group of passes, with their digests
    batches: list[Tensor]
    target: Target | None
    config: Json  # config.json of the source
    draft: Draft
    texts: Dump
    workers: Workers
    spare: int  # bytes beyond the plan's
    left: int | None  # bytes for the check of what was written; None: what is free
    progress: Progress
    say: Say
    start: float = field(default_factory=time.perf_counter)

    def require_space(self) -> None:
        """Raise MoeccError if the disk is too small for the result: now, not hours later."""
        held = sum(f.stat().st_size for f in self.draft.journal.rglob("*") if f.is_file())
        artifact, journal = least_sizes(self.program, self.passes)
        needed = artifact.nbytes + journal - held
        if self.target is not None:
            with naming(self.target):
                needed += self.target.least_bytes(self.source, artifact)
        free_space(self.draft.folder, needed)

    def run(self) -> Json:
        """Run the passes, write the folder, load it again and compare; return the summary.

        Raise Mendable if a pass of the user's own, or what it reads, may be why it fails.
        """
        try:
            return self._run()
        except MoeccError as error:
            if not self.job.pass_files:
                raise
            raise Mendable(str(error)) from error

    def _run(self) -> Json:
        self.require_space()
        journal = Journal(self.draft.journal, self.job.identity(), self.say, self.files)
        ctx = Context(
            seed=self.job.seed,
            progress=self.progress,
            keep=journal.keep,
            kept=journal.kept,
            forget=journal.forget,
            spare=self.spare,
            workers=self.workers,
        )
        if journal.found:
            done = f"{finished(journal.folder)} stages of it are finished"
            self.say(f"going on with the run that {self.draft.folder} holds; {done}")
        self.texts.start(resumes=journal.found)
        self.texts.write("00-traced", self.program, None)
        hooks = Hooks(
            before_group=journal.begin,
            after_pass=lambda report, now: self.say(report.line()),
            after_layer=journal.save,
            restore_layer=journal.restore,
            dump=self.texts.write,
            say=self.say,
        )
        reports = run_passes(self.program, self.passes, ctx, self.batches, hooks)
        result = self.write(ctx, reports)
        self.require_same_source()
        self.draft.finish()
        self.say(total(self.start, self.program.device))
        return result

    def require_same_source(self) -> None:
        """Raise MoeccError if a weight file has changed since the run began: layers would mix."""
        assert self.program.store is not None
        if self.program.store.digest() != self.job.source_digest:
            raise MoeccError(f"{self.job.source} was changed during the run; run again")

    def write(self, ctx: Context, reports: list[PassReport]) -> Json:
        """Write the output, check it, and return its summary."""
        assert ctx.traced is not None
        planned = plan(self.program, ctx.traced, ctx)
        for note in ctx.notes:
            self.say(f"note: {note}")
        artifact, facts = self.draft.output, self.facts(ctx, reports)
        rows = write_artifact(artifact, planned, self.program, self.config, facts, self.progress)
        check = verify.reload_and_compare(artifact, self.program, self.check_ids(), self.left)
        self.say(check.line())
        lowered = None if self.target is None else _lower(self.target, artifact, self.say)
        write_report(artifact, facts, rows)
        return {
            "out": str(self.draft.out),
            "passes": self.job.passes,
            **summary(rows),
            "reload_difference": check.difference,
            "reloaded_by": check.loaded_by,
            "notes": ctx.notes,
            "backend": lowered,
        }

    def facts(self, ctx: Context, reports: list[PassReport]) -> Json:
        """Return what moecc.json says besides the audit.

        It holds no times: the same job must give the same bytes.
        """
        told = vars(self.job) | {"pipeline": self.job.passes}
        told["calibration_digest"] = told.pop("calibration")
        passes = [
            {
                "pass": r.text,
                "bits": r.bits,
                "nodes": r.nodes,
                "in_sample_error": r.in_sample_error,
            }
            for r in reports
        ]
        kept = {path: list(rows) for path, rows in self.program.kept.items()}
        facts = told | {"format": vq4.VERSION, "notes": ctx.notes, "passes": passes}
        return facts | ({"experts_kept": kept} if kept else {})

    def check_ids(self) -> list[Tensor]:
        """Return token ids for the reload check.

        They are the calibration text's, or evenly spread over the vocabulary.
        """
        rows, length = CHECKED
        if self.batches:
            return [self.batches[0][:rows, :length]]
        size = self.program.config.get_text_config().vocab_size
        length = min(length, longest(self.program))
        return [(torch.arange(rows * length) * 7919 % size).view(rows, length)]


def _lower(target: Target, artifact: Path, say: Say) -> Json:
    """Write the artifact in the form of `target` into a folder of its own; return what it is."""
    try:
        emitted = emit(target, artifact, artifact / target.name, say)
    except MoeccError as error:
        advice = "all passes are done, so --backend may be left out or be another"
        raise Mendable(f"{error}; {advice}") from error
    files = [] if emitted.out is None else sorted(emitted.out.rglob("*"))
    return {
        "name": target.name,
        "target": str(target),
        "files": [f.relative_to(artifact).as_posix() for f in files if f.is_file()],
        **emitted.facts,
    }


def _pipeline(passes: str, bits: float | None, say: Say) -> list[Pass]:
    """Return the passes in the order in which they run; say the order, and remarks on it."""
    parsed, remarks = parse_passes(passes, bits=bits)
    resolved, more = resolve(parsed)
    require_whole(resolved)
    for remark in (*remarks, *more):
        say(remark)
    say("pipeline: " + ",".join(map(str, resolved)))
    return resolved


def _machinery(passes: Sequence[Pass], device: torch.device) -> str:
    found = {kind_of(device), *(p.machinery(device) for p in passes)}
    return ", ".join(sorted(found - {""}))


def _calibration(
    folder: Path,
    calib: Path | Sequence[Path] | None,
    rows: int,
    length: int,
    passes: list[Pass],
    trust_remote_code: bool,
) -> Tensor | None:
    """Return calibration token ids, i64 [rows, length]; None if no pass needs them."""
    if not any(p.needs_data for p in passes):
        return None
    tokenizer = tokenizer_of(folder, trust_remote_code=trust_remote_code)
    return token_rows(tokenizer, calib, count=rows, length=length)


def _require_fresh(program: Program, model: str, say: Say) -> str:
    """Return the source's digest.

    Raise MoeccError if its weights do not fit, or moecc has compressed them.
    """
    store = program.store
    assert store is not None
    store.check()
    if getattr(program.config, "quantization_config", None) is not None:
        raise MoeccError(f"{model} is compressed already; give the checkpoint it was made from")
    entries = store.entries if isinstance(store, CheckpointStore) else {}
    for note in store.notes if isinstance(store, CheckpointStore) else []:
        say(f"note: {model}: {note}")
    if packed := [name for name, entry in entries.items() if isinstance(entry, Decoded)]:
        what = f"{len(packed)} tensors of {model} are stored in 8 or 4 bits and read as bfloat16"
        say(f"note: {what}, e.g. {packed[0]!r}")
    if store.unexpected:
        left = f"{len(store.unexpected)} tensors of {model} fit nothing in the model"
        say(f"note: {left} and are left out, e.g. {store.unexpected[0]!r}")
    return store.digest()


def _pass_files(passes: list[Pass]) -> dict[str, str]:
    files: list[Path] = []
    for p in passes:
        with naming(p):
            files += p.files()
    missing = next((f for f in files if not f.is_file()), None)
    if missing is not None:
        raise MoeccError(f"no file {missing}, which a pass needs; check its path")
    return {str(f): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def versions() -> dict[str, str]:
    """Return the versions of everything that the bytes of an artifact depend on."""
    import transformers

    return {
        "moecc": moecc.__version__,
        "format": str(vq4.VERSION),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
