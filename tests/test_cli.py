"""The command line: one line and exit code 2 for bad input, one JSON object on stdout, and what each command finds."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import config, make

from moecc import cli
from moecc.checkpoint.files import TensorFile, write_safetensors
from moecc.errors import MoeccError

torch.set_num_threads(1)
pytestmark = pytest.mark.usefixtures("traced_once")
TINYMOE = str(Path(__file__).parent.parent / "examples" / "tinymoe")


class Run:
    """What one command left: exit code, stdout, stderr."""

    def __init__(self, code: int, out: str, err: str):
        self.code, self.out, self.err = code, out, err

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def moecc(capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*args: str | Path) -> Run:
        capsys.readouterr()
        code = cli.main([str(a) for a in args])
        return Run(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the example model with one float tensor a little off and one renamed."""
    folder = tmp_path_factory.mktemp("changed")
    shutil.copytree(
        TINYMOE, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.txt", "*.md")
    )
    tensors = dict(TensorFile(folder / "model.safetensors"))
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 1.5
    for name in [n for n in tensors if "layers.2.mlp.experts" in n and "down" in n]:
        tensors[name] = tensors[name] * 2
    write_safetensors(folder / "model.safetensors", tensors)
    return folder


# ---- bad input


BAD = {
    "no command": [],
    "no such command": ["complie"],
    "an unknown option": ["passes", "--nope"],
    "compile without passes": ["compile", TINYMOE, "-o", "OUT"],
    "compile without an output": ["compile", TINYMOE, "--passes", "vq"],
    "compile with zero bits": ["compile", TINYMOE, "--passes", "vq", "--bits", "0", "-o", "OUT"],
    "compile with a misspelt pass": ["compile", TINYMOE, "--passes", "kbvqq", "-o", "OUT"],
    "compile with a bad option": ["compile", TINYMOE, "--passes", "vq{bitz=2}", "-o", "OUT"],
    "compile a missing model": ["compile", "./nothing", "--passes", "vq", "-o", "OUT"],
    "compile with a missing text": [
        "compile",
        TINYMOE,
        "--passes",
        "vq",
        "--calib",
        "./none.txt",
        "-o",
        "OUT",
    ],
    "compile for a missing backend": [
        "compile",
        TINYMOE,
        "--passes",
        "vq",
        "--backend",
        "nope",
        "-o",
        "OUT",
    ],
    "compile onto itself": ["compile", TINYMOE, "--passes", "vq", "-o", TINYMOE],
    "inspect a missing model": ["inspect", "./nothing"],
    "inspect a file": ["inspect", f"{TINYMOE}/config.json"],
    "inspect with bits alone": ["inspect", TINYMOE, "--bits", "2"],
    "inspect with a misspelt pass": ["inspect", TINYMOE, "--passes", "kbvqq"],
    "eval without a reference": ["eval", TINYMOE],
    "eval with a missing reference": ["eval", TINYMOE, "--reference", "./nothing"],
    "eval with a binary text": [
        "eval",
        TINYMOE,
        "--reference",
        TINYMOE,
        "--text",
        f"{TINYMOE}/model.safetensors",
    ],
    "eval with no rows": ["eval", TINYMOE, "--reference", TINYMOE, "--rows", "-1"],
    "generate from a missing model": ["generate", "./nothing"],
    "generate with a negative temperature": ["generate", TINYMOE, "--temperature", "-1"],
    "generate from an empty prompt": ["generate", TINYMOE, "--prompt", ""],
    "passes with a misspelt name": ["passes", "kbvqq"],
    "passes of a missing file": ["passes", "./my_pass.py"],
    "generate more than there are positions for": [
        "generate",
        TINYMOE,
        "--max-new-tokens",
        "100000",
    ],
    "export of a profile with bits that it doesn't take": [
        "export",
        TINYMOE,
        "--to",
        "onnx",
        "--bits",
        "8",
        "-o",
        "OUT",
    ],
    "diff with one model": ["diff", TINYMOE],
    "diff with a missing model": ["diff", TINYMOE, "./nothing"],
}


