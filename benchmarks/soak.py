"""Kill and refuse moecc's commands at random, run them again, and compare every byte.

    python benchmarks/soak.py --kills 100
        100 kills and all drills; the page to benchmarks/results/soak.md
    python benchmarks/soak.py --kills 0 --drills memory "full-disk"
    python benchmarks/soak.py --kills 30 --workers 2 --commands vsraq,kbvq
    python benchmarks/soak.py --seed 0 --only 17        # one case again, as a failure says

A case runs a command in a folder of its own; faults happen to it, often several in a row; then it
runs undisturbed. Every file must end with the digest that an undisturbed run gives it, nothing of
the user's may change, and nothing may be left over. Kills come at a random moment (SIGKILL), before
a random write, and after a random number of a file's bytes. Drills are a full-disk, a limit on the
sizes of files, a closed stderr, a read-only target, too little memory, Ctrl-C and SIGTERM, and with
--workers SIGKILL of a worker. What is refused must end in one line and keep its finished work.

Most runs are forks of this process, which has imported torch and traced the model; one case in six
runs as processes of their own. A kill is not a power failure: what was written stays written.
Linux only.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path

from _runs import Case, Disk, Scenario
from _soak import DRILLS, EVERY, OF_WORKERS, ON_DISK, Played, Whole, drill, kills, measure, play
from _soak_inputs import ROOT, scenarios, warm
from _soak_page import document, failure
from tqdm import tqdm

MOUNTS = "MOECC_SOAK_MOUNTS"  # set where this process may mount a disk
DRILLED = ("vsraq,kbvq", "export --to dense", "export --to onnx")
SELDOM = ("vq --backend onnx", "export --to onnx", "build-ops")  # one case of every three


def in_namespace() -> bool:
    """Return whether this process may mount a disk; else begin it again where it may, if it can."""
    allowed = ["unshare", "--user", "--map-root-user", "--mount"]
    if os.environ.get(MOUNTS):
        return True
    attempt = [*allowed, "mount", "-t", "tmpfs", "tmpfs", tempfile.gettempdir()]  # nobody sees it
    if not shutil.which("unshare") or subprocess.run(attempt, capture_output=True).returncode:
        return False
    command = [*allowed, sys.executable, *sys.orig_argv[1:]]
    os.execvpe("unshare", command, {**os.environ, MOUNTS: "1"})


# ---------------------------------------------------------------- cases


class Soak:
    """The cases of a seed."""

    def __init__(self, work: Path, args: argparse.Namespace, mounts: bool):
        self.seed, self.names = args.seed, args.commands
        self.every = {s.name: s for s in scenarios(work, args.workers) if s.name in self.names}
        self.runner, self.before = warm(work, list(self.every.values()))
        self.wholes: dict[str, Whole] = {}
        self.disk = Disk.mounted(work / "disk", 32 << 20) if mounts else None

    def whole(self, scenario: Scenario) -> Whole:
        if scenario.name not in self.wholes:
            self.wholes[scenario.name] = measure(scenario, self.runner)
        return self.wholes[scenario.name]

    def killed(self, key: int) -> Case:
        """Return a case of kills."""
        often = [name for name in self.names if name not in SELDOM]
        turns = [*often, *self.names]
        scenario, apart = self.every[turns[key % len(turns)]], key % 6 == 5
        rng = random.Random(f"{self.seed} {key}")
        faults = kills(self.whole(scenario), rng, self.before if apart else 0)
        return Case(str(key), scenario, faults, apart)

    def drilled(self, name: str) -> Iterator[Case]:
        """Return the cases of a drill."""
        numbers = count()
        drilled = [self.every[n] for n in self.names if n in DRILLED or name == EVERY]
        for scenario in [s for s in drilled if s.workers > 1 or name != OF_WORKERS]:
            rng = random.Random(f"{self.seed} {name} {scenario.name}")
            for fault in drill(name, self.whole(scenario), rng):
                key, on_disk = f"{name}.{next(numbers)}", fault.kind in ON_DISK
                if self.disk is not None or not on_disk:
                    yield Case(key, scenario, (fault,), disk=self.disk if on_disk else None)

    def play(self, case: Case) -> Played:
        return play(case, self.whole(case.scenario), self.runner)

    def only(self, key: str) -> Case:
        """Return the case of a key. Raise SystemExit if there is none."""
        if key.isdecimal():
            return self.killed(int(key))
        name = key.rpartition(".")[0]
        case = (
            next((c for c in self.drilled(name) if c.key == key), None) if name in DRILLS else None
        )
        if case is None:
            raise SystemExit(f"no case {key!r} here")
        return case


def run(soak: Soak, args: argparse.Namespace) -> list[Played]:
    """Play the drills, then kills until there are enough; show how far it is."""
    done: list[Played] = []
    end = time.monotonic() + 60 * args.minutes
    drills = [case for name in args.drills for case in soak.drilled(name)]
    with tqdm(total=len(drills) + args.kills, unit="fault", mininterval=5) as bar:

        def played(case: Case) -> Played:
            done.append(soak.play(case))
            if done[-1].wrong:
                bar.write(failure(done[-1], soak.seed), file=sys.stderr)
            return done[-1]

        for case in drills:
            if time.monotonic() < end:
                played(case)
                bar.update()
        left = args.kills
        for key in count():
            if left <= 0 or time.monotonic() > end:
                break
            met = len(played(soak.killed(key)).met)
            bar.update(min(met, left))
            left -= met
    return done


def options() -> argparse.Namespace:
    names = [scenario.name for scenario in scenarios(Path())]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50, help="in all (default: 50)")
    parser.add_argument("--seed", type=int, default=0, help="of all choices (default: 0)")
    parser.add_argument("--minutes", type=float, default=1e6, help="begin no case after these")
    parser.add_argument(
        "--drills",
        nargs="*",
        choices=list(DRILLS),
        default=[name for name in DRILLS if name != EVERY],
        help=f"all but {EVERY}, a kill before each write, by default",
    )
    parser.add_argument(
        "--workers", type=int, default=1, metavar="N", help="of compile (default: 1)"
    )
    parser.add_argument("--commands", nargs="+", choices=names, default=names, metavar="NAME")
    parser.add_argument("--only", metavar="CASE", help="play one case again")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "soak.md")
    return parser.parse_args()


def main() -> int:
    args = options()
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    mounts = in_namespace()
    work = Path(tempfile.mkdtemp(prefix="moecc-soak-"))
    soak = Soak(work, args, mounts)
    if args.only is not None:
        done = [soak.play(soak.only(args.only))]
        print(failure(done[0], args.seed))
    else:
        done = run(soak, args)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(document(done, args.seed, mounts), encoding="utf-8")
        print(args.out.read_text(encoding="utf-8"))
    if soak.disk is not None:
        soak.disk.unmount()
    wrong = [played.case.key for played in done if played.wrong]
    if not wrong:
        shutil.rmtree(work, ignore_errors=True)
        return 0
    print(f"{len(wrong)} of {len(done)} cases failed; their folders are in {work}")
    return 1


if __name__ == "__main__":
    raise SystemExit(main())
