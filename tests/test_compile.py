"""`moecc compile` from checkpoint to folder: families, options, adapters, loading in transformers.

A sample of the families by default; MOECC_ALL_FAMILIES=1 runs all of tests/families.py.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from families import ALL, FAMILIES
from made import (
    EVERYTHING,
    MY_PASS,
    PROMPT,
    QUICK,
    Compile,
    Run,
    checkpoint,
    generated,
    greedy,
    load,
    logits,
)
from refusals import Refused, edit_tensors
from safetensors.torch import save_file
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from moecc.artifact import verify
from moecc.checkpoint.files import TensorFile
from moecc.checkpoint.schema import Compression
from moecc.commands.compile import compile_model
from moecc.errors import MoeccError
from moecc.frontend.compressed import CompressedProjection, QuantizedLinear

pytestmark = pytest.mark.usefixtures("traced_once")


SAMPLE = (
    "mixtral",
    "qwen2_moe",
    "deepseek_v3",
    "gpt_oss",
    "llama4_text",
    "dbrx",
    "nemotron_h",
    "jetmoe",
    "muse_spark_text",
)
# transformers' own generate() fails on these tiny configurations, compressed or not: a hybrid cache
# whose layers are all linear attention has no sequence length.
NO_GENERATE = ("bailing_hybrid", "kimi_linear", "qwen4_exp_text")


# ---------------------------------------------------------------- every family


@pytest.mark.family
@pytest.mark.parametrize("family", sorted(FAMILIES) if ALL else SAMPLE)
def test_a_family_compiles_reloads_and_generates(
    family: str, compile: Compile, tmp_path: Path
) -> None:
    model, out = checkpoint(tmp_path / "model", family), tmp_path / "out"
    got = compile(model, out, EVERYTHING)
    assert got.code == 0, got.err
    assert got.json["reload_difference"] <= verify.TOLERANCE
    assert got.json["reloaded_by"] == "transformers"
    experts_passes = "sensitivity,moments,klt{rank=4,mean=2},vq,affine,fold,vsraq{steps=3}"
    assert got.json["passes"] == f"{experts_passes},dense{{group=16}}"
    assert {p.name for p in tmp_path.iterdir()} == {"model", "out"}
    config = AutoConfig.from_pretrained(out)
    assert config.quantization_config["experts"]
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or family in NO_GENERATE:
        return
    loaded = load(out)
    assert any(isinstance(m, CompressedProjection) for m in loaded.modules())
    assert generated(loaded, PROMPT, 6).tolist() == greedy(loaded, PROMPT, 6).tolist()


def test_bits_choose_the_codes_and_more_bits_come_closer(
    mixtral: Path, compile: Compile, tmp_path: Path
) -> None:
    want, distance = logits(load(mixtral)), []
    for bits in (2, 3, 4):
        out = tmp_path / str(bits)
        got = compile(mixtral, out, "kbvq{rank=0,codebook=layer}", "--bits", bits)
        assert got.code == 0, got.err
        stored = TensorFile(out / "model.safetensors")
        assert ("signs" in "".join(stored)) == (bits == 3)
        codes = stored.entries["model.layers.0.mlp.experts.gate_up.codes"]
        assert codes.dtype == torch.uint8 and codes.shape == (4, 96, 32 // (2 if bits == 4 else 4))
        distance.append(float((logits(load(out)) - want).norm()))
    assert distance[0] > distance[1] > distance[2]


# ---------------------------------------------------------------- options


def test_weights_that_are_changed_during_the_run_are_noticed(
    model: Path, tmp_path: Path, compile: Compile, monkeypatch: pytest.MonkeyPatch
) -> None:
    def late(*args: object) -> None:
        edit_tensors(model, lambda tensors: tensors["model.norm.weight"].mul_(2))

    monkeypatch.setattr("moecc.commands.compile.write_report", late)
    run = compile(model, tmp_path / "out", "dense{group=16}")
    assert run.code == 2 and f"{model} was changed during the run; run again\n" in run.err
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_dump_writes_each_layer_after_every_pass_and_the_whole_after_the_last(
    mixtral: Path, compile: Compile, tmp_path: Path
) -> None:
    dump = tmp_path / "dump"
    assert compile(mixtral, tmp_path / "out", QUICK, "--dump", dump).code == 0
    texts = {f.name: f.read_text() for f in dump.iterdir()}
    layers = {f"layer{i:03d}-{p}.txt" for i in (1, 2, 3) for p in ("moments", "vq")}
    assert texts.keys() == {"00-traced.txt", "02-after-vq.txt", *layers}
    counts = {name: text.count("= moecc.vq_experts(") for name, text in texts.items()}
    assert counts["00-traced.txt"] == counts["layer001-moments.txt"] == 0
    assert counts["layer001-vq.txt"] == 1
    assert counts["layer002-vq.txt"] == 1 and counts["02-after-vq.txt"] == 2
    assert texts["00-traced.txt"].count("= moecc.experts(") == 2


def test_a_dump_of_a_run_that_failed_is_replaced(
    mixtral: Path, compile: Compile, tmp_path: Path
) -> None:
    """The texts up to the failure can be read; the user's files among them stay."""
    dump, wrong = tmp_path / "dump", tmp_path / "wrong.py"
    wrong.write_text(MY_PASS.replace("return True", "return None"), encoding="utf-8")
    assert compile(mixtral, tmp_path / "out", f"{wrong},vq", "--dump", dump).code == 2
    assert {f.name for f in dump.iterdir()} == {"00-traced.txt", "moecc.unfinished"}
    (dump / "00-traced.txt").rename(dump / "kept.txt")
    (dump / "unfinished").write_text("kept.txt\n", encoding="utf-8")
    assert compile(mixtral, tmp_path / "out", "dense{group=16}", "--dump", dump).code == 0
    names = {f.name for f in dump.iterdir()}
    assert {"kept.txt", "unfinished", "00-traced.txt", "01-after-dense.txt"} <= names
    assert "moecc.unfinished" not in names and not any("shrink" in name for name in names)
    again = compile(mixtral, tmp_path / "new", QUICK, "--dump", dump)
    assert again.code == 2 and "dump is not empty; give a new folder" in again.err


