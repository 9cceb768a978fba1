"""`moecc compile` from the checkpoint to the folder: every family, byte-equal runs, resuming, loading in transformers.

A sample of the families by default; MOECC_ALL_FAMILIES=1 runs all of tests/families.py.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import ALL, FAMILIES, make
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from moecc import cli
from moecc.artifact import verify
from moecc.checkpoint.files import TensorFile, write_safetensors
from moecc.commands.compile import compile_model
from moecc.errors import MoeccError
from moecc.frontend import experts
from moecc.pipeline import journal

torch.set_num_threads(1)
pytestmark = pytest.mark.usefixtures("traced_once")
SAMPLE = (
    "mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss", "llama4_text", "dbrx", "nemotron_h", "jetmoe", "muse_spark_text",
)  # fmt: skip
EVERYTHING = "kbvq{rank=4,mean=2},vsraq{steps=3},dense{group=16}"
QUICK = "vq{rounds=1,codebook=layer}"
ROWS = ("--rows", "8", "--length", "32")

# transformers' own generate() fails on these tiny configurations, compressed or not: a hybrid cache whose layers are all
# linear attention has no sequence length.
NO_GENERATE = ("bailing_hybrid", "kimi_linear", "qwen4_exp_text")


# ---------------------------------------------------------------- what the tests start from


def tokenizer() -> Any:
    """One token per character, 64 of them as the tiny models have, no token in front."""
    special, letters = (
        ["<pad>", "<s>", "</s>", "<unk>"],
        "abcdefghijklmnopqrstuvwxyz0123456789 \n.,:;()[]{}=_-+*/'\"<>#",
    )
    vocabulary = {token: i for i, token in enumerate([*special, *letters][:64])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        unk_token="<unk>",
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
    )


# Sizes that tests/families.py leaves as the real model has them, and that make a compilation take minutes.
SMALLER: dict[str, dict[str, Any]] = {
    "muse_spark_text": dict(moe_hidden_size=32),
    "glm5_next_text": dict(linear_num_heads=2, linear_head_dim=8),
    "kimi_linear": dict(linear_num_heads=2, linear_head_dim=8),
}


def checkpoint(
    folder: Path, family: str = "mixtral", dtype: torch.dtype = torch.float32, **config: Any
) -> Path:
    """A tiny model of a family, as a checkpoint with its tokenizer. config: what is to be other than in tests/families.py."""
    entry = FAMILIES[family]
    smaller = replace(entry, config={**entry.config, **SMALLER.get(family, {}), **config})
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, family, smaller)
        make(family, dtype).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


class Run:
    """What one command left: exit code, stdout, stderr."""

    def __init__(self, capsys: pytest.CaptureFixture[str], *args: str | Path):
        capsys.readouterr()
        self.code = cli.main([str(a) for a in args])
        self.out, self.err = capsys.readouterr()

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def compile(capsys: pytest.CaptureFixture[str]) -> Any:
    """compile(model, out, passes, *options): the run of `moecc compile --json` over eight rows of 32 tokens."""

    def run(model: Path, out: Path, passes: str = QUICK, *options: str | Path) -> Run:
        return Run(
            capsys, "compile", model, "--passes", passes, "-o", out, *ROWS, "--json", *options
        )

    return run


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("mixtral"))


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, by its relative path."""
    return {
        str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()
    }


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


PROMPT = torch.tensor([[5, 9, 12, 20, 33, 7, 8, 41, 17, 17, 30, 6]])


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(input_ids=PROMPT).logits
    return found


