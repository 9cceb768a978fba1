"""The journal by itself: the next run takes up what is written, byte for byte, or nothing of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from checkpoints import fails
from conftest import tiny_program
from made import flip
from safetensors.torch import load_file

from moecc.ir.program import Program
from moecc.pipeline import record
from moecc.pipeline.journal import Journal, finished, has_work
from moecc.pipeline.passes import Context, Kept
from moecc.types import Json

IDENTITY: Json = {"seed": 3, "sizes": (1, 2), "model": {"hash": "é" * 20}}
FILES = [{"my_pass.py": "digest"}, {}]  # of two groups of passes
UP, DOWN, LATER = "layers.0.gate_up", "layers.0.down", "layers.1.gate_up"


@pytest.fixture(scope="module")
def program() -> Program:
    """Two layers of experts; tests take copies."""
    return tiny_program("MM")


def opened(folder: Path, said: list[str] | None = None) -> Journal:
    return Journal(folder, IDENTITY, [].append if said is None else said.append, FILES)


def doubled(program: Program, name: str) -> None:
    program.add(name, 2 * program.read(name))


def passed(journal: Journal, program: Program, names: Sequence[str], ctx: Context) -> None:
    """Run the passes of each layer, which double these weights, one weight of one layer each."""
    for stage, name in enumerate(names, 1):
        assert not journal.restore(stage, program, ctx)
        doubled(program, name)
        ctx.record(name, error=stage / 4)
        ctx.notes.append(f"note {stage}")
        ctx.ledger.setdefault("a pass", {})[str(stage)] = {"took": stage}
        journal.save(stage, program, ctx)


def whole(journal: Journal) -> dict[str, str]:
    """Return the last noted digest of every file, after checking that each is right."""
    lines = (journal.folder / "digests").read_text(encoding="utf-8").split("\n")
    noted = {name: digest for digest, name in (line.split("  ") for line in lines if line)}
    for name, digest in noted.items():
        content = (journal.folder / name).read_bytes()
        assert hashlib.sha256(content).hexdigest() == digest
    there = {p.name for p in journal.folder.iterdir()}
    assert there == {*noted, "digests"}
    return noted


def test_a_new_journal_describes_its_run(tmp_path: Path) -> None:
    folder = tmp_path / "journal"
    folder.mkdir()
    (folder / "junk").write_text("of a run that had no work yet")
    journal = opened(folder)
    assert not journal.found and not journal.resuming
    assert json.loads((folder / "run.json").read_text(encoding="utf-8")) == {
        **IDENTITY,
        "sizes": [1, 2],
        "files": FILES,
    }
    assert whole(journal).keys() == {"run.json"}
    assert finished(folder) == 0 and not has_work(folder)
    assert not opened(folder).found and whole(journal).keys() == {"run.json"}


def test_a_finished_layer_is_written_and_leaves_memory(program: Program, tmp_path: Path) -> None:
    journal, changed, ctx = opened(tmp_path / "journal"), program.copy(), Context()
    doubled(changed, "head.weight")
    early = changed.tensors["head.weight"]
    passed(journal, changed, [UP, LATER], ctx)
    assert whole(journal).keys() == {
        "run.json",
        *(f"layer-0-000{stage}.{kind}" for stage in (1, 2) for kind in ("json", "safetensors")),
    }
    assert finished(journal.folder) == 2 and has_work(journal.folder)
    for stage, name in ((1, UP), (2, LATER)):
        written = load_file(journal.folder / f"layer-0-{stage:04d}.safetensors")
        assert written.keys() == {name} and torch.equal(written[name], 2 * program.read(name))
        assert changed.tensors.in_memory(name) is None
        assert torch.equal(changed.read(name), written[name])
    assert changed.tensors.in_memory("head.weight") is early
    noted = json.loads((journal.folder / "layer-0-0001.json").read_text(encoding="utf-8"))
    assert noted == {
        **record.describe(changed, 1, [UP]),
        "audit": {UP: {"error": 0.25}},
        "notes": ["note 1"],
        "ledger": {"a pass": {"1": {"took": 1}}},
    }


def test_a_layer_s_file_has_only_what_its_own_passes_made(program: Program, tmp_path: Path) -> None:
    journal, changed, ctx = opened(tmp_path / "journal"), program.copy(), Context()
    doubled(changed, DOWN)
    passed(journal, changed, [UP], ctx)
    assert load_file(journal.folder / "layer-0-0001.safetensors").keys() == {UP}
    journal.begin(1)  # its passes go through the layers again
    assert not journal.restore(1, changed, ctx)
    doubled(changed, UP)
    journal.save(1, changed, ctx)
    written = load_file(journal.folder / "layer-1-0001.safetensors")
    assert written.keys() == {UP} and torch.equal(written[UP], 4 * program.read(UP))
    assert not journal.restore(2, changed, ctx)
    journal.save(2, changed, ctx)
    assert load_file(journal.folder / "layer-1-0002.safetensors") == {}
    whole(journal)


def test_the_next_run_goes_on_where_the_last_one_ended(program: Program, tmp_path: Path) -> None:
    first, changed, ctx = opened(tmp_path / "journal"), program.copy(), Context()
    passed(first, changed, [UP], ctx)
    assert not first.restore(2, changed, ctx)
    before = whole(first)
    said: list[str] = []
    again, restored = opened(first.folder, said), program.copy()
    found = Context(audit={"old": {}}, notes=["old"], ledger={"old": {}})
    audit, notes, ledger = found.audit, found.notes, found.ledger
    assert again.found and again.resuming
    assert again.restore(1, restored, found) and again.resuming
    assert restored.text() == changed.text() and restored.tensors.in_memory(UP) is None
    assert restored.rounded == changed.rounded and UP not in program.tensors
    assert (found.audit, found.notes, found.ledger) == (ctx.audit, ctx.notes, ctx.ledger)
    assert found.audit is audit and found.notes is notes and found.ledger is ledger
    assert not again.restore(2, restored, found) and not again.resuming and again.found
    doubled(restored, LATER)
    again.save(2, restored, found)
    assert said == [] and before.items() <= whole(again).items()
    # from then on nothing is restored, though the files of this round are there
    assert not again.restore(3, restored, found)
    third, last = opened(first.folder), program.copy()
    assert third.restore(1, last, found) and third.restore(2, last, found)
    assert last.text() == restored.text()
    third.begin(1)
    assert not third.restore(1, last, found)
    assert not third.restore(2, last, found)


def test_a_rounded_weight_is_restored_as_one(program: Program, tmp_path: Path) -> None:
    journal, changed = opened(tmp_path / "journal"), program.copy()
    assert not journal.restore(1, changed, Context())
    changed.rewrite(UP, 2 * program.read(UP))
    journal.save(1, changed, Context())
    restored = program.copy()
    assert opened(journal.folder).restore(1, restored, Context())
    assert restored.rounded == {UP} and not program.rounded


@pytest.mark.parametrize("kind", ["json", "safetensors"])
def test_a_layer_whose_file_is_damaged_or_gone_is_done_again(
    kind: str, program: Program, tmp_path: Path
) -> None:
    journal, changed = opened(tmp_path / "journal"), program.copy()
    passed(journal, changed, [UP, LATER], Context())
    file = journal.folder / f"layer-0-0001.{kind}"
    content = file.read_bytes()
    file.write_bytes(flip(content))
    said: list[str] = []
    again, fresh = opened(journal.folder, said), program.copy()
    assert not again.restore(1, fresh, Context()) and not again.restore(2, fresh, Context())
    assert fresh.text() == program.text() and not fresh.tensors
    assert said == [f"note: {file} does not match its digest; its work is done again"]
    file.unlink()
    said.clear()
    assert not opened(journal.folder, said).restore(1, fresh, Context())
    gone = f"note: {file} can't be read (No such file or directory); its work is done again"
    assert said == ([gone] if kind == "safetensors" else [])
    file.write_bytes(content)
    assert opened(journal.folder, said).restore(1, program.copy(), Context())


@pytest.mark.parametrize("error", [KeyError("experts"), None])
def test_a_layer_of_another_program_is_done_again(
    error: KeyError | None, program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal, changed, ctx = opened(tmp_path / "journal"), program.copy(), Context(notes=["mine"])
    passed(journal, changed, [UP], Context())
    if error is not None:

        def failing(*args: object) -> None:
            raise error

        monkeypatch.setattr(record, "restore", failing)
    doubled(other := program.copy(), DOWN)
    before = other.text()
    assert not opened(journal.folder).restore(1, other, ctx)
    assert other.text() == before and ctx.notes == ["mine"] and not ctx.audit


def test_kept_work_is_found_by_its_key(tmp_path: Path) -> None:
    journal = opened(tmp_path / "journal")
    assert journal.kept("a/b c") is None
    tensors = {"x": torch.arange(3.0), "y": torch.ones(2, dtype=torch.uint8)}
    facts = {"steps": [1, 2], "é": None}
    kept = journal.keep("a/b c", Kept(tensors, facts))
    assert kept.facts == facts and kept.tensors.keys() == tensors.keys()
    assert whole(journal).keys() == {"run.json", "kept-0-a%2Fb%20c.safetensors"}
    assert has_work(journal.folder) and finished(journal.folder) == 0
    said: list[str] = []
    again = opened(journal.folder, said)
    assert again.found and again.kept("a/b") is None and again.kept("a") is None
    found = again.kept("a/b c")
    assert found is not None and found.facts == facts
    for one in (kept, found):
        assert all(torch.equal(one.tensors[name], t) for name, t in tensors.items())
    again.keep("a/b c", Kept({"x": torch.zeros(1)}))
    found = again.kept("a/b c")
    assert found is not None and found.facts is None and found.tensors.keys() == {"x"}
    whole(again)
    file = journal.folder / "kept-0-a%2Fb%20c.safetensors"
    file.write_bytes(flip(file.read_bytes()))
    assert said == [] and again.kept("a/b c") is None
    assert said == [f"note: {file} does not match its digest; its work is done again"]
    for _ in range(2):  # nothing is there the second time
        again.forget("a/b c")
        assert again.kept("a/b c") is None and not file.exists() and len(said) == 1


def test_what_units_kept_goes_once_the_layer_is_saved(program: Program, tmp_path: Path) -> None:
    """The layer holds it. Work of passes over the whole model stays, and that of other groups."""
    journal, changed, ctx = opened(tmp_path / "journal"), program.copy(), Context()
    journal.keep("a", Kept({"x": torch.ones(1)}))
    journal.keep("unit a 0-3", Kept({"x": torch.ones(1)}))
    journal.begin(1)
    for name in ("unit a 0-3", "unit a/b 4-7", "united", "a unit "):
        journal.keep(name, Kept({"x": torch.ones(1)}))
    assert not journal.restore(1, changed, ctx)
    doubled(changed, UP)
    journal.save(1, changed, ctx)
    there = {file.name for file in journal.folder.glob("kept-*")}
    assert there == {
        *("kept-0-a.safetensors", "kept-0-unit%20a%200-3.safetensors"),
        *("kept-1-united.safetensors", "kept-1-a%20unit%20.safetensors"),
    }
    again = opened(journal.folder)
    again.begin(1)
    assert again.kept("unit a 0-3") is None and again.kept("united") is not None
    assert again.restore(1, program.copy(), ctx)


def test_a_line_that_was_cut_hides_no_digest(tmp_path: Path) -> None:
    journal = opened(tmp_path / "journal")
    digests = journal.folder / "digests"
    digests.write_bytes(digests.read_bytes() + b"\n0123\xff")
    journal.keep("a", Kept({"x": torch.ones(1)}, 1))
    digests.write_bytes(digests.read_bytes() + f"\n{'0' * 64}  kept-a.safetensors\n".encode())
    found = opened(journal.folder).kept("a")
    assert found is not None and found.facts == 1


def test_the_work_of_another_run_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "journal"
    opened(folder).keep("a", Kept())
    assert opened(folder).found

    def other(**changes: object) -> None:
        Journal(folder, {**IDENTITY, **changes}, [].append)

    end = f"; remove {tmp_path}, or choose another output folder"
    said = f"{tmp_path} belongs to another run (seed was 3, now 4; sizes was [1, 2], now [1])"
    fails(lambda: other(seed=4, sizes=(1,)), said + end)
    (folder / "run.json").write_bytes(flip((folder / "run.json").read_bytes()))
    fails(lambda: opened(folder), f"{tmp_path} belongs to another run (its run.json is damaged)")
    (folder / "run.json").unlink()
    fails(lambda: opened(folder), "(its run.json is damaged)" + end)