@pytest.mark.parametrize("args", BAD.values(), ids=BAD.keys())
@pytest.mark.parametrize("as_json", [False, True])
def test_bad_input_is_one_line(
    moecc: Any, args: list[str], as_json: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    got = moecc(*args, *(["--json"] if as_json and args else []))
    assert got.code == 2
    assert got.out == ""
    last = got.err.splitlines()[-1]
    assert last.startswith("moecc: error: ") and len(last) > 30
    assert "Traceback" not in got.err
    assert len([x for x in got.err.splitlines() if "error" in x]) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["inspect", "compile"])
def test_what_is_no_model_is_said_in_the_same_words(
    moecc: Any, command: str, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    options = ("--passes", "vq", "-o", tmp_path / "out") if command == "compile" else ()
    for source, says in (
        ("./nothing", "no folder './nothing'; give a checkpoint folder or a hub id such as "),
        ("nothing", "no folder 'nothing' here, and the hub gave no model of that name"),
        (
            tmp_path / "empty",
            "empty has no config.json; give the folder of a transformers checkpoint",
        ),
        (
            f"{TINYMOE}/config.json",
            "config.json is a file; give the folder that holds config.json and",
        ),
    ):
        got = moecc(command, source, *options)
        assert got.code == 2 and says in got.err


def test_a_checkpoint_without_weights_or_tokenizer(moecc: Any, tmp_path: Path) -> None:
    config("mixtral").save_pretrained(tmp_path)
    assert "no tokenizer" in moecc("eval", tmp_path, "--reference", tmp_path).err
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(TINYMOE, name), tmp_path)
    for args in (
        ("eval", tmp_path, "--reference", tmp_path, "--rows", "1"),
        ("diff", tmp_path, tmp_path),
    ):
        got = moecc(*args)
        assert got.code == 2 and "no *.safetensors weights" in got.err
    got = moecc("generate", tmp_path)
    assert got.code == 2
    assert "has neither model.safetensors nor" in got.err
    assert "\n" not in got.err.strip()


def test_what_a_trace_does_not_hold_for_is_said_and_refused(moecc: Any, tmp_path: Path) -> None:
    model = make("zaya")
    model.config.vocab_size = 4096  # as the tokenizer's
    model.resize_token_embeddings(4096)
    model.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(TINYMOE, name), tmp_path)
    got = moecc("eval", tmp_path, "--reference", tmp_path, "--rows", "1", "--length", "2")
    assert "note: the trace holds for sequence other than 2 only\n" in got.err
    assert got.code == 2
    assert "rows of 2 tokens, but the trace holds for sequence other than 2 only" in got.err


def test_a_tokenizer_of_another_model(moecc: Any, tmp_path: Path) -> None:
    make("mixtral").save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(TINYMOE, name), tmp_path)
    got = moecc("eval", tmp_path, "--reference", tmp_path, "--rows", "1", "--length", "16")
    assert got.code == 2 and "outside the model's vocabulary" in got.err
    got = moecc("generate", tmp_path)
    assert got.code == 2 and "copy the model's own tokenizer" in got.err


# ---- exit codes and streams


def _raising(error: BaseException) -> Any:
    def run(*args: Any, **kwargs: Any) -> Any:
        print("a library's chatter")
        raise error

    return run


def test_exit_codes_of_what_goes_wrong(moecc: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [
        (KeyboardInterrupt(), 130, "interrupted"),
        (MoeccError("two\nlines"), 2, "error: two lines"),
        (RuntimeError("a fault"), 3, "internal error: RuntimeError: a fault"),
    ]
    for error, code, line in cases:
        monkeypatch.setattr("moecc.commands.inspect.inspect_model", _raising(error))
        got = moecc("inspect", TINYMOE, "--json")
        assert got.code == code and got.out == ""
        assert f"moecc: {line}" in got.err and "Traceback" not in got.err
        monkeypatch.setenv("MOECC_DEBUG", "1")
        assert ("Traceback" in moecc("inspect", TINYMOE).err) == (code != 130)
        monkeypatch.delenv("MOECC_DEBUG")


def test_help_and_version(moecc: Any) -> None:
    assert moecc("--version").out.startswith("moecc ")
    for args in ([], ["compile"], ["inspect"], ["eval"], ["generate"], ["passes"], ["diff"]):
        got = moecc(*args, "--help")
        assert got.code == 0 and "usage: moecc" in got.out and got.err == ""


def test_as_a_process() -> None:
    got = subprocess.run(
        [sys.executable, "-m", "moecc.cli", "passes", "kbvqq"], capture_output=True, text=True
    )
    assert (got.returncode, got.stdout) == (2, "")
    assert got.stderr == "moecc: error: no pass 'kbvqq'; did you mean 'kbvq'?\n"


def test_an_interrupt_while_torch_is_imported(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt")
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}]; from moecc.cli import main; sys.exit(main())"
    root = Path(__file__).parents[1]
    got = subprocess.run(
        [sys.executable, "-c", code, "passes"], capture_output=True, text=True, cwd=root
    )
    assert (got.returncode, got.stdout, got.stderr) == (130, "", "moecc: interrupted\n")


