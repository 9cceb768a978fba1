"""The results of eval, inspect, diff and generate on the example model and damaged copies."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from families import config, make
from made import QUICK, TINYMOE, Command, copy_tokenizer
from torch import Tensor

from moecc.checkpoint.files import TensorFile, write_safetensors
from moecc.commands.generate import generate
from moecc.errors import MoeccError

torch.set_num_threads(1)
pytestmark = pytest.mark.usefixtures("traced_once")


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the example model with the last norm and the experts' down of layer 2 scaled."""
    folder = tmp_path_factory.mktemp("changed")
    ignored = shutil.ignore_patterns("*.txt", "*.md")
    shutil.copytree(TINYMOE, folder, dirs_exist_ok=True, ignore=ignored)
    tensors = dict(TensorFile(folder / "model.safetensors"))
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 1.5
    for name in [n for n in tensors if "layers.2.mlp.experts" in n and "down" in n]:
        tensors[name] = tensors[name] * 2
    write_safetensors(folder / "model.safetensors", tensors)
    return folder


# ---- eval


def test_eval_of_a_model_against_itself_finds_no_difference(moecc: Command) -> None:
    rows = ("--text", TINYMOE / "valid.txt", "--rows", "2", "--length", "32")
    got = moecc("eval", TINYMOE, "--reference", TINYMOE, *rows, "--json")
    assert got.code == 0
    expected = {"kl": 0, "agreement": 1, "rows": 2, "tokens": 62}
    assert {key: got.json[key] for key in expected} == expected
    assert len(got.json["per_layer"]) == 4


def test_eval_of_a_damaged_model_shows_the_damage(moecc: Command, changed: Path) -> None:
    args = ("eval", changed, "--reference", TINYMOE, "--rows", "2", "--length", "64")
    got = moecc(*args, "--json")
    assert got.code == 0 and got.json["kl"] > 0 and got.json["agreement"] < 1
    text = moecc(*args).out
    assert f"{got.json['perplexity']:.4f}" in text and "model.layers.3.mlp.experts" in text


def test_eval_warns_about_the_rows_of_calibration(moecc: Command, tmp_path: Path) -> None:
    shutil.copytree(TINYMOE, tmp_path, dirs_exist_ok=True)
    args = ("eval", tmp_path, "--reference", TINYMOE, "--rows", "1", "--length", "16")
    first = moecc(*args, "--json")
    assert "calibrated on these very rows" not in first.err
    manifest = {"calibration_digest": first.json["rows_digest"]}
    (tmp_path / "moecc.json").write_text(json.dumps(manifest))
    assert "calibrated on these very rows" in moecc(*args).err


# ---- inspect


def test_inspect_knows_the_least_that_a_budget_can_be(moecc: Command) -> None:
    """A codebook per layer takes 2 bits, scales, and 8192 bits for each layer and projection."""
    enough = moecc("inspect", TINYMOE, "--passes", "kbvq", "--bits", "2.2", "--json")
    assert enough.code == 0
    assert enough.json["estimate"]["bits_per_weight_experts"][1] == pytest.approx(2.2)
    few = moecc("inspect", TINYMOE, "--passes", "kbvq", "--bits", "2.05")
    assert few.code == 2 and "the least is 2.094" in few.err


def test_inspect_plans_what_compile_would(moecc: Command, tmp_path: Path) -> None:
    """With the same rows, workers and bound, which is refused if it can't be held."""
    some = ("--passes", "vsraq,kbvq", "--rows", "5", "--length", "48", "--workers", "2")
    intended = moecc("inspect", TINYMOE, *some, "--json").json["estimate"]["plan"]
    ran = moecc("compile", TINYMOE, *some, "-o", tmp_path / "out", "--max-memory", "64MiB")
    said = moecc("inspect", TINYMOE, *some, "--max-memory", "64MiB")
    assert (ran.code, said.code) == (2, 2) and ran.err.endswith(said.err)
    assert "by 2 workers" in intended[0] and said.err.count("\n") == 1
    assert re.search("about (.*) of memory", intended[0])[1] in said.err  # type: ignore[index]
    (more,) = moecc("inspect", TINYMOE, *some[:2], "--json").json["estimate"]["plan"]
    assert more != intended[0]


@pytest.mark.parametrize(
    "option",
    ["--bits 2", "--rows 2", "--length 64", "--workers 1", "--max-memory 9GB", "--device cpu"],
)
def test_an_option_of_a_plan_needs_passes(moecc: Command, option: str) -> None:
    refused = moecc("inspect", TINYMOE, *option.split())
    assert refused.code == 2
    assert f"{option.split()[0]} says something about passes; give --passes too" in refused.err