@torch.no_grad()
def greedy(model: Any, ids: Tensor, steps: int) -> Tensor:
    """Argmax decoding without a cache."""
    for _ in range(steps):
        ids = torch.cat([ids, model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return ids


def generated(model: Any, ids: Tensor, steps: int) -> Tensor:
    """What generate() makes of it with its cache; not stopped by an end-of-text token."""
    model.generation_config.eos_token_id = None
    made: Tensor = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=steps,
        do_sample=False,
        use_cache=True,
    )
    return made


# ---------------------------------------------------------------- every family


@pytest.mark.family
@pytest.mark.parametrize("family", sorted(FAMILIES) if ALL else SAMPLE)
def test_a_family_compiles_reloads_and_generates(family: str, compile: Any, tmp_path: Path) -> None:
    model, out = checkpoint(tmp_path / "model", family), tmp_path / "out"
    got = compile(model, out, EVERYTHING)
    assert got.code == 0, got.err
    assert (
        got.json["reload_difference"] <= verify.TOLERANCE
        and got.json["reloaded_by"] == "transformers"
    )
    assert (
        got.json["passes"]
        == "sensitivity,moments,klt{rank=4,mean=2},vq,affine,fold,vsraq{steps=3},dense{group=16}"
    )
    assert {p.name for p in tmp_path.iterdir()} == {"model", "out"}
    config = AutoConfig.from_pretrained(out)
    assert config.quantization_config["experts"]
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or family in NO_GENERATE:
        return
    loaded = load(out)
    assert any(isinstance(m, experts.CompressedProjection) for m in loaded.modules())
    assert generated(loaded, PROMPT, 6).tolist() == greedy(loaded, PROMPT, 6).tolist()


def test_bits_set_the_codes_and_more_are_closer(
    mixtral: Path, compile: Any, tmp_path: Path
) -> None:
    want, distance = logits(load(mixtral)), []
    for bits in (2, 3, 4):
        out = tmp_path / str(bits)
        got = compile(mixtral, out, "kbvq{rank=0,codebook=layer}", "--bits", bits)
        assert got.code == 0, got.err
        assert ("signs" in "".join(TensorFile(out / "model.safetensors"))) == (bits == 3)
        codes = TensorFile(out / "model.safetensors").entries[
            "model.layers.0.mlp.experts.gate_up.codes"
        ]
        assert codes.dtype == torch.uint8 and codes.shape == (4, 96, 32 // (2 if bits == 4 else 4))
        distance.append(float((logits(load(out)) - want).norm()))
    assert distance[0] > distance[1] > distance[2]


# ---------------------------------------------------------------- the same run gives the same bytes


def test_the_same_seed_gives_the_same_bytes(mixtral: Path, compile: Any, tmp_path: Path) -> None:
    runs = {
        "a": ("--seed", 7),
        "b": ("--seed", 7),
        "seed": ("--seed", 8),
        "bits": ("--seed", 7, "--bits", 3),
    }
    for name, options in runs.items():
        assert compile(mixtral, tmp_path / name, EVERYTHING, *options).code == 0
    first = content(tmp_path / "a")
    assert {
        "config.json",
        "model.safetensors",
        "moecc.json",
        "report.html",
        "tokenizer.json",
    } <= first.keys()
    assert content(tmp_path / "b") == first
    for name in ("seed", "bits"):
        assert content(tmp_path / name)["model.safetensors"] != first["model.safetensors"]


@pytest.fixture(scope="module")
def whole(mixtral: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a run that nothing stops writes."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert cli.main(["compile", str(mixtral), "--passes", EVERYTHING, "-o", str(out), *ROWS]) == 0
    return content(out)


def stop(patch: pytest.MonkeyPatch, where: str, stage: int, how: Any) -> None:
    """Have the next run stop by calling `how` at some point of its way."""
    save, write = journal.Journal.save, write_safetensors

    def saving(self: Any, at: int, *rest: Any) -> None:
        if where == "before saving" and at == stage:
            how()
        save(self, at, *rest)
        if where == "after saving" and at == stage:
            how()

    patch.setattr(journal.Journal, "save", saving)
    patch.setattr(
        "moecc.artifact.write.write_safetensors",
        lambda *args: how() if where == "writing" else write(*args),
    )


def interrupt() -> None:
    raise KeyboardInterrupt


def watch(patch: pytest.MonkeyPatch) -> list[bool]:
    """Which stages the next run restores."""
    restored: list[bool] = []
    original = journal.Journal.restore

    def restore(self: Any, *rest: Any) -> bool:
        restored.append(original(self, *rest))
        return restored[-1]

    patch.setattr(journal.Journal, "restore", restore)
    return restored


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
    compile: Any,
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
    assert restored == [
        i < finished for i in range(6)
    ]  # vsraq goes through the layers in a round of its own
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert content(out) == whole


KILLED = """
import os, sys
sys.path.insert(0, os.path.dirname(sys.argv[1]))
import pytest, test_compile
from moecc import cli
test_compile.stop(pytest.MonkeyPatch(), "after saving", 2, lambda: os._exit(9))
sys.exit(cli.main(sys.argv[2:]))
"""


def test_a_killed_process_goes_on_and_ends_the_same(
    mixtral: Path, whole: dict[str, bytes], compile: Any, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    args = ("compile", mixtral, "--passes", EVERYTHING, "-o", out, *ROWS)
    assert (
        subprocess.run(
            [sys.executable, "-c", KILLED, __file__, *args], capture_output=True
        ).returncode
        == 9
    )
    again = compile(mixtral, out, EVERYTHING)
    assert again.code == 0 and "2 stages of it are finished" in again.err
    assert content(out) == whole


MODEL_PASSES = "kbvq{bits=3.5},rilq{steps=4,rank=2,lr=15},merge"


@pytest.fixture(scope="module")
def whole_model(mixtral: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What passes over the whole model write when nothing stops them."""
    out = tmp_path_factory.mktemp("whole_model") / "out"
    assert cli.main(["compile", str(mixtral), "--passes", MODEL_PASSES, "-o", str(out), *ROWS]) == 0
    return content(out)


@pytest.mark.parametrize("stopped", ["sensitivity routing", "budget", "rilq"])
def test_passes_over_the_whole_model_find_the_work_of_an_interrupted_run(
    stopped: str, mixtral: Path, whole_model: dict[str, bytes], compile: Any, tmp_path: Path
) -> None:
    """Interrupted after the first thing that is kept under a key, then behind all of them; rilq's first check is one of four."""
    kept: list[str] = []
    keep = journal.Journal.keep

    def keeping(self: Any, key: str, work: Any) -> Any:
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
        patch.setattr(journal.Journal, "keep", None)  # nothing is left to be done
        again = compile(mixtral, tmp_path / "out", MODEL_PASSES)
    assert again.code == 0, again.err
    assert content(tmp_path / "out") == whole_model


def test_kept_work_that_cannot_be_read_is_done_again(
    mixtral: Path, whole_model: dict[str, bytes], compile: Any, tmp_path: Path
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        stop(patch, "writing", 0, interrupt)
        assert compile(mixtral, tmp_path / "out", MODEL_PASSES).code == 130
    for file in (tmp_path / "out.partial" / "journal").glob("kept-*"):
        file.write_bytes(file.read_bytes()[:-1])
    assert compile(mixtral, tmp_path / "out", MODEL_PASSES).code == 0
    assert content(tmp_path / "out") == whole_model


def test_a_terminated_run_goes_on_too(
    mixtral: Path, whole: dict[str, bytes], compile: Any, tmp_path: Path
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        stop(patch, "after saving", 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        got = compile(mixtral, tmp_path / "out", EVERYTHING)
    assert got.code == 143 and got.out == "" and got.err.endswith("moecc: terminated\n")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    again = compile(mixtral, tmp_path / "out", EVERYTHING)
    assert again.code == 0 and "2 stages of it are finished" in again.err
    assert content(tmp_path / "out") == whole


def test_what_another_run_left_is_not_touched(mixtral: Path, compile: Any, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        stop(patch, "after saving", 1, interrupt)
        assert compile(mixtral, tmp_path / "out").code == 130
    before = content(tmp_path)
    got = compile(mixtral, tmp_path / "out", QUICK, "--seed", 1)
    last = got.err.splitlines()[-1]
    assert (
        got.code == 2
        and last.startswith("moecc: error: ")
        and "(seed was 0, now 1); remove " in last
    )
    assert f"{tmp_path}/out.partial belongs to another run" in last
    got = compile(mixtral, tmp_path / "out", QUICK, "--length", 16)
    assert re.search(r"calibration was [0-9a-f]{8}, now [0-9a-f]{8}\); remove", got.err)
    assert content(tmp_path) == before
    damaged = next((tmp_path / "out.partial" / "journal").glob("layer-*.safetensors"))
    damaged.write_bytes(damaged.read_bytes()[:-1])  # then that layer is done again
    with pytest.MonkeyPatch.context() as patch:
        restored = watch(patch)
        assert compile(mixtral, tmp_path / "out").code == 0
    assert restored == [False] * 3
    assert compile(mixtral, tmp_path / "whole").code == 0
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_a_folder_that_another_run_writes_is_left_alone(
    mixtral: Path, compile: Any, tmp_path: Path
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        got: list[Run] = []
        stop(patch, "after saving", 2, lambda: got.append(compile(mixtral, tmp_path / "out")))
        assert compile(mixtral, tmp_path / "out").code == 0
    assert [g.code for g in got] == [2]
    assert got[0].err.splitlines()[-1] == (
        f"moecc: error: {tmp_path}/out.partial is in use by another run; wait for it, or choose another output folder"
    )
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_fault_of_our_own_leaves_nothing_behind(
    mixtral: Path, compile: Any, tmp_path: Path
) -> None:
    def fault() -> None:
        raise RuntimeError("this should not happen")

    with pytest.MonkeyPatch.context() as patch:
        stop(patch, "writing", 0, fault)
        got = compile(mixtral, tmp_path / "out")
    assert got.code == 3 and "internal error: RuntimeError: this should not happen" in got.err
    assert list(tmp_path.iterdir()) == []


def test_a_round_notes_only_what_it_changed(mixtral: Path, compile: Any, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        stop(patch, "writing", 0, interrupt)
        assert compile(mixtral, tmp_path / "out", EVERYTHING).code == 130
    files = [
        TensorFile(tmp_path / f"out.partial/journal/layer-{i}-0001.safetensors") for i in (0, 1)
    ]
    coded, tuned = ({n for n in file if ".experts." in n} for file in files)
    assert {n.rpartition(".")[2] for n in coded} >= {"codes", "scale", "codebook", "mean_codes"}
    assert tuned and not any(n.endswith(("codes", "signs")) for n in tuned)


# ---------------------------------------------------------------- options


def test_dump_writes_each_layer_after_every_pass_and_the_whole_after_the_last(
    mixtral: Path, compile: Any, tmp_path: Path
) -> None:
    dump = tmp_path / "dump"
    assert compile(mixtral, tmp_path / "out", QUICK, "--dump", dump).code == 0
    texts = {f.name: f.read_text() for f in dump.iterdir()}
    layers = {f"layer{i:03d}-{p}.txt" for i in (1, 2, 3) for p in ("moments", "vq")}
    assert texts.keys() == {"00-traced.txt", "02-after-vq.txt", *layers}
    counts = {name: text.count("= moecc.vq_experts(") for name, text in texts.items()}
    assert (counts["00-traced.txt"], counts["layer001-moments.txt"], counts["layer001-vq.txt"]) == (
        0,
        0,
        1,
    )
    assert counts["layer002-vq.txt"] == 1 and counts["02-after-vq.txt"] == 2
    assert texts["00-traced.txt"].count("= moecc.experts(") == 2


def test_a_run_that_goes_on_goes_on_with_its_dump(
    mixtral: Path, compile: Any, tmp_path: Path
) -> None:
    dump = tmp_path / "dump"
    with pytest.MonkeyPatch.context() as patch:
        stop(patch, "after saving", 1, interrupt)
        assert compile(mixtral, tmp_path / "out", QUICK, "--dump", dump).code == 130
    assert (dump / "layer001-vq.txt").is_file()
    assert compile(mixtral, tmp_path / "out", QUICK, "--dump", dump).code == 0
    assert (dump / "02-after-vq.txt").is_file()


@pytest.mark.parametrize("made", ["out.partial", "out.partial/journal"])
def test_an_empty_folder_of_a_killed_run_is_taken(
    made: str, mixtral: Path, compile: Any, tmp_path: Path
) -> None:
    (tmp_path / made).mkdir(parents=True)
    assert compile(mixtral, tmp_path / "out").code == 0
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


MY_PASS = '''"""Halves the first layer's norm."""

from dataclasses import dataclass

from moecc.pipeline.passes import LayerPass, option


@dataclass(frozen=True, kw_only=True)
class Shrink(LayerPass):
    name = "shrink"
    by: float = option(2.0, help="divisor", low=1, high=8)

    def run_layer(self, layer, ctx):
        if layer.index != 1:
            return False
        weight = "model.layers.0.input_layernorm.weight"
        layer.program.add(weight, layer.program.read(weight) / self.by)
        return True
'''

MY_MODEL_PASS = '''"""Changes nothing, once."""

from dataclasses import dataclass

from moecc.pipeline.passes import Pass


@dataclass(frozen=True, kw_only=True)
class Look(Pass):
    name = "look"

    def run(self, program, ctx):
        return False
'''


def test_a_pass_of_ones_own_by_path(mixtral: Path, compile: Any, tmp_path: Path) -> None:
    file = tmp_path / "shrink.py"
    file.write_text(MY_PASS)
    got = compile(mixtral, tmp_path / "out", f"{file}{{by=4}},vq{{rounds=1}}")
    assert got.code == 0, got.err
    name = "model.layers.0.input_layernorm.weight"
    stored = TensorFile(tmp_path / "out" / "model.safetensors")[name]
    assert torch.equal(stored, TensorFile(mixtral / "model.safetensors")[name] / 4)
    manifest = json.loads((tmp_path / "out" / "moecc.json").read_text())
    assert next(row["fate"] for row in manifest["audit"] if row["name"] == name) == {
        "kind": "rewritten"
    }
    wrong = compile(mixtral, tmp_path / "no", f"{file}{{by=9}}")
    assert wrong.code == 2 and "shrink: by=9.0 is out of range" in wrong.err


ROUNDED = MY_PASS.replace("layer.program.add(", "layer.program.rewrite(")


def test_a_resumed_run_knows_what_was_rounded(compile: Any, tmp_path: Path) -> None:
    file, model = tmp_path / "shrink.py", checkpoint(tmp_path / "model", dtype=torch.bfloat16)
    file.write_text(ROUNDED)
    with pytest.MonkeyPatch.context() as patch:
        stop(patch, "after saving", 1, interrupt)
        assert compile(model, tmp_path / "out", f"{file}{{by=3}},vq{{rounds=1}}").code == 130
    assert compile(model, tmp_path / "out", f"{file}{{by=3}},vq{{rounds=1}}").code == 0
    stored = TensorFile(tmp_path / "out" / "model.safetensors")[
        "model.layers.0.input_layernorm.weight"
    ]
    assert stored.dtype == torch.bfloat16


def test_a_resumed_run_keeps_what_a_pass_of_ones_own_changed(
    mixtral: Path, compile: Any, tmp_path: Path
) -> None:
    """Also where it changed no experts, and where a model pass separates two rounds of layer passes."""
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


def test_from_python(mixtral: Path, tmp_path: Path) -> None:
    said: list[str] = []
    got = compile_model(
        str(mixtral), QUICK, tmp_path / "out", bits=4, rows=4, length=16, seed=3, say=said.append
    )
    assert got["out"] == str(tmp_path / "out") and got["reload_difference"] <= verify.TOLERANCE
    assert said[0].startswith("vq requires 'moments'") and any(
        line.startswith("pipeline: ") for line in said
    )
    assert 4 < got["bits_per_weight_experts"] < 7
    with pytest.raises(MoeccError, match=r"exists; choose another"):
        compile_model(str(mixtral), QUICK, tmp_path / "out", say=said.append)


def test_dense_alone_needs_no_text(
    tmp_path: Path, mixtral: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for name in ("config.json", "model.safetensors"):  # no tokenizer
        (model / name).write_bytes((mixtral / name).read_bytes())
    got = Run(
        capsys, "compile", model, "--passes", "dense{group=16}", "-o", tmp_path / "out", "--json"
    )
    assert (
        got.code == 0
        and json.loads((tmp_path / "out" / "moecc.json").read_text())["calibration_digest"] == ""
    )


def test_an_artifact_is_not_compiled_again(mixtral: Path, compile: Any, tmp_path: Path) -> None:
    assert compile(mixtral, tmp_path / "out").code == 0
    again = compile(tmp_path / "out", tmp_path / "twice")
    assert again.code == 2 and "compressed already" in again.err.splitlines()[-1]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


# ---------------------------------------------------------------- in transformers


FRESH = """
import sys, torch, moecc
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
ids = torch.tensor([[5, 9, 12]])
print(model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False).tolist()[0])
"""


def test_a_fresh_process_loads_an_artifact(compile: Any, tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "model", "qwen2_moe", torch.bfloat16)
    assert compile(model, tmp_path / "out", EVERYTHING).code == 0
    got = subprocess.run(
        [sys.executable, "-c", FRESH, tmp_path / "out"], capture_output=True, text=True
    )
    assert got.returncode == 0, got.stderr
    assert "MISSING" not in got.stderr and "UNEXPECTED" not in got.stderr
    loaded = load(tmp_path / "out", torch.bfloat16)
    assert json.loads(got.stdout) == generated(loaded, torch.tensor([[5, 9, 12]]), 4)[0].tolist()


def test_compressed_tensors_keep_their_types_in_any_dtype(compile: Any, tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "model", "gpt_oss")
    assert compile(model, tmp_path / "out", EVERYTHING, "--bits", 3).code == 0
    stored = TensorFile(tmp_path / "out" / "model.safetensors").entries
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        loaded = load(tmp_path / "out", dtype)
        parts = (experts.CompressedProjection, experts.QuantizedLinear)
        compressed = {p: m for p, m in loaded.named_modules() if isinstance(m, parts)}
        kinds = set()
        for path, module in compressed.items():
            for name, buffer in module.named_buffers():
                kinds.add(buffer.dtype)
                assert buffer.dtype == stored[f"{path}.{name}"].dtype or name == "bias", (
                    f"{path}.{name}"
                )
        assert {torch.uint8, torch.int8, torch.float16} <= kinds
        assert loaded.lm_head.weight.dtype == dtype
        got = logits(loaded)
        assert got.dtype == dtype and bool(torch.isfinite(got).all())


def test_saving_a_loaded_artifact_gives_the_same_tensors(
    mixtral: Path, compile: Any, tmp_path: Path
) -> None:
    assert compile(mixtral, tmp_path / "out", EVERYTHING).code == 0
    load(tmp_path / "out").save_pretrained(tmp_path / "again")
    first, second = (TensorFile(tmp_path / n / "model.safetensors") for n in ("out", "again"))
    for name in first:
        assert torch.equal(first[name], second[name]), name
    assert torch.equal(logits(load(tmp_path / "again")), logits(load(tmp_path / "out")))


# ---------------------------------------------------------------- adapters


def test_adapters_are_merged_into_the_checkpoint_s_own_type(compile: Any, tmp_path: Path) -> None:
    """A trained adapter comes first, those that are trained on the compressed model are gone at the end; nothing grows."""
    model = checkpoint(tmp_path / "model", "qwen2_moe", torch.bfloat16)
    folder, name = tmp_path / "adapter", "model.layers.0.self_attn.o_proj"
    folder.mkdir()
    pair = {
        f"base_model.model.{name}.lora_{k}.weight": torch.randn(s) * 0.2
        for k, s in (("A", (2, 32)), ("B", (32, 2)))
    }
    save_file(pair, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4})
    )

    passes = f"rilq{{steps=10,rank=2,lr=15,patience=9}},merge,kbvq{{rank=2}},lora{{path={folder}}}"
    got = compile(model, tmp_path / "out", passes)
    assert got.code == 0, got.err
    assert (
        "lora{path=" in got.err
        and ",fold,rilq{" in got.err
        and got.json["passes"].endswith(",merge")
    )
    audit = {
        row["name"]: row
        for row in json.loads((tmp_path / "out" / "moecc.json").read_text())["audit"]
    }
    row = audit[f"{name}.weight"]
    assert (row["fate"]["kind"], row["bits"], row["role"]) == ("rewritten", 16.0, "attention")
    before, after = (
        load(f).get_parameter(f"{name}.weight").detach() for f in (model, tmp_path / "out")
    )
    a, b = pair.values()
    assert float((after - before - 2 * b @ a).norm()) < 0.2 * float((2 * b @ a).norm())

    save_file({k: v * 2 for k, v in pair.items()}, folder / "adapter_model.safetensors")
    other = compile(model, tmp_path / "other", f"lora{{path={folder}}}")
    assert other.code == 0, other.err
    moved = load(tmp_path / "other").get_parameter(f"{name}.weight").detach()
    torch.testing.assert_close(moved, (before + 8 * b @ a).bfloat16().float())
    assert "vq" not in (tmp_path / "other" / "config.json").read_text()