def test_a_pass_of_ones_own_by_path(mixtral: Path, compile: Compile, tmp_path: Path) -> None:
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


def test_compile_model_can_be_called_from_python(mixtral: Path, tmp_path: Path) -> None:
    said: list[str] = []
    got = compile_model(
        str(mixtral), QUICK, tmp_path / "out", bits=4, rows=4, length=16, seed=3, say=said.append
    )
    assert got["out"] == str(tmp_path / "out") and got["reload_difference"] <= verify.TOLERANCE
    assert said[0].startswith("vq requires 'moments'")
    assert any(line.startswith("pipeline: ") for line in said)
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
    args = model, "--passes", "dense{group=16}", "-o", tmp_path / "out", "--json"
    assert Run(capsys, "compile", *args).code == 0
    manifest = json.loads((tmp_path / "out" / "moecc.json").read_text())
    assert manifest["calibration_digest"] == ""


def test_an_artifact_is_not_compiled_again(mixtral: Path, compile: Compile, tmp_path: Path) -> None:
    assert compile(mixtral, tmp_path / "out").code == 0
    again = compile(tmp_path / "out", tmp_path / "twice")
    assert again.code == 2 and "compressed already" in again.err.splitlines()[-1]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


# ---------------------------------------------------------------- in transformers


def test_compressed_tensors_keep_their_types_in_any_dtype(compile: Compile, tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "model", "gpt_oss")
    assert compile(model, tmp_path / "out", EVERYTHING, "--bits", 3).code == 0
    stored = TensorFile(tmp_path / "out" / "model.safetensors").entries
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        loaded = load(tmp_path / "out", dtype)
        parts = (CompressedProjection, QuantizedLinear)
        compressed = {p: m for p, m in loaded.named_modules() if isinstance(m, parts)}
        kinds = set()
        for path, module in compressed.items():
            for name, buffer in module.named_buffers():
                kinds.add(buffer.dtype)
                full = f"{path}.{name}"
                assert buffer.dtype == stored[full].dtype or name == "bias", full
        assert {torch.uint8, torch.int8, torch.float16} <= kinds
        assert loaded.lm_head.weight.dtype == dtype
        got = logits(loaded)
        assert got.dtype == dtype and bool(torch.isfinite(got).all())


def test_saving_a_loaded_artifact_gives_the_same_tensors(
    mixtral: Path, compile: Compile, tmp_path: Path
) -> None:
    assert compile(mixtral, tmp_path / "out", EVERYTHING).code == 0
    load(tmp_path / "out").save_pretrained(tmp_path / "again")
    first, second = (TensorFile(tmp_path / n / "model.safetensors") for n in ("out", "again"))
    guard = Compression.of(AutoConfig.from_pretrained(tmp_path / "again")).guard
    assert guard and set(first) - set(second) <= set(guard)
    for name in set(first) - set(guard):
        assert torch.equal(first[name], second[name]), name
    assert torch.equal(logits(load(tmp_path / "again")), logits(load(tmp_path / "out")))


