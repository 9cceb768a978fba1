"""`moecc compile`: equal runs give equal bytes, also when one is stopped and started again."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch
from made import (
    DAMAGES,
    EVERYTHING,
    MY_PASS,
    QUICK,
    ROWS,
    Compile,
    Run,
    checkpoint,
    content,
    interrupt,
    stop,
    watch,
)

from moecc import cli
from moecc.checkpoint.files import TensorFile
from moecc.passes._code import native
from moecc.pipeline import journal
from moecc.pipeline.passes import UNIT

pytestmark = pytest.mark.usefixtures("traced_once")


def test_the_same_seed_gives_the_same_bytes(
    mixtral: Path, compile: Compile, tmp_path: Path
) -> None:
    runs = {
        "a": ("--seed", 7),
        "b": ("--seed", 7),
        "seed": ("--seed", 8),
        "bits": ("--seed", 7, "--bits", 3),
    }
    for name, options in runs.items():
        assert compile(mixtral, tmp_path / name, EVERYTHING, *options).code == 0
    first = content(tmp_path / "a")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= first.keys()
    assert {"moecc.json", "report.html"} <= first.keys()
    assert content(tmp_path / "b") == first
    for name in ("seed", "bits"):
        assert content(tmp_path / name)["model.safetensors"] != first["model.safetensors"]


@pytest.fixture(scope="module")
def whole(mixtral: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a run that nothing stops."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert cli.main(["compile", str(mixtral), "--passes", EVERYTHING, "-o", str(out), *ROWS]) == 0
    return content(out)


@pytest.mark.parametrize(
    ("where", "stage", "finished"),
    [("before saving", 1, 0), ("after saving", 1, 1), ("before saving", 3, 2), ("writing", 0, 6)],
)
def test_an_interrupted_run_goes_on_and_ends_the_same(
    where: str,
    stage: int,
    finished: int,
    mixtral: Path,
    whole: dict[str, bytes],
    compile: Compile,
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        stop(patch, where, stage, interrupt)
        got = compile(mixtral, out, EVERYTHING)
    assert got.code == 130 and got.out == "" and got.err.endswith("moecc: interrupted\n")
    assert [p.name for p in tmp_path.iterdir()] == ["out.partial"]
    with pytest.MonkeyPatch.context() as patch:
        restored = watch(patch)
        again = compile(mixtral, out, EVERYTHING)
    assert again.code == 0, again.err
    assert f"out.partial holds; {finished} stages of it are finished" in again.err
    # three stages, and three more: vsraq goes through the layers in a round of its own
    assert restored == [i < finished for i in range(6)]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert content(out) == whole


KILLED = """
import os, sys
sys.path.insert(0, os.path.dirname(sys.argv[1]))
import made, pytest, torch
from moecc import cli
torch.set_num_threads(1)
made.stop(pytest.MonkeyPatch(), "after saving", 2, lambda: os._exit(9))
sys.exit(cli.main(sys.argv[2:]))
"""


def test_a_killed_process_goes_on_and_ends_the_same(
    mixtral: Path, whole: dict[str, bytes], compile: Compile, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    args = ("compile", mixtral, "--passes", EVERYTHING, "-o", out, *ROWS)
    killed = subprocess.run([sys.executable, "-c", KILLED, __file__, *args], capture_output=True)
    assert killed.returncode == 9
    again = compile(mixtral, out, EVERYTHING)
    assert again.code == 0 and "2 stages of it are finished" in again.err
    assert content(out) == whole


MODEL_PASSES = "kbvq{bits=3.5},rilq{steps=4,rank=2,lr=15},merge"


@pytest.fixture(scope="module")
def whole_model(mixtral: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a run with passes over the whole model that nothing stops."""
    out = tmp_path_factory.mktemp("whole_model") / "out"
    assert cli.main(["compile", str(mixtral), "--passes", MODEL_PASSES, "-o", str(out), *ROWS]) == 0
    return content(out)