def test_the_command_runs_what_it_imports() -> None:
    code = "import sys; from moecc.cli import main; sys.exit(main())"
    root = Path(__file__).parents[1]
    got = subprocess.run(
        [sys.executable, "-c", code, "passes", "vq"], capture_output=True, text=True, cwd=root
    )
    assert got.returncode == 0 and "moments -> vq" in got.stdout


def test_progress_is_off_unless_asked_for(moecc: Any) -> None:
    assert "comparing" not in moecc("diff", TINYMOE, TINYMOE).err
    assert "comparing" in moecc("diff", TINYMOE, TINYMOE, "--progress").err


# ---- what the commands find


def test_eval_of_a_model_against_itself(moecc: Any) -> None:
    rows = ("--text", f"{TINYMOE}/valid.txt", "--rows", "2", "--length", "32")
    got = moecc("eval", TINYMOE, "--reference", TINYMOE, *rows, "--json")
    assert got.code == 0
    assert got.json["kl"] == 0
    assert got.json["agreement"] == 1
    assert got.json["rows"] == 2
    assert got.json["tokens"] == 62
    assert len(got.json["per_layer"]) == 4


def test_eval_of_a_damaged_model(moecc: Any, changed: Path) -> None:
    args = ("eval", changed, "--reference", TINYMOE, "--rows", "2", "--length", "64")
    got = moecc(*args, "--json")
    assert got.code == 0 and got.json["kl"] > 0 and got.json["agreement"] < 1
    text = moecc(*args).out
    assert f"{got.json['perplexity']:.4f}" in text and "model.layers.3.mlp.experts" in text


def test_eval_says_when_the_rows_are_those_of_calibration(moecc: Any, tmp_path: Path) -> None:
    shutil.copytree(TINYMOE, tmp_path, dirs_exist_ok=True)
    args = ("eval", tmp_path, "--reference", TINYMOE, "--rows", "1", "--length", "16")
    first = moecc(*args, "--json")
    assert "calibrated on these very rows" not in first.err
    (tmp_path / "moecc.json").write_text(
        json.dumps({"calibration_digest": first.json["rows_digest"]})
    )
    assert "calibrated on these very rows" in moecc(*args).err


def test_inspect_knows_the_least_that_a_budget_can_be(moecc: Any) -> None:
    """With a codebook per layer: 2 bits, scales and 8192 bits for each layer and projection."""
    enough = moecc("inspect", TINYMOE, "--passes", "kbvq", "--bits", "2.2", "--json")
    assert enough.code == 0
    assert enough.json["estimate"]["bits_per_weight_experts"][1] == pytest.approx(2.2)
    few = moecc("inspect", TINYMOE, "--passes", "kbvq", "--bits", "2.05")
    assert few.code == 2 and "the least is 2.094" in few.err