# ---------------------------------------------------------------- adapters


def test_adapters_are_merged_in_the_dtype_of_the_checkpoint(
    compile: Compile, tmp_path: Path
) -> None:
    """A given adapter is merged first; rilq's adapters are merged at the end; no tensor grows."""
    model = checkpoint(tmp_path / "model", "qwen2_moe", torch.bfloat16)
    folder, name = tmp_path / "adapter", "model.layers.0.self_attn.o_proj"
    folder.mkdir()
    a, b = torch.randn(2, 32) * 0.2, torch.randn(32, 2) * 0.2
    prefix = f"base_model.model.{name}.lora_"
    pair = {f"{prefix}A.weight": a, f"{prefix}B.weight": b}
    save_file(pair, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
    (folder / "adapter_config.json").write_text(json.dumps(config))

    passes = f"rilq{{steps=10,rank=2,lr=15,patience=9}},merge,kbvq{{rank=2}},lora{{path={folder}}}"
    got = compile(model, tmp_path / "out", passes)
    assert got.code == 0, got.err
    assert "lora{path=" in got.err and ",fold,rilq{" in got.err
    assert got.json["passes"].endswith(",merge")
    rows = json.loads((tmp_path / "out" / "moecc.json").read_text())["audit"]
    (row,) = (r for r in rows if r["name"] == f"{name}.weight")
    assert (row["fate"]["kind"], row["bits"], row["role"]) == ("rewritten", 16.0, "attention")
    before, after = (
        load(f).get_parameter(f"{name}.weight").detach() for f in (model, tmp_path / "out")
    )
    assert float((after - before - 2 * b @ a).norm()) < 0.2 * float((2 * b @ a).norm())

    save_file({k: v * 2 for k, v in pair.items()}, folder / "adapter_model.safetensors")
    other = compile(model, tmp_path / "other", f"lora{{path={folder}}}")
    assert other.code == 0, other.err
    moved = load(tmp_path / "other").get_parameter(f"{name}.weight").detach()
    torch.testing.assert_close(moved, (before + 8 * b @ a).bfloat16().float())
    assert "vq" not in (tmp_path / "other" / "config.json").read_text()


# ---------------------------------------------------------------- memory


TELLING_PASS = '''"""Notes the bytes that passes may take beyond the plan."""

from dataclasses import dataclass

from moecc.pipeline.passes import Pass


@dataclass(frozen=True, kw_only=True)
class Telling(Pass):
    name = "telling"

    def run(self, program, ctx):
        ctx.notes.append(f"{ctx.spare} bytes to spare")
        return False
'''


def test_a_bound_on_memory_reaches_the_passes(
    model: Path, compile: Compile, tmp_path: Path
) -> None:
    file = tmp_path / "telling.py"
    file.write_text(TELLING_PASS, encoding="utf-8")
    got = compile(model, tmp_path / "out", str(file), "--max-memory", "8GiB", "--workers", 1)
    assert got.code == 0, got.err
    (spare,) = re.findall(r"(\d+) bytes to spare", got.err)
    (planned,) = re.findall(r"about ([\d.]+) MB of memory", got.err)
    assert int(spare) + float(planned) * 1e6 == pytest.approx(8 << 30, abs=1e4)


def test_what_was_written_is_checked_within_the_bound(
    model: Path, compile: Compile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However much memory is free. A large artifact is made by counting the small one often."""
    monkeypatch.setattr(verify, "free_memory", lambda: 1 << 60)
    monkeypatch.setattr(verify, "_EXPANSION", 1 << 20)
    bound = "--max-memory", "8GiB", "--workers", 1
    loaded = [compile(model, tmp_path / "free"), compile(model, tmp_path / "out", QUICK, *bound)]
    by = [got.json["reloaded_by"] for got in loaded]
    assert by == ["transformers", "moecc, layer by layer"]


def test_a_bound_that_cannot_hold_is_refused_before_it_starts(
    model: Path, refused: Refused
) -> None:
    line = refused(model, "--max-memory", "100MiB")
    assert "takes about" in line and "more than 104.86 MB; give more" in line