def test_inspect_counts_every_byte(moecc: Command) -> None:
    passes = "moments,klt,vq{codebook=auto},affine,fold"
    got = moecc("inspect", TINYMOE, "--passes", passes, "--bits", "3", "--json")
    found, entries = got.json, TensorFile(TINYMOE / "model.safetensors").entries
    assert got.code == 0 and found["bytes"] == sum(e.nbytes for e in entries.values())
    layer = found["moe_layers"][0]
    sizes = [layer[key] for key in ("experts", "top_k", "hidden", "intermediate")]
    assert sizes == [16, 4, 256, 128]
    assert layer["router"] == "softmax > topk" and layer["layout"] == "canonical"
    assert found["sizes"]["routed experts"]["parameters"] == 4 * 16 * 3 * 256 * 128
    low, high = found["estimate"]["bits_per_weight_experts"]
    assert 3 < low < high < 3.5
    with_bits = "moments,klt{bits=3},vq{bits=3,codebook=auto},affine,fold"
    assert found["estimate"]["pipeline"] == with_bits
    text = moecc("inspect", TINYMOE).out
    assert "4 decoder layers, 4 of them MoE" in text and "routed experts" in text


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3", "llama4_text", "nemotron_h"])
def test_inspect_needs_no_weights(moecc: Command, family: str, tmp_path: Path) -> None:
    config(family).save_pretrained(tmp_path)
    found = moecc("inspect", tmp_path, "--passes", "vq,dense{bits=4}", "--json").json
    stored = make(family).state_dict().values()
    assert not found["has_weights"] and len(found["moe_layers"]) == 2
    assert found["parameters"] == sum(t.numel() for t in stored)
    assert found["estimate"]["bytes"][0] < found["bytes"]
    assert moecc("inspect", tmp_path).code == 0


# ---- diff


def checkpoint_of(folder: Path, tensors: dict[str, Tensor]) -> Path:
    """Write tensors and an empty config.json into a new folder."""
    folder.mkdir()
    write_safetensors(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text("{}")
    return folder


def test_diff_of_a_folder_with_itself_finds_nothing(moecc: Command) -> None:
    got = moecc("diff", TINYMOE, TINYMOE, "--json")
    assert got.code == 0 and got.json["identical"] and not got.json["different_tensors"]
    assert "identical" in moecc("diff", TINYMOE, TINYMOE).out


def test_diff_names_tensors_and_their_distance(
    moecc: Command, changed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moecc.commands.diff._AT_ONCE", 10_000)  # several parts per tensor
    got = moecc("diff", TINYMOE, changed, "--json")
    assert got.code == 1 and not got.json["identical"]
    errors = {row["name"]: row["relative_error"] for row in got.json["different_tensors"]}
    assert errors["model.norm.weight"] == pytest.approx(0.5, rel=1e-2)
    experts = [error for name, error in errors.items() if "experts" in name]
    assert experts == pytest.approx([1] * 16)
    assert len(errors) == 17 and got.json["same_tensors"] + 17 == got.json["a"]["tensors"]
    assert got.json["different_files"] == []
    text = moecc("diff", TINYMOE, changed)
    assert text.code == 1 and "model.norm.weight: bfloat16 [256], relative error 0.5" in text.out


def test_diff_compares_names_shapes_codes_and_files(moecc: Command, tmp_path: Path) -> None:
    common = {"codes": torch.arange(8, dtype=torch.uint8), "zero": torch.zeros(2, 2)}
    ours = {**common, "shape": torch.ones(4), "only.a": torch.ones(2)}
    theirs = {**common, "shape": torch.ones(3)}
    theirs["codes"] = torch.tensor([0, 1, 2, 3, 4, 5, 7, 8], dtype=torch.uint8)
    a, b = checkpoint_of(tmp_path / "a", ours), checkpoint_of(tmp_path / "b", theirs)
    for folder in (a, b):
        (folder / "chat_template.jinja").write_text(f"{{{{ {folder.name} }}}}")
        (folder / "merges.txt").write_text("a b")
    (b / "moecc.json").write_text(json.dumps({"pipeline": "vq", "source": "x\nidentical: 2"}))
    found = moecc("diff", a, b, "--json").json
    rows = {row["name"]: row for row in found["different_tensors"]}
    assert rows.keys() == {"codes", "shape"} and rows["codes"]["unequal"] == 0.25
    assert found["only_in_a"] == ["only.a"] and found["only_in_b"] == []
    assert found["different_files"] == ["chat_template.jinja", "moecc.json"]
    assert "vq of x\\nidentical: 2\n" in moecc("diff", a, b).out


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"pipeline": ', "{file} isn't valid JSON"),
        (b"\xff", "{file} isn't valid JSON ('utf-8' codec"),
        (b"[]", "{file} isn't valid JSON (it holds no object)"),
        (b'{"summary": 1}', "{file} isn't what moecc writes"),
        (b'{"experts_kept": {"model.layers.0.mlp.experts": 3}}', "{file} isn't what moecc writes"),
    ],
)
def test_a_damaged_moecc_json_does_not_count_as_none(
    moecc: Command, model: Path, content: bytes, said: str
) -> None:
    file = model / "moecc.json"
    file.write_bytes(content)
    rows = ("--rows", "1", "--length", "8")
    for command in (("diff", model, model), ("eval", model, "--reference", model, *rows)):
        got = moecc(*command)
        assert got.code == 2, got.err
        last = got.err.splitlines()[-1]
        assert said.format(file=file) in last and "compile the model again" in last