def test_inspect_counts_every_byte(moecc: Any) -> None:
    got = moecc(
        "inspect",
        TINYMOE,
        "--passes",
        "moments,klt,vq{codebook=auto},affine,fold",
        "--bits",
        "3",
        "--json",
    )
    found, entries = got.json, TensorFile(Path(TINYMOE, "model.safetensors")).entries
    assert got.code == 0 and found["bytes"] == sum(e.nbytes for e in entries.values())
    layer = found["moe_layers"][0]
    assert (layer["experts"], layer["top_k"], layer["hidden"], layer["intermediate"]) == (
        16,
        4,
        256,
        128,
    )
    assert layer["router"] == "softmax > topk" and layer["layout"] == "canonical"
    assert found["sizes"]["routed experts"]["parameters"] == 4 * 16 * 3 * 256 * 128
    low, high = found["estimate"]["bits_per_weight_experts"]
    assert 3 < low < high < 3.5
    assert (
        found["estimate"]["pipeline"] == "moments,klt{bits=3},vq{bits=3,codebook=auto},affine,fold"
    )
    text = moecc("inspect", TINYMOE).out
    assert "4 decoder layers, 4 of them MoE" in text and "routed experts" in text


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3", "llama4_text", "nemotron_h"])
def test_inspect_needs_no_weights(moecc: Any, family: str, tmp_path: Path) -> None:
    config(family).save_pretrained(tmp_path)
    found = moecc("inspect", tmp_path, "--passes", "vq,dense{bits=4}", "--json").json
    model = make(family)
    assert not found["has_weights"] and len(found["moe_layers"]) == 2
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    assert found["estimate"]["bytes"][0] < found["bytes"]
    assert moecc("inspect", tmp_path).code == 0


def test_diff_of_a_folder_with_itself(moecc: Any) -> None:
    got = moecc("diff", TINYMOE, TINYMOE, "--json")
    assert got.code == 0 and got.json["identical"] and not got.json["different_tensors"]
    assert "identical" in moecc("diff", TINYMOE, TINYMOE).out


def test_diff_says_which_tensors_and_how_far(
    moecc: Any, changed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moecc.commands.diff._AT_ONCE", 10_000)  # several parts per tensor
    got = moecc("diff", TINYMOE, changed, "--json")
    assert got.code == 1 and not got.json["identical"]
    rows = {row["name"]: row for row in got.json["different_tensors"]}
    assert rows["model.norm.weight"]["relative_error"] == pytest.approx(0.5, rel=1e-2)
    assert all(
        row["relative_error"] == pytest.approx(1) for name, row in rows.items() if "experts" in name
    )
    assert len(rows) == 17 and got.json["same_tensors"] + 17 == got.json["a"]["tensors"]
    assert got.json["different_files"] == []
    text = moecc("diff", TINYMOE, changed)
    assert text.code == 1 and "model.norm.weight: bfloat16 [256], relative error 0.5" in text.out


def test_diff_of_names_shapes_codes_and_files(moecc: Any, tmp_path: Path) -> None:
    for name, extra in (("a", {"only.a": torch.ones(2)}), ("b", {"shape": torch.ones(3)})):
        codes = torch.arange(8, dtype=torch.uint8) + (name == "b") * torch.tensor(
            [0, 0, 0, 0, 0, 0, 1, 1]
        )
        (tmp_path / name).mkdir()
        tensors = {
            "codes": codes.to(torch.uint8),
            "shape": torch.ones(4),
            "zero": torch.zeros(2, 2),
            **extra,
        }
        write_safetensors(tmp_path / name / "model.safetensors", tensors)
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "chat_template.jinja").write_text(f"{{{{ {name} }}}}")
        (tmp_path / name / "merges.txt").write_text("a b")
    (tmp_path / "b" / "moecc.json").write_text(json.dumps({"pipeline": "vq", "source": "x"}))
    found = moecc("diff", tmp_path / "a", tmp_path / "b", "--json").json
    rows = {row["name"]: row for row in found["different_tensors"]}
    assert rows.keys() == {"codes", "shape"} and rows["codes"]["unequal"] == 0.25
    assert found["only_in_a"] == ["only.a"] and found["only_in_b"] == []
    assert found["different_files"] == ["chat_template.jinja", "moecc.json"]
    assert "vq of x" in moecc("diff", tmp_path / "a", tmp_path / "b").out


def test_diff_with_an_index_that_names_no_files(moecc: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"x": 3}}')
    got = moecc("diff", tmp_path, tmp_path)
    assert got.code == 2 and "'weight_map' must give file names" in got.err


