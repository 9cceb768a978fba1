"""The journal of a stopped run: what matches its digest is taken up, the rest is done again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from made import DAMAGES, Compile, content, flip, interrupt, stop, watch

from moecc.pipeline.journal import Journal
from moecc.pipeline.passes import Kept

torch.set_num_threads(1)
pytestmark = pytest.mark.usefixtures("traced_once")


def interrupted(model: Path, compile: Compile, out: Path) -> None:
    """Interrupt a compilation once its first layer is in the journal."""
    with pytest.MonkeyPatch.context() as patch:
        stop(patch, "after saving", 1, interrupt)
        assert compile(model, out).code == 130


@pytest.mark.parametrize("kind", ["json", "safetensors"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_finished_layer_that_is_damaged_is_done_again_and_said(
    damage: str, kind: str, mixtral: Path, compile: Compile, tmp_path: Path
) -> None:
    assert compile(mixtral, tmp_path / "whole").code == 0
    with pytest.MonkeyPatch.context() as patch:
        stop(patch, "after saving", 2, interrupt)
        assert compile(mixtral, tmp_path / "out").code == 130
    file = tmp_path / "out.partial" / "journal" / f"layer-0-0002.{kind}"
    file.write_bytes(DAMAGES[damage](file.read_bytes()))
    with pytest.MonkeyPatch.context() as patch:
        restored = watch(patch)
        again = compile(mixtral, tmp_path / "out")
    assert again.code == 0, again.err
    assert f"{file} does not match its digest; its work is done again" in again.err
    assert restored == [True, False, False]
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_an_audit_that_was_altered_is_not_taken_up(
    mixtral: Path, compile: Compile, tmp_path: Path
) -> None:
    interrupted(mixtral, compile, tmp_path / "out")
    file = tmp_path / "out.partial" / "journal" / "layer-0-0001.json"
    noted = json.loads(file.read_text(encoding="utf-8"))
    for facts in noted["audit"].values():
        facts["in_sample_error"] = 0.0
    file.write_text(json.dumps(noted), encoding="utf-8")
    assert compile(mixtral, tmp_path / "out").code == 0
    manifest = json.loads((tmp_path / "out" / "moecc.json").read_text(encoding="utf-8"))
    errors = [
        row["in_sample_error"] for row in manifest["audit"] if row["role"] == "routed experts"
    ]
    assert len(errors) == 4 and min(errors) > 0


def test_files_replaced_when_the_run_was_killed_are_taken_up(
    mixtral: Path, compile: Compile, tmp_path: Path
) -> None:
    """The digest of the new file is noted first, then it gets its name."""
    folder = tmp_path / "out.partial" / "journal"
    interrupted(mixtral, compile, tmp_path / "out")
    cut = "0" * 30
    with open(folder / "digests", "a", encoding="utf-8") as log:
        log.write(f"\n{cut * 2}0000  layer-0-0001.json\n{cut}")
    with pytest.MonkeyPatch.context() as patch:
        stop(patch, "after saving", 2, interrupt)
        restored = watch(patch)
        got = compile(mixtral, tmp_path / "out")
    assert restored == [True, False] and "digest" not in got.err
    with pytest.MonkeyPatch.context() as patch:
        restored = watch(patch)
        assert compile(mixtral, tmp_path / "out").code == 0
    assert restored == [True, True, False]


def test_a_damaged_description_of_the_run_is_said_and_nothing_is_touched(
    mixtral: Path, compile: Compile, tmp_path: Path
) -> None:
    interrupted(mixtral, compile, tmp_path / "out")
    file = tmp_path / "out.partial" / "journal" / "run.json"
    file.write_bytes(flip(file.read_bytes()))
    before = content(tmp_path)
    got = compile(mixtral, tmp_path / "out")
    assert got.code == 2 and content(tmp_path) == before
    assert "belongs to another run (its run.json is damaged); remove" in got.err


def test_kept_work_stays_if_the_file_of_a_later_pass_changes(tmp_path: Path) -> None:
    said: list[str] = []

    def journal(*files: dict[str, str]) -> Journal:
        return Journal(tmp_path / "journal", {"seed": 0}, said.append, files)

    first = journal({}, {"a.py": "1", "b.py": "1"}, {})
    for group in range(3):
        first.begin(group)
        first.keep("work", Kept({"x": torch.full((2,), float(group))}, group))
    for b, whole in (("1", 3), ("2", 1)):
        again = journal({}, {"a.py": "1", "b.py": b}, {})
        found = []
        for group in range(3):
            again.begin(group)
            found.append(again.kept("work"))
        assert [None if work is None else work.facts for work in found] == [
            group if group < whole else None for group in range(3)
        ]
        assert found[0] is not None and found[0].tensors["x"].tolist() == [0.0, 0.0]
    assert said == ["note: b.py has changed; its work, and what came after, is done again"]