@pytest.mark.parametrize("stopped", ["sensitivity routing", "budget", "rilq"])
def test_model_passes_take_up_the_work_of_an_interrupted_run(
    stopped: str, mixtral: Path, whole_model: dict[str, bytes], compile: Compile, tmp_path: Path
) -> None:
    """Interrupt a run after it first keeps work under a key, then again when all work is done.

    rilq keeps its work four times, at each check.
    """
    kept: list[str] = []
    keep = journal.Journal.keep

    def keeping(self: journal.Journal, key: str, work: Callable[[], object]) -> object:
        if not key.startswith(UNIT) and not of_a_layer(key):
            kept.append(key)
        found = keep(self, key, work)
        if key == stopped and kept.count(key) == 1:
            raise KeyboardInterrupt
        return found

    keys = ["sensitivity kl", "sensitivity routing", "budget", *["rilq"] * 4]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(journal.Journal, "keep", keeping)
        assert compile(mixtral, tmp_path / "out", MODEL_PASSES).code == 130
        before, kept[:] = list(kept), ["", stopped]
        stop(patch, "writing", 0, interrupt)
        assert compile(mixtral, tmp_path / "out", MODEL_PASSES).code == 130
        assert before + kept[2:] == keys
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(journal.Journal, "keep", None)  # no work is left, so none is kept
        again = compile(mixtral, tmp_path / "out", MODEL_PASSES)
    assert again.code == 0, again.err
    assert content(tmp_path / "out") == whole_model


def of_a_layer(key: str) -> bool:
    """Return whether a key is that of one layer's sensitivity, and not of the list of them."""
    return key.startswith("sensitivity ") and key.count(" ") > 1


