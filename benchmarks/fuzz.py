"""Change everything that moecc reads, by a seed: is each input refused in a sentence, or right?

    python benchmarks/fuzz.py                                  20 000 inputs; the table to
                                                               benchmarks/results/fuzz.md
    python benchmarks/fuzz.py --minutes 2 --only header ops    not longer, and of these targets
    python benchmarks/fuzz.py --replay out/fuzz/header-0-17.json

An input is a changed file or command line (`_fuzz_inputs.py`). It runs in a forked process that has
all imports already (`_fuzz_run.py`), and ends well in two ways: with exit code 2, one printable
sentence and nothing written, or with success. A journal has to give the bytes of an undisturbed run
too. Everything else is a fault: a traceback, another exit code, a signal, more than 10 s of one
core, more than 1 GiB of memory, a half-written output, a control character on the terminal. A fault
is written to --keep as a case that --replay runs again, and the exit code is 1.

The ops of the ONNX library run under address and undefined-behaviour sanitizers (`_fuzz_ops.py`).
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

# Before anything imports torch, transformers or tokenizers: forked processes have one thread, and
# nothing is asked of the network.
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import pytest
import torch
from _fuzz_inputs import DRAWS
from _fuzz_ops import OpsRunner
from _fuzz_ops import draw as draw_ops
from _fuzz_run import Case, Outcome
from _fuzz_stage import Stage
from _mutate import Mutator

from moecc import cli

ROOT = Path(__file__).resolve().parent.parent
TARGETS = {**DRAWS, "ops": (draw_ops, 75)}
_KEPT = 3  # cases that are kept of one kind of fault


@dataclass
class Row:
    """The counts of one target."""

    refused: int = 0
    succeeded: int = 0
    failed: int = 0
    seconds: float = 0.0
    slowest: float = 0.0
    bytes: int = 0

    @property
    def inputs(self) -> int:
        return self.refused + self.succeeded + self.failed

    def add(self, found: Outcome) -> None:
        self.failed += bool(found.fault)
        self.refused += not found.fault and found.code == 2
        self.succeeded += not found.fault and found.code != 2
        self.seconds += found.seconds
        self.slowest = max(self.slowest, found.seconds)
        self.bytes = max(self.bytes, found.bytes)

    def cells(self, name: str) -> list[str]:
        counts = (self.inputs, self.refused, self.succeeded, self.failed)
        each = 1e3 * self.seconds / max(self.inputs, 1)
        figures = (f"{each:.0f}", f"{self.slowest:.1f}", f"{self.bytes / 1e6:.0f}")
        return [name, *map(str, counts), *figures]


@dataclass
class Fuzzer:
    """Draws inputs, runs them, and keeps the faults in the folder `keep`."""

    stage: Stage
    seed: int
    keep: Path
    rows: dict[str, Row] = field(default_factory=lambda: defaultdict(Row))
    faults: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._ops = OpsRunner(self.stage.folder)

    def draw(self, target: str, number: int) -> Case:
        """Return the input of a target that the seed gives this number."""
        return TARGETS[target][0](Mutator(f"{self.seed} {target} {number}"), self.stage)

    def run(self, case: Case, debug: bool = False) -> Outcome:
        runner = self._ops if case.command[:1] == ["ops"] else self.stage.runner
        return runner.run(case, debug)

    def judge(self, target: str, number: int) -> None:
        """Run an input and count how it ends; keep it if it is a fault."""
        case = self.draw(target, number)
        found = self.run(case)
        self.rows[target].add(found)
        if found.fault:
            self._keep(case, found, f"{target}-{self.seed}-{number}.json")

    def _keep(self, case: Case, found: Outcome, name: str) -> None:
        seen = self.run(case, debug=True)
        alone = "" if seen.fault else " (only after other inputs)"
        kind = f"{case.target}: {found.fault}{alone}: {_kind(seen.said)}"
        self.faults[kind] += 1
        if self.faults[kind] > _KEPT:
            return
        self.keep.mkdir(parents=True, exist_ok=True)
        (self.keep / name).write_text(case.dumps(self.stage.folder), encoding="utf-8")
        shown = self.keep.resolve() / name
        shown = shown.relative_to(Path.cwd()) if shown.is_relative_to(Path.cwd()) else shown
        say(f"\n{case.target}: {found.fault}\n  {case.line()[:200]}\n{_tail(seen.said)}")
        say(f"  python benchmarks/fuzz.py --replay {shown}")

    def close(self) -> None:
        self._ops.close()
        self.stage.runner.close()


def _kind(said: str) -> str:
    """Return the place in the sources that an error came from, and its text without names."""
    places = re.findall(r'File "[^"]*/(\w+/\w+\.py)", line (\d+)', said)
    last = said.strip().splitlines()[-1:] or [""]
    text = re.sub(r"[0-9]+|\"[^\"]*\"|'[^']*'", "", last[0])[:80]
    return f"{':'.join(places[-1]) if places else ''} {text}".strip()


def _tail(said: str) -> str:
    lines = said.strip().splitlines()[-12:]
    return "\n".join(f"    {ascii(line)[1:-1][:200]}" for line in lines)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def schedule(targets: Sequence[str]) -> Iterator[tuple[str, int]]:
    """Yield (target, number of the input) without end, each target as often as its share says."""
    shares = {t: TARGETS[t][1] for t in targets}
    total, made = sum(shares.values()), dict.fromkeys(targets, 0)
    for n in range(sys.maxsize):
        target = max(targets, key=lambda t: (n + 1) * shares[t] / total - made[t])
        yield target, made[target]
        made[target] += 1


def fuzz(fuzzer: Fuzzer, targets: Sequence[str], inputs: int, minutes: float) -> None:
    """Run `inputs` inputs, or as many as fit in the minutes; say how far it is now and then."""
    start = said = time.monotonic()
    end = start + 60 * minutes
    for n, (target, number) in enumerate(schedule(targets)):
        now = time.monotonic()
        if n == inputs or now > end:
            break
        if now - said > 10:
            said = now
            left = min((now - start) / n * (inputs - n), end - now) if n else end - now
            failed = sum(row.failed for row in fuzzer.rows.values())
            say(f"{n} inputs, {failed} failed, {left / 60:.1f} minutes left")
        fuzzer.judge(target, number)


def table(rows: dict[str, Row]) -> str:
    """Return the counts as a table in Markdown."""
    total = Row()
    for row in rows.values():
        for name in ("refused", "succeeded", "failed", "seconds"):
            setattr(total, name, getattr(total, name) + getattr(row, name))
        total.slowest, total.bytes = max(total.slowest, row.slowest), max(total.bytes, row.bytes)
    head = ["target", "inputs", "refused", "succeeded", "failed"]
    head += ["ms each", "slowest s", "most memory MB"]
    lines = [head, ["---"] * len(head)]
    lines += [rows[name].cells(name) for name in TARGETS if name in rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [*lines, total.cells("all")])


def document(fuzzer: Fuzzer, minutes: float) -> str:
    """Return the page of results."""
    core = sum(row.seconds for row in fuzzer.rows.values())
    lines = [
        "# Changed inputs",
        "",
        f"Made by `python benchmarks/fuzz.py --seed {fuzzer.seed}` in {minutes:.0f} minutes; the "
        f"inputs took {core / 60:.0f} minutes of one core. What an input is and how it may end is "
        "said there. Times are those of one core, memory is what an input took beyond the "
        "process it started in.",
        "",
        table(fuzzer.rows),
        "",
        *(f"- {count} x {kind}" for kind, count in fuzzer.faults.most_common()),
    ]
    return "\n".join(lines).rstrip() + "\n"


def replay(fuzzer: Fuzzer, files: Sequence[Path]) -> int:
    """Run cases that were kept; return 1 if one of them still fails."""
    failed = 0
    for file in files:
        case = Case.loads(file.read_text(encoding="utf-8"), fuzzer.stage.folder)
        fuzzer.stage.need(*(part.partition(":")[0] for part in case.parts))
        if case.result:
            fuzzer.stage.need(case.result)
        case = Case.loads(file.read_text(encoding="utf-8"), fuzzer.stage.folder)
        found = fuzzer.run(case)
        say(f"{file}: {found.fault or 'as it should'} ({found.code}, {found.seconds:.1f} s)")
        say(f"  {case.line()[:500]}\n{_tail(found.said)}")
        failed |= bool(found.fault)
    return failed


def options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--inputs", type=int, default=20_000, help="(default: 20000)")
    parser.add_argument("--minutes", type=float, default=1e9, help="at most (default: any)")
    parser.add_argument("--seed", type=int, default=0, help="(default: 0)")
    parser.add_argument("--only", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--replay", nargs="+", type=Path, help="run cases that were kept")
    parser.add_argument("--keep", type=Path, default=ROOT / "out" / "fuzz", help="for faults")
    parser.add_argument(
        "--out", type=Path, help="(default: benchmarks/results/fuzz.md if all targets ran)"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = options(argv)
    torch.set_num_threads(1)
    start = time.monotonic()
    with (
        tempfile.TemporaryDirectory(prefix="moecc-fuzz-") as place,
        pytest.MonkeyPatch.context() as patch,
        cli._quiet(debug=False),
    ):
        fuzzer = Fuzzer(Stage(Path(place), patch), args.seed, args.keep)
        try:
            if args.replay:
                return replay(fuzzer, args.replay)
            fuzz(fuzzer, args.only, args.inputs, args.minutes)
        finally:
            fuzzer.close()
        page = document(fuzzer, (time.monotonic() - start) / 60)
    everything = set(args.only) == set(TARGETS)
    out = args.out or (ROOT / "benchmarks" / "results" / "fuzz.md" if everything else None)
    if out:
        out.write_text(page, encoding="utf-8")
    print(page)
    return int(bool(fuzzer.faults))


if __name__ == "__main__":
    raise SystemExit(main())
