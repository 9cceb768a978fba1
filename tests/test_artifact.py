"""Artifacts: the audit has every parameter and every byte, and the folder is complete and loads."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from families import ALL, FAMILIES, make
from made import EVERYTHING, QUICK, TOKENIZER, Compile, checkpoint, load, logits
from refusals import edit_config, edit_tensors
from safetensors.torch import load_file

from moecc.artifact import hf
from moecc.artifact.draft import new_folder
from moecc.checkpoint.files import TensorFile
from moecc.errors import MoeccError
from moecc.pipeline.fate import Fate
from moecc.types import Json

torch.set_num_threads(1)
pytestmark = pytest.mark.usefixtures("traced_once")
SAMPLE = ("qwen2_moe", "gpt_oss", "deepseek_v3", "nemotron_h")


class Artifact:
    """An artifact with its moecc.json and the rows of its audit by name."""

    def __init__(self, out: Path):
        self.out = out
        self.manifest: Json = json.loads((out / "moecc.json").read_text())
        self.rows: dict[str, Json] = {row["name"]: row for row in self.manifest["audit"]}

    def stored(self) -> dict[str, torch.Tensor]:
        return {k: v for f in self.out.glob("model*.safetensors") for k, v in load_file(f).items()}


Build = Callable[..., Artifact]


@pytest.fixture
def build(compile: Compile, tmp_path: Path) -> Build:
    """build(family, passes, *options): the artifact of tmp_path / "model", made if missing."""

    def run(family: str = "mixtral", passes: str = QUICK, *options: str) -> Artifact:
        model = tmp_path / "model"
        if not model.exists():
            checkpoint(model, family)
        got = compile(model, tmp_path / "out", passes, *options)
        assert got.code == 0, got.err
        return Artifact(tmp_path / "out")

    return run


def became(row: Json) -> str:
    """Return the fate of a row of moecc.json, in words."""
    return str(Fate.of_json(row["fate"]))


def on_disk(folder: Path) -> int:
    """Return the bytes of an artifact's weight files."""
    return sum(f.stat().st_size for f in folder.glob("model*.safetensors"))


# ---------------------------------------------------------------- the audit


@pytest.mark.family
@pytest.mark.parametrize("family", sorted(FAMILIES) if ALL else SAMPLE)
def test_the_audit_has_every_parameter_once_and_every_byte(
    family: str, build: Build, tmp_path: Path
) -> None:
    """Whatever passes ran, routers and gates keep the checkpoint's bits."""
    got = build(family, EVERYTHING)
    names = [row["name"] for row in got.manifest["audit"]]
    before, after = hf.load(str(tmp_path / "model"), torch.float32).state_dict(), got.stored()
    assert sorted(names) == sorted([*before, "(safetensors headers)"])
    summary = got.manifest["summary"]
    assert sum(row["nbytes"] for row in got.manifest["audit"]) == on_disk(got.out)
    assert summary["bytes"] == on_disk(got.out) == sum(summary["bytes_by_role"].values())
    routers = [n for n, row in got.rows.items() if row["role"] == "router"]
    assert routers and all(became(got.rows[n]) == "as it was" for n in routers)
    kept = [n for n, row in got.rows.items() if became(row) == "as it was"]
    assert all(torch.equal(before[n].to(after[n].dtype), after[n]) for n in kept)
    gates = [n for n in before if "shared_expert_gate" in n or "correction_bias" in n]
    assert set(gates) <= set(kept)


def test_rows_of_compressed_experts_give_fate_bytes_error_and_tokens(build: Build) -> None:
    got = build("qwen2_moe", EVERYTHING, "--bits", "3")
    routed = {n: r for n, r in got.rows.items() if r["role"] == "routed experts"}
    assert len(routed) == 4
    stored = got.stored()
    for name, row in routed.items():
        path = name.removesuffix("_proj") + "."
        parts = {k.removeprefix(path): v.nbytes for k, v in stored.items() if k.startswith(path)}
        assert row["details"]["bytes"] == parts and row["nbytes"] == sum(parts.values())
        assert {"basis", "mean_codes", "mean_codebook", "mean_scale"} <= parts.keys()
        assert "mean_signs" not in parts
        assert row["bits"] == pytest.approx(8 * row["nbytes"] / torch.Size(row["shape"]).numel())
        assert became(row) == "vq4 3 bit"
        assert 0 < row["in_sample_error"] < 1
        assert sum(row["tokens"]) == 8 * 32 * 2
    shared = [r for n, r in got.rows.items() if ".shared_expert." in n]
    assert shared and all(r["role"] == "shared expert" for r in shared)
    linear = got.rows["model.layers.0.self_attn.q_proj.weight"]
    assert became(linear).startswith("8 bit") and 8 < linear["bits"] <= 8 + 24 / 16
    assert got.rows["model.layers.0.mlp.shared_expert_gate.weight"]["fallback"] == "float: gate"


def test_a_canonical_layout_counts_for_the_parameters_behind_it(build: Build) -> None:
    got = build("gpt_oss", EVERYTHING)
    prefix = "model.layers.0.mlp.experts."
    assert got.rows[f"{prefix}gate_up_proj"]["shape"] == [4, 32, 96]
    assert got.rows[f"{prefix}gate_up_proj"]["nbytes"] > 0
    assert became(got.rows[f"{prefix}gate_up_proj_bias"]) == f"in {prefix}gate_up_proj"
    assert got.rows[f"{prefix}gate_up_proj_bias"]["nbytes"] == 0
    stored = got.stored()
    assert f"{prefix}gate_up.bias" in stored
    assert stored[f"{prefix}gate_up_proj"].shape == (0,)  # the guard


