"""`make mutants FILE=passes/_tune/routing.py`: change one file in small ways; does a test notice?

mutmut makes the changes and runs the tests that `[tool.mutmut.guards]` in pyproject.toml names for
the file. It works in a copy of the project under out/mutants, in which `moecc/passes` and
`moecc/backends` are folders: mutmut doesn't follow links. Survivors are printed as diffs; each is a
missing test, or equivalent to the original.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

from mutmut.mutation.diff_apply import get_diff_for_mutant
from mutmut.mutation.file_mutation import mutate_file_contents
from mutmut.stats import status_by_exit_code
from mutmut.utils.format_utils import get_mutant_name

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "out" / "mutants"
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def main() -> int:
    guards = settings()["guards"]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", choices=sorted(guards), metavar="FILE")
    parser.add_argument("--sample", type=int, default=0, help="this many mutants; 0: all")
    parser.add_argument("--seed", type=int, default=0, help="which sample")
    parser.add_argument("--only", nargs="*", default=[], help="these mutants, by mutmut's names")
    args = parser.parse_args()
    target = copy(args.file, guards[args.file])
    os.chdir(WORK)
    names = args.only or drawn(target, args.sample, args.seed)
    # PYTHONPATH would put this checkout before the copy
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | ONE_THREAD
    command = [sys.executable, "-m", "mutmut", "run", "--max-children", "1", *names]
    with (WORK / "run.log").open("w") as log:
        subprocess.run(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    return report(target, set(names))


def settings() -> dict[str, dict[str, list[str]]]:
    with (ROOT / "pyproject.toml").open("rb") as file:
        return tomllib.load(file)["tool"]["mutmut"]


def copy(file: str, tests: list[str]) -> Path:
    """Copy the project with its two links as folders; return the file's path in the copy."""
    shutil.rmtree(WORK, ignore_errors=True)
    skipped = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for folder in ("moecc", "tests", "examples"):  # copytree follows the links
        shutil.copytree(ROOT / folder, WORK / folder, ignore=skipped)
    room = file.split("/")[0]
    target = Path(file) if room == "moecc" else Path("moecc") / file
    own = {"source_paths": ["moecc"], "only_mutate": [str(target)], "also_copy": ["examples"]}
    own["pytest_add_cli_args_test_selection"] = tests
    lines = [f"{key} = {json.dumps(value)}" for key, value in own.items()]
    text = (ROOT / "pyproject.toml").read_text()
    text = text.replace("[tool.mutmut]\n", "\n".join(["[tool.mutmut]", *lines, ""]))
    (WORK / "pyproject.toml").write_text(text)
    return target


def drawn(target: Path, count: int, seed: int) -> list[str]:
    """Return the names of a sample of the file's mutants; none, for mutmut to take all."""
    found = mutate_file_contents(str(target), target.read_text())
    names = [get_mutant_name(target, name) for name in found.mutant_names]
    print(f"{len(names)} mutants", flush=True)
    return random.Random(seed).sample(names, count) if 0 < count < len(names) else []


def report(target: Path, names: set[str]) -> int:
    """Print the survivors and their number; return 1 if there are any."""
    meta = json.loads((WORK / "mutants" / f"{target}.meta").read_text())
    codes = {k: v for k, v in meta["exit_code_by_key"].items() if not names or k in names}
    # mutmut's exit codes: 0 survived, 5 and 33 no test runs it, 34 and None not tried
    alive = [k for k, v in codes.items() if v in (0, 5, 33)]
    for name in alive:
        print(f"# {name}\n{get_diff_for_mutant(name, path=target)}")
    late = [k for k, v in codes.items() if status_by_exit_code[v] == "timeout"]
    for name in late:  # an endless loop, or a busy machine
        print(f"# {name} ran out of time")
    tried = [k for k, v in codes.items() if v not in (34, None)]
    killed = len(tried) - len(alive) - len(late)
    print(f"{target}: {killed} of {len(tried)} mutants killed")
    return 1 if killed < len(tried) or not tried else 0


if __name__ == "__main__":
    sys.exit(main())