@pytest.mark.parametrize("which", ["layers", "lists"])
@pytest.mark.parametrize("damage", ["cut", "a bit"])
def test_kept_work_that_is_damaged_is_done_again_and_said(
    which: str,
    damage: str,
    mixtral: Path,
    whole_model: dict[str, bytes],
    compile: Compile,
    tmp_path: Path,
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        stop(patch, "writing", 0, interrupt)
        assert compile(mixtral, tmp_path / "out", MODEL_PASSES).code == 130
    kept = list((tmp_path / "out.partial" / "journal").glob("kept-*"))
    parts = [of_a_layer(unquote(file.stem).split("-", 2)[2]) for file in kept]
    files = [f for f, part in zip(kept, parts, strict=True) if part == (which == "layers")]
    for file in files:
        file.write_bytes(DAMAGES[damage](file.read_bytes()))
    again = compile(mixtral, tmp_path / "out", MODEL_PASSES)
    assert again.code == 0, again.err
    assert len(files) == (3 if which == "layers" else 4)
    for file in files:
        assert f"{file} does not match its digest; its work is done again" in again.err
    assert content(tmp_path / "out") == whole_model


def test_a_terminated_run_goes_on_too(
    mixtral: Path, whole: dict[str, bytes], compile: Compile, tmp_path: Path
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        stop(patch, "after saving", 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        got = compile(mixtral, tmp_path / "out", EVERYTHING)
    assert got.code == 143 and got.out == "" and got.err.endswith("moecc: terminated\n")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    again = compile(mixtral, tmp_path / "out", EVERYTHING)
    assert again.code == 0 and "2 stages of it are finished" in again.err
    assert content(tmp_path / "out") == whole


def test_the_unfinished_work_of_another_run_is_not_touched(
    mixtral: Path, compile: Compile, tmp_path: Path
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        stop(patch, "after saving", 1, interrupt)
        assert compile(mixtral, tmp_path / "out").code == 130
    before = content(tmp_path)
    got = compile(mixtral, tmp_path / "out", QUICK, "--seed", 1)
    last = got.err.splitlines()[-1]
    assert got.code == 2 and last.startswith("moecc: error: ")
    assert "(seed was 0, now 1); remove " in last
    assert f"{tmp_path}/out.partial belongs to another run" in last
    got = compile(mixtral, tmp_path / "out", QUICK, "--length", 16)
    assert re.search(r"calibration was [0-9a-f]{8}, now [0-9a-f]{8}\); remove", got.err)
    if native.compiled() is not None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(native, "compiled", lambda: None)
            assert "now coding by torch); remove" in compile(mixtral, tmp_path / "out").err
    assert content(tmp_path) == before
    damaged = next((tmp_path / "out.partial" / "journal").glob("layer-*.safetensors"))
    damaged.write_bytes(damaged.read_bytes()[:-1])  # so that layer is compiled again
    with pytest.MonkeyPatch.context() as patch:
        restored = watch(patch)
        assert compile(mixtral, tmp_path / "out").code == 0
    assert restored == [False] * 3
    assert compile(mixtral, tmp_path / "whole").code == 0
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_a_folder_that_another_run_writes_is_left_alone(
    mixtral: Path, compile: Compile, tmp_path: Path
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        got: list[Run] = []
        stop(patch, "after saving", 2, lambda: got.append(compile(mixtral, tmp_path / "out")))
        assert compile(mixtral, tmp_path / "out").code == 0
    assert [g.code for g in got] == [2]
    assert got[0].err.splitlines()[-1] == (
        f"moecc: error: {tmp_path}/out.partial is in use by another run; "
        "wait for it, or choose another output folder"
    )
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


KEPT = "run the same command again, once this is mended, to go on"


def test_an_internal_error_keeps_what_is_finished(
    mixtral: Path, compile: Compile, tmp_path: Path
) -> None:
    def fault() -> None:
        raise RuntimeError("this should not happen")

    out = tmp_path / "out"
    # once stage 1 is coded, its units are kept
    for where, stage, finished in (("", 0, None), ("before saving", 1, 0), ("writing", 0, 3)):
        with pytest.MonkeyPatch.context() as patch:
            stop(patch, where, stage, fault)
            if not where:
                patch.setattr(journal.Journal, "restore", lambda *args: fault())
            got = compile(mixtral, out)
        assert got.code == 3 and "internal error: RuntimeError: this should not happen" in got.err
        what = f"{finished} finished stages are" if finished else "what is finished is"
        kept = f"note: {what} kept in {out}.partial: {KEPT}"
        assert (kept in got.err.splitlines()) == (finished is not None)
        left = [] if finished is None else ["out.partial"]
        assert [p.name for p in tmp_path.iterdir()] == left
    with pytest.MonkeyPatch.context() as patch:
        restored = watch(patch)
        assert compile(mixtral, out).code == 0
    assert restored == [True] * 3


def test_a_pass_of_ones_own_is_mended_and_the_run_goes_on(
    mixtral: Path, compile: Compile, tmp_path: Path
) -> None:
    """What came before the pass is kept, what it did is done again: the bytes are the same."""
    shrink, look, out = tmp_path / "shrink.py", tmp_path / "look.py", tmp_path / "out"
    look.write_text(MY_MODEL_PASS)
    passes = f"{QUICK},{look},{shrink}"
    for right, wrong, says in (
        ("self.by", "self.bye", f"AttributeError: .*{shrink}, line "),
        ("model.layers", "layers", "layers.0.input_layernorm.weight: not in the checkpoint"),
    ):
        shrink.write_text(MY_PASS.replace(right, wrong))
        got = compile(mixtral, out, passes)
        last = got.err.splitlines()[-1]
        assert got.code == 2 and re.search(says, last), last
        assert last.endswith(f"; 3 finished stages are kept in {out}.partial: {KEPT}")
    for file, text, restorable in ((shrink, MY_PASS, 3), (look, MY_MODEL_PASS + "\n", 3)):
        file.write_text(text)
        with pytest.MonkeyPatch.context() as patch:
            stop(patch, "writing", 0, interrupt)
            restored = watch(patch)
            got = compile(mixtral, out, passes)
        assert got.code == 130 and f"note: {file} has changed; its work, and" in got.err
        assert restored == [i < restorable for i in range(6)]
    assert compile(mixtral, out, passes).code == 0
    assert compile(mixtral, tmp_path / "whole", passes).code == 0
    assert content(out) == content(tmp_path / "whole")


def test_the_journal_of_a_round_has_only_the_tensors_it_changed(
    mixtral: Path, compile: Compile, tmp_path: Path
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        stop(patch, "writing", 0, interrupt)
        assert compile(mixtral, tmp_path / "out", EVERYTHING).code == 130
    folder = tmp_path / "out.partial" / "journal"
    files = [TensorFile(folder / f"layer-{i}-0002.safetensors") for i in (1, 2)]
    coded, tuned = ({n for n in file if ".experts." in n} for file in files)
    assert {n.rpartition(".")[2] for n in coded} >= {"codes", "scale", "codebook", "mean_codes"}
    assert tuned and not any(n.endswith(("codes", "signs")) for n in tuned)


def test_a_resumed_run_goes_on_with_its_dump(
    mixtral: Path, compile: Compile, tmp_path: Path
) -> None:
    dump, passes = tmp_path / "dump", f"klt{{rank=4,mean=2}},{QUICK}"
    assert compile(mixtral, tmp_path / "whole", passes, "--dump", tmp_path / "texts").code == 0
    with pytest.MonkeyPatch.context() as patch:
        stop(patch, "after saving", 1, interrupt)
        assert compile(mixtral, tmp_path / "out", passes, "--dump", dump).code == 130
    assert (dump / "layer001-vq.txt").is_file()
    assert compile(mixtral, tmp_path / "out", passes, "--dump", dump).code == 0
    assert content(dump) == content(tmp_path / "texts")


@pytest.mark.parametrize("made", ["out.partial", "out.partial/moecc.lock"])
def test_an_empty_folder_of_a_killed_run_is_used(
    made: str, mixtral: Path, compile: Compile, tmp_path: Path
) -> None:
    (tmp_path / "out.partial").mkdir()
    if made != "out.partial":
        (tmp_path / made).touch()
    assert compile(mixtral, tmp_path / "out").code == 0
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


MY_MODEL_PASS = '''"""Changes nothing, once."""

from dataclasses import dataclass

from moecc.pipeline.passes import Pass


@dataclass(frozen=True, kw_only=True)
class Look(Pass):
    name = "look"

    def run(self, program, ctx):
        return False
'''


ROUNDED = MY_PASS.replace("layer.program.add(", "layer.program.rewrite(")


def test_a_resumed_run_knows_what_was_rounded(compile: Compile, tmp_path: Path) -> None:
    file, model = tmp_path / "shrink.py", checkpoint(tmp_path / "model", dtype=torch.bfloat16)
    file.write_text(ROUNDED)
    with pytest.MonkeyPatch.context() as patch:
        stop(patch, "after saving", 1, interrupt)
        assert compile(model, tmp_path / "out", f"{file}{{by=3}},vq{{rounds=1}}").code == 130
    assert compile(model, tmp_path / "out", f"{file}{{by=3}},vq{{rounds=1}}").code == 0
    name = "model.layers.0.input_layernorm.weight"
    stored = TensorFile(tmp_path / "out" / "model.safetensors")[name]
    assert stored.dtype == torch.bfloat16


def test_a_resumed_run_keeps_what_a_pass_of_ones_own_changed(
    mixtral: Path, compile: Compile, tmp_path: Path
) -> None:
    """It keeps a pass that changes no experts, and rounds that a model pass separates."""
    shrink, note = tmp_path / "shrink.py", tmp_path / "look.py"
    shrink.write_text(MY_PASS)
    note.write_text(MY_MODEL_PASS)
    passes = f"{QUICK},{note},{shrink}"
    assert compile(mixtral, tmp_path / "whole", passes).code == 0
    for stage, rounds in ((1, 1), (2, 2)):
        calls: list[int] = []

        def at_last(calls: list[int] = calls, rounds: int = rounds) -> None:
            calls.append(1)
            if len(calls) == rounds:
                raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as patch:
            stop(patch, "after saving", stage, at_last)
            assert compile(mixtral, tmp_path / "out", passes).code == 130
        with pytest.MonkeyPatch.context() as patch:
            restored = watch(patch)
            again = compile(mixtral, tmp_path / "out", passes)
        assert again.code == 0, again.err
        assert restored == [i < stage + 3 * (rounds - 1) for i in range(6)]
        assert content(tmp_path / "out") == content(tmp_path / "whole")
        shutil.rmtree(tmp_path / "out")