def test_dense_experts_are_rows_too(build: Build) -> None:
    got = build("mixtral", "dense{group=16}")
    routed = [r for r in got.rows.values() if r["role"] == "routed experts"]
    assert len(routed) == 4 and all(became(r) == "as it was" and r["bits"] == 32 for r in routed)
    assert got.manifest["summary"]["bits_per_weight_experts"] == 32
    assert json.loads((got.out / "config.json").read_text())["quantization_config"]["experts"] == {}


def test_a_tensor_without_a_parameter_is_named(build: Build, tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "model")
    edit_tensors(model, lambda t: t.update({"model.layers.7.odd.weight": torch.ones(3)}))
    got = build()
    row = got.rows["model.layers.7.odd.weight"]
    assert became(row) == "left out" and row["nbytes"] == 0 and row["fallback"]
    assert "model.layers.7.odd.weight" not in got.stored()


def test_tied_weights_are_stored_once(build: Build, tmp_path: Path) -> None:
    model = tmp_path / "model"
    tied = make("mixtral")
    tied.config.tie_word_embeddings = True
    tied.tie_weights()
    checkpoint(model)
    tied.save_pretrained(model)
    got = build()
    assert became(got.rows["lm_head.weight"]) == "tied to model.embed_tokens.weight"
    assert got.rows["lm_head.weight"]["nbytes"] == 0 and "lm_head.weight" not in got.stored()
    loaded = load(got.out)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_a_starved_expert_is_named(build: Build, tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "model", "qwen2_moe")
    # an expert with small logits is seldom among the two highest of four
    edit_tensors(model, lambda t: t["model.layers.0.mlp.gate.weight"][3].mul_(1e-3))
    got = build("qwen2_moe", "moments{min_tokens=100},vq{rounds=1}")
    row = next(r for n, r in got.rows.items() if "tokens" in r and "layers.0" in n)
    starved = [e for e, count in enumerate(row["tokens"]) if count < 100]
    assert starved
    assert sorted(map(int, row["starved"])) == starved
    assert set(row["starved"].values()) == {100}
    path, few = "model.layers.0.mlp.experts: ", len(starved)
    (note,) = [note for note in got.manifest["notes"] if note.startswith(path)]
    assert note.startswith(f"{path}{few} of 4 experts got fewer than 100 routed tokens, expert ")
    assert note.endswith("; calibrated on 100 sent to each on purpose")


# ---------------------------------------------------------------- files


def test_shards_load_and_add_up(
    build: Build, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = build("mixtral", EVERYTHING)
    want = logits(load(whole.out))
    whole.out.rename(tmp_path / "whole")
    monkeypatch.setattr("moecc.artifact.write.SHARD_BYTES", 20_000)
    got = build("mixtral", EVERYTHING)
    files = sorted(f.name for f in got.out.glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((got.out / "model.safetensors.index.json").read_text())["weight_map"]
    assert {n: f for f in files for n in TensorFile(got.out / f)} == index
    assert sum(row["nbytes"] for row in got.manifest["audit"]) == on_disk(got.out)
    assert torch.equal(logits(load(got.out)), want)


def test_the_folder_is_complete(build: Build) -> None:
    got = build("mixtral", QUICK)
    names = {f.name for f in got.out.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors"} <= names
    assert {"moecc.json", "report.html", *TOKENIZER} <= names
    assert got.manifest["pipeline"] == "moments,vq{codebook=layer,rounds=1}"
    assert got.manifest["seed"] == 0
    assert {"moecc", "torch", "transformers"} <= got.manifest["versions"].keys()
    assert len(got.manifest["source_digest"]) == 64 and got.manifest["calibration_digest"]
    assert [p["pass"] for p in got.manifest["passes"]] == ["moments", "vq{codebook=layer,rounds=1}"]


CODE = {
    "modeling_mine.py": "raise RuntimeError('the code of the model is run')",
    "configuration_mine.py": """from transformers import MixtralConfig
class Config(MixtralConfig): ...""",
    "tokenization_mine.py": """from transformers import PreTrainedTokenizerFast
class Mine(PreTrainedTokenizerFast): ...""",
}


@pytest.mark.parametrize("tokenizer", [False, True])
def test_code_beside_a_known_family_is_for_its_tokenizer(
    tokenizer: bool, build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Code is copied only if the tokenizer needs it; the model is transformers' own in any case."""
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules")
    )
    model = checkpoint(tmp_path / "model")
    for name, text in CODE.items():
        (model / name).write_text(text)
    classes = {"AutoConfig": "configuration_mine.Config"}
    edit_config(model, auto_map={**classes, "AutoModelForCausalLM": "modeling_mine.Model"})
    if tokenizer:
        file = model / "tokenizer_config.json"
        mapped = {"auto_map": {"AutoTokenizer": [None, "tokenization_mine.Mine"]}}
        file.write_text(json.dumps({**json.loads(file.read_text()), **mapped}))
    got = build("mixtral", QUICK, "--trust-remote-code")
    assert {f.name for f in got.out.glob("*.py")} == (set(CODE) if tokenizer else set())
    assert logits(load(got.out)).isfinite().all()


def test_a_folder_that_is_written_obeys_the_umask_and_names_the_file_at_fault(
    tmp_path: Path,
) -> None:
    before = os.umask(0o027)
    try:
        with new_folder(tmp_path / "out"):
            pass
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750
    missing, full = tmp_path / "missing", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with (
        pytest.raises(MoeccError, match=re.escape(f"can't read {missing}: No such file")),
        new_folder(tmp_path / "b"),
    ):
        missing.read_text()
    with (
        pytest.raises(MoeccError, match=re.escape(f"writing {tmp_path / 'b'} failed: No space")),
        new_folder(tmp_path / "b"),
    ):
        raise full
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