def test_diff_refuses_an_index_that_names_no_files(moecc: Command, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"x": 3}}')
    got = moecc("diff", tmp_path, tmp_path)
    assert got.code == 2 and "'weight_map' must give file names" in got.err


def test_diff_of_codes_is_a_share_of_all_entries(
    moecc: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moecc.commands.diff._AT_ONCE", 64)  # the last part has 2 rows of 10
    zeros = torch.zeros(10, 16, dtype=torch.uint8)
    ones = zeros.clone()
    ones[:5] = 1
    a = checkpoint_of(tmp_path / "a", {"codes": zeros})
    b = checkpoint_of(tmp_path / "b", {"codes": ones})
    assert moecc("diff", a, b, "--json").json["different_tensors"][0]["unequal"] == 0.5


# ---- generate


def test_generate_is_greedy_and_repeats(moecc: Command) -> None:
    args = ("generate", TINYMOE, "--prompt", "import ", "--max-new-tokens", "8", "--json")
    got = moecc(*args)
    assert got.code == 0 and len(got.json["tokens"]) == 8 and got.json == moecc(*args).json
    warm = moecc(*args, "--temperature", "2", "--seed", "1").json
    assert warm == moecc(*args, "--temperature", "2", "--seed", "1").json != got.json


@pytest.mark.parametrize("temperature", [1e-320, 1e-31, -1.0, math.inf, math.nan])
def test_a_temperature_that_nothing_can_be_divided_by_is_refused(temperature: float) -> None:
    with pytest.raises(MoeccError, match=r"no tokens can be drawn at temperature .*; give 0 for"):
        generate("./nothing", "a", temperature=temperature)


Change = Callable[[dict[str, Tensor]], object]


def damaged(folder: Path, change: Change) -> Path:
    """Save a tiny model and a tokenizer into `folder` after `change(its tensors)`."""
    make("mixtral").save_pretrained(folder)
    copy_tokenizer(folder)
    entries = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**entries, "vocab_size": 4096}))
    tensors = dict(TensorFile(folder / "model.safetensors"))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.ones(4096, 32)
    change(tensors)
    write_safetensors(folder / "model.safetensors", tensors)
    return folder


NORM = "model.norm.weight"
EXPERT = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
DAMAGES: dict[str, tuple[Change, str]] = {
    "a tensor lost": (lambda t: t.pop(NORM), f"has no tensor for '{NORM}'"),
    "a tensor of another shape": (
        lambda t: t.update({NORM: torch.ones(8)}),
        "is [8], but config.json implies [32]",
    ),
    "an expert lost": (lambda t: t.pop(EXPERT), f"('{EXPERT}' is missing); fetch it again"),
    "not a number": (lambda t: t[EXPERT][0].fill_(torch.nan), f"'{EXPERT}' in "),
}


@pytest.mark.parametrize(("change", "says"), DAMAGES.values(), ids=DAMAGES.keys())
def test_generate_refuses_a_damaged_checkpoint(
    moecc: Command, change: Change, says: str, tmp_path: Path
) -> None:
    got = moecc("generate", damaged(tmp_path, change), "--max-new-tokens", "1")
    assert got.code == 2
    assert says in got.err
    assert str(tmp_path) in got.err
    assert "report" not in got.err  # transformers' own report on missing tensors


# ---- one artifact through all commands


def test_an_artifact_is_taken_by_every_command(moecc: Command, tmp_path: Path) -> None:
    out, rows = tmp_path / "out", ("--rows", "2")
    args = ("--passes", QUICK, *rows, "--length", "64", "--json", "-o", out)
    got = moecc("compile", TINYMOE, *args)
    assert got.code == 0 and got.json["out"] == str(out) and "pipeline: " in got.err
    found = moecc("eval", out, "--reference", TINYMOE, *rows, "--length", "32", "--json").json
    for key in ("bits_per_weight_experts", "bits_per_weight"):
        assert found[key] == pytest.approx(got.json[key])
    assert 2 < found["bits_per_weight_experts"] < 3 and 0 < found["kl"] < 1
    seen = moecc("inspect", out, "--json").json
    assert seen["moe_layers"][0]["form"] == "moecc::vq_experts"
    assert seen["parameters"] == moecc("inspect", TINYMOE, "--json").json["parameters"]
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(out / "config.json", alone)
    assert moecc("inspect", alone, "--json").json == {
        **seen,
        "model": str(alone),
        "has_weights": False,
    }
    refused = moecc("inspect", out, "--passes", "vq")
    assert refused.code == 2 and "compressed already" in refused.err
    differ = moecc("diff", TINYMOE, out)
    assert differ.code == 1 and "moments,vq{codebook=layer,rounds=1} of " in differ.out
    assert moecc("generate", out, "--max-new-tokens", "4").code == 0
