"""Commands that are killed or refused and run again: what soak.py plays, and what it demands.

A case copies its input into a new folder (the box), runs a command there once per fault, then runs
it undisturbed. The box must end as that of an undisturbed run: the same bytes in every file,
nothing of the user's changed, nothing left over. After every fault it must hold all that the user
had, and either no result or all of it; a run that is refused keeps the stages that it finished.
"""

from __future__ import annotations

import errno
import hashlib
import random
import shutil
import signal
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from _faults import Fault
from _runs import LONGEST, STREAMS, UNDISTURBED, Case, Ended, Runner, Scenario

Content = dict[str, str]  # path -> digest of a file, "" of a folder

NOT_OURS = ("tmp/.ses",)  # onnxruntime's
REPLACED = "note: a worker was ended by SIGKILL"
KILLED = {"moment": -signal.SIGKILL, "write": -signal.SIGKILL, "bytes": -signal.SIGXFSZ}


@dataclass(frozen=True)
class Whole:
    """An undisturbed run: what it leaves, and what faults are drawn from."""

    ended: Ended
    content: Content
    largest: int  # bytes of a file that it makes


@dataclass
class Played:
    """What became of a case."""

    case: Case
    met: list[Fault] = field(default_factory=list)  # faults that changed how a run ended
    ends: list[Ended] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


def content(folder: Path) -> Content:
    """Return what lies in a folder, at any depth."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name in NOT_OURS:
            continue
        whole = path.is_file() and not path.is_symlink()
        found[name] = hashlib.sha256(path.read_bytes()).hexdigest() if whole else ""
    return found


def differences(want: Content, found: Content) -> list[str]:
    """Return in words how what was found differs from what should be there."""
    lost = [f"{name} is missing" for name in want.keys() - found.keys()]
    more = [f"{name} is left over" for name in found.keys() - want.keys()]
    other = [f"{n} has other bytes" for n in want.keys() & found.keys() if want[n] != found[n]]
    return sorted([*lost, *more, *other])


def measure(scenario: Scenario, runner: Runner) -> Whole:
    """Run a scenario undisturbed. Raise SystemExit, with what it says, if it fails."""
    box = _boxed(scenario, runner.work / "whole")
    given, ended = content(box), runner.run(Case("", scenario), box, UNDISTURBED)
    if ended.code:
        raise SystemExit(f"{scenario.name} fails undisturbed:\n{ended.errors}")
    found = content(box)
    sizes = [(box / name).stat().st_size for name in found.keys() - given.keys() if found[name]]
    shutil.rmtree(box)
    return Whole(ended, found, max(sizes))


def play(case: Case, whole: Whole, runner: Runner) -> Played:
    """Play a case; its box stays if anything is wrong."""
    box = _boxed(case.scenario, (case.disk.folder if case.disk else runner.work) / case.key)
    given, played = content(box), Played(case)
    for fault in case.faults:
        if _step(played, fault, box, given, whole, runner) == 0 or case.scenario.made(box):
            break
    if differences(whole.content, content(box)):
        _step(played, UNDISTURBED, box, given, whole, runner)
        played.wrong += differences(whole.content, content(box))
    if not played.wrong:
        shutil.rmtree(box)
    return played


def _boxed(scenario: Scenario, box: Path) -> Path:
    """Make a box: the input, and more of the user's beside what will be made."""
    shutil.copytree(scenario.inputs, box)
    (box / "tmp").mkdir()
    (box / f"{scenario.out}.old").mkdir(parents=True)
    (box / f"{scenario.out}.old" / "notes.txt").write_text("mine", encoding="utf-8")
    (box / f"{scenario.out}.txt").write_text("mine", encoding="utf-8")
    return box


def _step(
    played: Played, fault: Fault, box: Path, given: Content, whole: Whole, runner: Runner
) -> int:
    """Run the command once and note what is wrong afterwards; return the exit code."""
    case, scenario = played.case, played.case.scenario
    made, before = scenario.made(box), _stages(scenario, box)
    with case.disk.failing(fault) if case.disk else nullcontext():
        ended = runner.run(case, box, fault)
    played.ends.append(ended)
    if fault != UNDISTURBED and (ended.code or fault.kind in STREAMS or REPLACED in ended.errors):
        played.met.append(fault)
    wrong, now = _misbehaviour(fault, ended, made), content(box)
    wrong += [line for line in differences(given, now) if not line.endswith("left over")]
    if scenario.made(box):
        wrong += differences(_within(scenario, whole.content), _within(scenario, now))
    if not made:
        kept = None if scenario.made(box) or fault.kind == "moment" else _stages(scenario, box)
        wrong += _lost_work(ended, before, kept, whole)
    played.wrong += [f"{fault}: {line}" for line in wrong]
    return ended.code


def _lost_work(ended: Ended, before: int, kept: int | None, whole: Whole) -> list[str]:
    """Return what is wrong with the stages of a run.

    before: those that were finished before it. kept: those that are there after it; None if that
    can't be said.
    """
    wrong = []
    if before != ended.taken_up and (ended.taken_up or ended.code == 0):
        wrong.append(f"{before} stages were finished, {ended.taken_up} are taken up")
    if not ended.writes:  # nobody counted
        return wrong
    if ended.code == 0 and before + ended.stages != whole.ended.stages:
        wrong.append(f"{before} stages were finished, {ended.stages} are done again")
    if kept is not None and before + ended.stages != kept:
        wrong.append(f"{before} + {ended.stages} stages were finished, {kept} are kept")
    return wrong


