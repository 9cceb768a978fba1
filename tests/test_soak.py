"""benchmarks/soak.py in its short form, and what it notices of programs that are not careful."""

from __future__ import annotations

import errno
import random
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from made import ROOT

if sys.platform != "linux":
    pytest.skip("it kills and limits processes as Linux does", allow_module_level=True)
SOAK = ROOT / "benchmarks" / "soak.py"


def test_killed_and_refused_runs_end_with_the_same_bytes(tmp_path: Path) -> None:
    page = tmp_path / "soak.md"
    options = ["--kills", "2", "--drills", "file-size", "--commands", "vsraq,kbvq"]
    command = [sys.executable, str(SOAK), *options, "--out", str(page)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    killed = re.search(r"^\| all \| (.+) \|$", page.read_text(encoding="utf-8"), re.M)
    refused = re.search(r"^\| file-size \| `vsraq,kbvq` \| (.+) \|$", done.stdout, re.M)
    assert killed and refused
    *kinds, _, _, _, results, identical = map(int, killed[1].split(" | "))
    assert sum(kinds) >= 2 and results == identical > 0
    assert refused[1].split(" | ") == ["3", "3", "2", "3"]


CAREFUL = """
import os, pathlib, shutil, signal, sys

def command(flaw):
    out, draft = pathlib.Path("out"), pathlib.Path("out.partial")
    if out.exists():
        shutil.rmtree(draft)
        return "moecc: error: out exists and is complete"
    journal, output = draft / "journal", draft / "output"
    journal.mkdir(parents=True, exist_ok=True)
    done = len(list(journal.glob("layer-*.json")))
    if done and flaw != "says nothing":
        print(f"{done} stages of it are finished", file=sys.stderr, flush=True)
    if done and flaw == "leaves a file":
        pathlib.Path("new").touch()
    if done and flaw == "removes a neighbour":
        shutil.rmtree("out.old")
    for i in range(0 if flaw == "begins anew" else done, 4):
        (journal / "part").write_text(str(i) * 1000)
        (journal / "part").replace(journal / f"layer-0-{i}.json")
    output = out if flaw == "writes in place" else output
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir()
    text = "".join(path.read_text() for path in sorted(journal.glob("layer-*.json")))
    with open(output / "model", "w") as file:
        file.write(text if not done or flaw != "other bytes" else text[1:])
        file.flush()
        os.fsync(file.fileno())
    if output != out:
        output.rename(out)
    shutil.rmtree(draft)

flaw = sys.argv[1]
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
try:
    error = command(flaw)
except OSError as e:
    if flaw == "a traceback":
        raise
    if flaw == "loses its work":
        shutil.rmtree("out.partial/journal", ignore_errors=True)
    error = f"moecc: error: {e}"
except KeyboardInterrupt:
    sys.exit(130)
if error:
    print(error, file=sys.stderr)
    sys.exit(2)
"""


class Played:
    """Plays cases of a program with a flaw."""

    def __init__(self, soak: Any, work: Path, flaw: str):
        self.soak, self.flaw = soak, flaw
        program = work / "program.py"
        program.write_text(CAREFUL, encoding="utf-8")
        (work / "given").mkdir()
        self.scenario = soak.Scenario(
            "program", (flaw,), work / "given", "out", program=str(program)
        )
        self.runner = soak.Runner(work)
        self.whole = soak.measure(self.scenario, self.runner)

    def __call__(self, faults: Sequence[Any]) -> Any:
        case = self.soak.Case("case", self.scenario, tuple(faults))
        return self.soak.play(case, self.whole, self.runner)


@pytest.fixture
def soak(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module that plays cases."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import _soak

    return _soak


def test_a_careful_program_passes(soak: Any, tmp_path: Path) -> None:
    play, rng, met = Played(soak, tmp_path, ""), random.Random(0), set()
    cases = [soak.kills(play.whole, rng) for _ in range(4)]
    cases.append([soak.Fault("bytes", BEFORE_THE_MODEL, 100), soak.Fault("write", 3)])
    cases += [
        [fault]
        for name in soak.DRILLS
        for fault in soak.drill(name, play.whole, rng)
        if fault.kind not in (*soak.ON_DISK, "memory") and name != soak.EVERY
    ]
    for faults in cases:
        played = play(faults)
        assert not played.wrong, (faults, played.ends)
        met |= {fault.kind for fault in played.met}
    assert met >= {"write", "bytes", "refused", "size", "signal", *soak.STREAMS}


FULL, KILLED, CUT = ("refused", errno.ENOSPC), ("write", 0), ("bytes", 100)
# the flaw, what happens before the last writes of a run, and what is noticed
NOTICED = {
    "leaves a file": (KILLED, "new is left over"),
    "removes a neighbour": (KILLED, "out.old/notes.txt is missing"),
    "says nothing": (KILLED, "4 stages were finished, 0 are taken up"),
    "begins anew": (KILLED, "4 stages were finished, 4 are done again"),
    "writes in place": (CUT, "out/model has other bytes"),
    "other bytes": (KILLED, "out/model has other bytes"),
    "a traceback": (FULL, "a traceback"),
    "loses its work": (FULL, "0 + 4 stages were finished, 0 are kept"),
}
BEFORE_THE_MODEL = 13  # writes: three for folders, two for each stage, one for a folder


@pytest.mark.parametrize("flaw", NOTICED)
def test_a_flaw_is_noticed(flaw: str, soak: Any, tmp_path: Path) -> None:
    (kind, amount), says = NOTICED[flaw]
    played = Played(soak, tmp_path, flaw)([soak.Fault(kind, BEFORE_THE_MODEL, amount)])
    assert any(line.endswith(says) for line in played.wrong), played.wrong