def test_diff_of_codes_is_a_share_of_all_entries(
    moecc: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moecc.commands.diff._AT_ONCE", 64)  # the last part has 2 rows of 10
    for name, code in (("a", 0), ("b", 1)):
        (tmp_path / name).mkdir()
        codes = torch.zeros(10, 16, dtype=torch.uint8)
        codes[:5] = code
        write_safetensors(tmp_path / name / "model.safetensors", {"codes": codes})
        (tmp_path / name / "config.json").write_text("{}")
    found = moecc("diff", tmp_path / "a", tmp_path / "b", "--json").json
    assert found["different_tensors"][0]["unequal"] == 0.5


def test_generate_is_greedy_and_repeats(moecc: Any) -> None:
    args = ("generate", TINYMOE, "--prompt", "import ", "--max-new-tokens", "8", "--json")
    got = moecc(*args)
    assert got.code == 0 and len(got.json["tokens"]) == 8 and got.json == moecc(*args).json
    warm = moecc(*args, "--temperature", "2", "--seed", "1").json
    assert warm == moecc(*args, "--temperature", "2", "--seed", "1").json != got.json


def damaged(folder: Path, change: Any) -> Path:
    """A tiny model with a tokenizer, of whose tensors `change` makes others."""
    make("mixtral").save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(TINYMOE, name), folder)
    entries = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**entries, "vocab_size": 4096}))
    tensors = dict(TensorFile(folder / "model.safetensors"))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.ones(4096, 32)
    change(tensors)
    write_safetensors(folder / "model.safetensors", tensors)
    return folder


EXPERT = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
DAMAGES: dict[str, tuple[Any, str]] = {
    "a tensor lost": (
        lambda t: t.pop("model.norm.weight"),
        "has no tensor for 'model.norm.weight'",
    ),
    "a tensor of another shape": (
        lambda t: t.update({"model.norm.weight": torch.ones(8)}),
        "is [8], but config.json implies [32]",
    ),
    "an expert lost": (lambda t: t.pop(EXPERT), f"('{EXPERT}' is missing); fetch it again"),
    "not a number": (lambda t: t[EXPERT][0].fill_(torch.nan), f"'{EXPERT}' in "),
}


@pytest.mark.parametrize(("change", "says"), DAMAGES.values(), ids=DAMAGES.keys())
def test_generate_from_a_damaged_checkpoint(
    moecc: Any, change: Any, says: str, tmp_path: Path
) -> None:
    got = moecc("generate", damaged(tmp_path, change), "--max-new-tokens", "1")
    assert got.code == 2
    assert says in got.err
    assert str(tmp_path) in got.err
    assert "report" not in got.err


def test_passes_lists_every_pass_with_its_options(moecc: Any) -> None:
    found = moecc("passes", "--json").json["passes"]
    assert {"moments", "klt", "vq", "affine", "fold", "kbvq"} <= {p["name"] for p in found}
    assert all(p["summary"] and p["scope"] in ("layer", "model", "composite") for p in found)
    one = moecc("passes", "vq")
    assert one.code == 0
    assert "bits=2" in one.out
    assert "2 | 3 | 4" in one.out
    assert "moments -> vq" in one.out
    assert "stands for moments,klt,vq,affine,fold" in moecc("passes", "kbvq").out
    options = {o["name"]: o for o in moecc("passes", "vq", "--json").json["options"]}
    assert options["bits"]["default"] == 2 and options["bits"]["help"]


def test_compile_eval_inspect_diff_generate(moecc: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    passes = "vq{rounds=1,codebook=layer}"
    got = moecc(
        "compile", TINYMOE, "--passes", passes, "--rows", "2", "--length", "64", "--json", "-o", out
    )
    assert got.code == 0 and got.json["out"] == str(out) and "pipeline: " in got.err
    found = moecc(
        "eval", out, "--reference", TINYMOE, "--rows", "2", "--length", "32", "--json"
    ).json
    for key in ("bits_per_weight_experts", "bits_per_weight"):
        assert found[key] == pytest.approx(got.json[key])
    assert 2 < found["bits_per_weight_experts"] < 3 and 0 < found["kl"] < 1
    seen = moecc("inspect", out, "--json").json
    assert seen["moe_layers"][0]["form"] == "moecc::vq_experts"
    assert seen["parameters"] == moecc("inspect", TINYMOE, "--json").json["parameters"]
    refused = moecc("inspect", out, "--passes", "vq")
    assert refused.code == 2 and "compressed already" in refused.err
    differ = moecc("diff", TINYMOE, out)
    assert differ.code == 1 and "moments,vq{codebook=layer,rounds=1} of " in differ.out
    assert moecc("generate", out, "--max-new-tokens", "4").code == 0