def _misbehaviour(fault: Fault, ended: Ended, made: bool) -> list[str]:
    """Return what is wrong with how a run ended. made: its result was there before."""
    if ended.seconds > LONGEST:
        return [f"the run hangs: it was killed after {LONGEST} s"]
    wrong = ["the run did work again"] if "its work is done again" in ended.errors else []
    want = _codes(fault, made)
    if ended.code not in want:
        wrong.append(f"exit {ended.code} instead of {' or '.join(map(str, want))}")
    if ended.code == 2 and ended.errors.count("moecc: error: ") != 1 and fault.kind != "unread":
        wrong.append("an error that is not one line")
    if "Traceback" in ended.errors:
        wrong.append("a traceback")
    if made and "exists and is complete" not in ended.last:
        wrong.append("the rest of the run that made the result is not said")
    return wrong


def _codes(fault: Fault, made: bool) -> list[int]:
    """Return the exit codes that are right; 0 if a fault comes too late, or stops nothing."""
    if made:
        return [2]
    if fault == UNDISTURBED or fault.kind in ("closed", "unread", "worker"):
        return [0]
    if fault.kind == "signal":
        return [0, 128 + int(fault.amount)]
    if fault.kind == "bytes":  # the compiler that build-ops runs may be what the system kills
        return [0, KILLED[fault.kind], 2]
    return [0, KILLED.get(fault.kind, 141 if fault.kind == "head" else 2)]


def _within(scenario: Scenario, there: Content) -> Content:
    """Return what of a box is the result."""
    return {name: d for name, d in there.items() if name.startswith(f"{scenario.out}/")}


def _stages(scenario: Scenario, box: Path) -> int:
    """Return the number of finished stages that a stopped run has left."""
    out = box / scenario.out
    return len(list(out.with_name(f"{out.name}.partial").glob("journal/layer-*.json")))


# ---------------------------------------------------------------- faults by chance


def kills(whole: Whole, rng: random.Random, before: float = 0.0) -> tuple[Fault, ...]:
    """Draw kills of runs in a row. before: seconds that a process of its own imports and traces."""
    found = [_kill(whole, rng, before)]
    while rng.random() < 0.6 and len(found) < 6:
        found.append(_kill(whole, rng, before))
    return tuple(found)


def _kill(whole: Whole, rng: random.Random, before: float) -> Fault:
    kind, at = rng.choice(list(KILLED)), rng.randint(1, whole.ended.writes)
    if kind == "moment":
        moment = rng.uniform(before / 2, before + whole.ended.seconds)
        return Fault(kind, amount=moment)
    return Fault(kind, at, _size(whole, rng) if kind == "bytes" else 0)


def _size(whole: Whole, rng: random.Random) -> int:
    """Draw a size below that of the largest file; small ones are as likely, as most files are."""
    return int((whole.largest + 1) ** rng.random()) - 1


Draw: TypeAlias = Callable[[Whole, random.Random], list[Fault]]


def _writes(kind: str, *amounts: int) -> Draw:
    """Return what draws a write for each amount."""
    return lambda whole, rng: [Fault(kind, _write(whole, rng), n) for n in amounts]


def _write(whole: Whole, rng: random.Random) -> int:
    return rng.randint(1, whole.ended.writes)


def _of_a_worker(whole: Whole, rng: random.Random) -> list[Fault]:
    """Draw moments in the second half of a run, when most workers have begun."""
    return [Fault("worker", amount=whole.ended.seconds * rng.uniform(0.5, 1)) for _ in range(3)]


OF_WORKERS = "workers"
EVERY = "every-write"  # SIGKILL before each
# the faults of a drill that a scenario meets, one in each case
DRILLS: dict[str, tuple[Draw, ...]] = {
    "full-disk": (_writes("refused", *[errno.ENOSPC] * 3), _writes("fill", 0, 0, 0)),
    "file-size": (
        lambda whole, rng: [Fault("size", amount=whole.largest - 1)],
        lambda whole, rng: [Fault("size", amount=_size(whole, rng)) for _ in range(2)],
    ),
    "closed-stderr": (lambda whole, rng: [Fault(kind) for kind in STREAMS],),
    "read-only": (
        lambda whole, rng: [Fault("refused", 1, errno.EROFS), Fault("read-only")],
        _writes("refused", errno.EROFS, errno.EACCES),
    ),
    "memory": (
        lambda whole, rng: [
            Fault("memory", amount=int(whole.ended.growth * rng.random() ** 3)) for _ in range(3)
        ],
    ),
    "stopped": (_writes("signal", signal.SIGINT, signal.SIGTERM),),
    OF_WORKERS: (_of_a_worker,),
    EVERY: (lambda whole, rng: [Fault("write", n + 1) for n in range(whole.ended.writes)],),
}
ON_DISK = ("fill", "read-only")  # the box must lie on a disk of its own


def drill(name: str, whole: Whole, rng: random.Random) -> list[Fault]:
    """Draw the faults of a drill."""
    return [fault for draw in DRILLS[name] for fault in draw(whole, rng)]
