"""Bad input to `moecc compile`: one line that says what, where and what to do, exit code 2, and a disk as it was before."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from made import QUICK, checkpoint, interrupt, stop
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from moecc import cli
from moecc.artifact import verify
from moecc.checkpoint import files
from moecc.pipeline import journal

torch.set_num_threads(1)
pytestmark = pytest.mark.usefixtures("traced_once")
TINYMOE = Path(__file__).parent.parent / "examples" / "tinymoe"
KBVQ = "kbvq{rank=0}"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint that nothing is wrong with."""
    return checkpoint(tmp_path_factory.mktemp("good"))


@pytest.fixture
def model(good: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(good, tmp_path / "model"))


def listing(folder: Path) -> dict[str, Any]:
    """Every file with its bytes, every folder and link, by relative path."""
    found = {str(p.relative_to(folder)): p for p in folder.rglob("*")}
    return {
        k: os.readlink(p) if p.is_symlink() else p.read_bytes() if p.is_file() else None
        for k, p in found.items()
    }


@pytest.fixture
def refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., str]:
    """refused(model, *options): the error line of a compilation that must fail and leave everything as it was."""
    monkeypatch.chdir(tmp_path)

    def run(
        model: str | Path, *options: str | Path, passes: str = QUICK, out: str | Path = "out"
    ) -> str:
        before = listing(tmp_path)
        capsys.readouterr()
        args = (
            "compile",
            model,
            "--passes",
            passes,
            "-o",
            out,
            "--rows",
            "4",
            "--length",
            "16",
            "--json",
            *options,
        )
        code = cli.main([str(a) for a in args])
        stdout, stderr = capsys.readouterr()
        lines = stderr.splitlines()
        assert (code, stdout) == (2, ""), stderr
        assert lines[-1].startswith("moecc: error: ") and "Traceback" not in stderr
        assert sum(line.startswith("moecc: ") for line in lines) == 1
        assert listing(tmp_path) == before
        return lines[-1].removeprefix("moecc: error: ")

    return run


def edit_config(model: Path, **changes: Any) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(
        json.dumps({k: v for k, v in {**config, **changes}.items() if v is not ...})
    )


def edit_tensors(model: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})


# ---------------------------------------------------------------- the model


def test_no_such_folder(refused: Any) -> None:
    assert "nothing" in refused("./nothing")
    assert "no folder 'owner/nothing' here" in refused("owner/nothing")


def test_not_a_mixture_of_experts(refused: Any, tmp_path: Path) -> None:
    sizes = dict(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    config = AutoConfig.for_model("llama", num_key_value_heads=2, **sizes)
    checkpoint(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    line = refused(tmp_path / "model")
    assert "llama" in line and "no experts" in line and "Mixture-of-Experts" in line


def test_an_unknown_family(refused: Any, model: Path) -> None:
    edit_config(model, model_type="mixture_of_unicorns", architectures=["UnicornForCausalLM"])
    line = refused(model)
    assert "mixture_of_unicorns" in line and "config.json" in line


def test_a_model_that_is_code(refused: Any, model: Path) -> None:
    edit_config(
        model, model_type="unicorn", auto_map={"AutoConfig": "configuration_unicorn.UnicornConfig"}
    )
    for options in ([], ["--trust-remote-code"]):
        assert "moecc doesn't run a model's own code" in refused(model, *options)


def test_an_encoder_decoder(refused: Any, model: Path) -> None:
    edit_config(model, is_encoder_decoder=True)
    assert "encoder-decoder" in refused(model)


def test_a_config_that_is_no_configuration(refused: Any, model: Path) -> None:
    for text in ("", "{", "[]", "{}", "null"):
        (model / "config.json").write_text(text)
        assert "config" in refused(model)
    (model / "config.json").unlink()
    assert "no config.json" in refused(model)


def test_a_quantized_checkpoint(refused: Any, model: Path) -> None:
    edit_config(model, quantization_config={"quant_method": "gptq", "bits": 4})
    assert (
        "quantized already (gptq); give the unquantized checkpoint, or one of fp8 or mxfp4"
        in refused(model)
    )


def test_pickled_weights(refused: Any, model: Path) -> None:
    (model / "model.safetensors").unlink()
    assert "no *.safetensors weights" in refused(model)
    (model / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    assert "pickled weights (pytorch_model.bin)" in refused(model)


# ---------------------------------------------------------------- tensors


def test_missing_tensors(refused: Any, model: Path) -> None:
    edit_tensors(model, lambda t: t.pop("model.layers.1.self_attn.o_proj.weight"))
    line = refused(model)
    assert "'model.layers.1.self_attn.o_proj.weight'" in line and "missing" in line


def test_a_missing_expert(refused: Any, model: Path) -> None:
    name = next(
        n for n in load_file(model / "model.safetensors") if "layers.1" in n and ".experts.2." in n
    )
    edit_tensors(model, lambda t: t.pop(name))
    line = refused(model)
    assert "takes 4 experts" in line and name in line and "fetch it again" in line


def test_missing_shards_and_a_bad_index(refused: Any, model: Path) -> None:
    names = list(load_file(model / "model.safetensors"))
    (model / "model.safetensors").rename(model / "model-00001-of-00002.safetensors")
    index = {n: f"model-0000{1 + (i % 2)}-of-00002.safetensors" for i, n in enumerate(names)}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    line = refused(model)
    assert "lacks model-00002-of-00002.safetensors" in line and "fetch it again" in line
    (model / "model.safetensors.index.json").write_text("{}")
    assert "isn't a valid index" in refused(model)
    (model / "model.safetensors.index.json").write_text('{"weight_map": {"x": 3}}')
    assert "'weight_map' must give file names" in refused(model)


@pytest.mark.parametrize("keep", [0, 4, 100, -1000, -1])
def test_truncated_files(keep: int, refused: Any, model: Path) -> None:
    whole = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(whole[:keep])
    line = refused(model)
    assert "model.safetensors" in line and "fetch it again" in line


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("embed_tokens", torch.nan),
        ("layers.1.self_attn.k_proj", torch.nan),
        ("layers.1.post_attention_layernorm", torch.inf),
        ("layers.1.block_sparse_moe.experts.3", torch.nan),
        ("model.norm", -torch.inf),
        ("lm_head", torch.nan),
    ],
)
def test_nan_and_infinity_wherever_they_are_read(
    part: str, value: float, refused: Any, model: Path
) -> None:
    """The last ones are read only when the layers are done, or when the artifact is written."""
    name = next(n for n in load_file(model / "model.safetensors") if part in n)
    edit_tensors(model, lambda t: t[name].view(-1)[-1:].fill_(value))
    line = refused(model)
    what = "1 NaN and 0 infinite" if value != value else "0 NaN and 1 infinite"
    assert f"'{name}'" in line and what in line and "fetch it again or retrain it" in line


# ---------------------------------------------------------------- a config that lies


LIES: dict[str, dict[str, Any]] = {
    "hidden_size": dict(hidden_size=64),
    "intermediate_size": dict(intermediate_size=96),
    "experts": dict(num_local_experts=8),
    "fewer experts": dict(num_local_experts=3),
    "more layers": dict(num_hidden_layers=3),
    "vocabulary": dict(vocab_size=65),
    "heads": dict(num_attention_heads=8),
    "key heads": dict(num_key_value_heads=4),
    "top-k": dict(num_experts_per_tok=5),
    "no experts": dict(num_local_experts=0),
    "activation": dict(hidden_act="sillu"),
    "negative": dict(hidden_size=-32),
    "text": dict(hidden_size="wide"),
    "head_dim": dict(head_dim=7),
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES.keys())
def test_a_config_that_lies_about_shapes(lie: dict[str, Any], refused: Any, model: Path) -> None:
    edit_config(model, **lie)
    line = refused(model)
    assert len(line) > 30 and "tokenizer" not in line


@pytest.mark.parametrize(
    ("lie", "says"),
    [
        (
            dict(num_experts_per_tok=9),
            "num_experts_per_tok is 9 and num_local_experts 4, but a token takes 1 expert",
        ),
        (
            dict(num_experts_per_tok=0),
            "num_experts_per_tok is 0 and num_local_experts 4, but a token takes 1 expert",
        ),
        (dict(num_attention_heads=3), "the model can't be traced: Attempting to broadcast"),
        (dict(hidden_act="mystery"), "hidden_act 'mystery' is unknown"),
        (
            dict(hidden_size="64"),
            "field 'hidden_size': TypeError: Field 'hidden_size' expected int, got str",
        ),
    ],
)
def test_a_config_that_makes_no_model_is_named_with_its_entry(
    lie: dict[str, Any], says: str, refused: Any, model: Path
) -> None:
    edit_config(model, **lie)
    line = refused(model)
    assert line.startswith(str(model)) and says in line and line.endswith("; check config.json")


def test_as_a_process_too_it_is_one_line(model: Path, tmp_path: Path) -> None:
    """torch logs a traceback where an op can't be traced, past what pytest captures."""
    edit_config(model, num_attention_heads=3)
    args = ("compile", model, "--passes", QUICK, "-o", tmp_path / "out", "--json")
    got = subprocess.run([sys.executable, "-m", "moecc.cli", *args], capture_output=True, text=True)
    assert (got.returncode, got.stdout) == (2, "")
    last = got.stderr.splitlines()[-1]
    assert "Traceback" not in got.stderr and last.startswith(f"moecc: error: {model} (mixtral): ")


def test_what_does_not_fit_says_which_tensor(refused: Any, model: Path) -> None:
    edit_config(model, intermediate_size=96)
    line = refused(model)
    assert "but config.json implies" in line and "check that it belongs to these weights" in line


# ---------------------------------------------------------------- options


OPTIONS: dict[str, tuple[str, list[str], str]] = {
    "bits that nothing takes": (QUICK, ["--bits", "5"], "2 | 3 | 4"),
    "no bits": (QUICK, ["--bits", "0"], "0 is no number of bits"),
    "bits of a pass": ("vq{bits=9}", [], "vq: bits=9 is out of range; it takes 2 | 3 | 4"),
    "a negative rank": ("klt{rank=-1},vq", [], "rank=-1 is out of range"),
    "a rank of text": ("klt{rank=many},vq", [], "auto"),
    "a rank beyond the model": ("kbvq{rank=100}", [], "give a smaller rank"),
    "no steps": ("kbvq,vsraq{steps=0}", [], "steps=0"),
    "a group": ("dense{group=48}", [], "16 | 32 | 64 | 128"),
    "a learning rate": ("vsraq{lr=nan}", [], "lr=nan"),
    "an option twice open": ("vq{bits=2", [], "column"),
    "no value": ("vq{bits}", [], "lacks a value"),
    "an unknown option": ("vq{bitz=2}", [], "did you mean 'bits'"),
    "an unknown pass": ("kbvqq", [], "did you mean 'kbvq'"),
    "no pass": (" ", [], "no passes given"),
    "a missing pass file": ("./mine.py", [], "no pass file mine.py"),
    "no rows": (QUICK, ["--rows", "0"], "number of 1 or more"),
    "no length": (QUICK, ["--length", "0"], "number of 1 or more"),
    "a length of 1": (QUICK, ["--length", "1"], "at least 1 row of 2 tokens"),
    "a seed of text": (QUICK, ["--seed", "x"], "seed"),
    "a backend": (QUICK, ["--backend", "cuda"], "no backend 'cuda'; there is "),
    "an option of nothing": (QUICK, ["--bit", "2"], "--bit"),
}


@pytest.mark.parametrize(("passes", "options", "says"), OPTIONS.values(), ids=OPTIONS.keys())
def test_options_out_of_range(
    passes: str, options: list[str], says: str, refused: Any, good: Path
) -> None:
    assert says in refused(good, *options, passes=passes)


def test_pass_files_that_define_no_pass(refused: Any, good: Path, tmp_path: Path) -> None:
    for text, says in (
        ("x = 1", "defines 0 passes"),
        ("def", "can't be imported: SyntaxError"),
        ("1 / 0", "ZeroDivisionError"),
    ):
        (tmp_path / "mine.py").write_text(text)
        assert says in refused(good, passes="./mine.py")


def test_rows_of_a_length_that_the_family_does_not_take(refused: Any, tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "model", "minimax")
    line = refused(model, "--length", "100")
    assert "rows of 100 tokens" in line and "give --length 63" in line
    shutil.rmtree(model)
    line = refused(checkpoint(model, "zaya"), "--length", "2")
    assert "rows of 2 tokens" in line
    assert "sequence other than 2" in line
    assert "give --length 5" in line


def test_rows_longer_than_the_model_has_positions_for(refused: Any, model: Path) -> None:
    edit_config(model, max_position_embeddings=12)
    line = refused(model)
    assert "rows of 16 tokens, but the model has positions for 12" in line
    assert "give --length 12" in line


# ---------------------------------------------------------------- the output folder


def test_an_output_that_exists(refused: Any, good: Path, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to("gone")
    for name in ("folder", "file", "link", "."):
        assert f"{name} exists; choose another output folder" in refused(good, out=name)
    assert "exists" in refused(good, out=good)
    assert "--dump file is a file" in refused(good, "--dump", "file")


def test_a_place_where_nothing_can_be_written_is_met_before_the_trace(
    refused: Any, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr("moecc.commands.compile.trace", full)
    for out in ("file/out", "file/deeper/out"):
        assert f"{out} can't be made: {tmp_path}/file is not a folder; choose" in refused(
            good, out=out
        )
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert f"new/out can't be made: no permission to write in {tmp_path}; choose" in refused(
        good, out="new/out"
    )


def test_a_dump_folder_that_holds_something(refused: Any, good: Path, tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "00-traced.txt").write_text("of another run")
    assert "--dump texts is not empty; give a new folder for the texts" in refused(
        good, "--dump", "texts"
    )


def test_new_folders_above_the_output_go_too(refused: Any, model: Path) -> None:
    edit_tensors(model, lambda t: t["model.norm.weight"].fill_(torch.nan))
    assert "model.norm.weight" in refused(model, out="new/deeper/out")


def test_what_stood_beside_it_stays(refused: Any, good: Path, model: Path, tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "notes.txt").write_text("mine")
    assert "out.partial is there and holds no interrupted run; move it away" in refused(good)
    (tmp_path / "new").mkdir()
    edit_tensors(model, lambda t: t["model.norm.weight"].fill_(torch.nan))
    refused(model, out="new/out")


# ---------------------------------------------------------------- calibration text


def test_calibration_text_that_is_none(refused: Any, good: Path, tmp_path: Path) -> None:
    cases = {
        "short.txt": (b"import os\n", "fewer than one row of 16"),
        "empty.txt": (b"", "is empty"),
        "blank.txt": (b" \n\n", "is empty"),
        "binary.txt": (bytes(range(256)) * 9, "UTF-8"),
        "latin.txt": ("\xe9t\xe9 ".encode("latin-1") * 99, "no UTF-8 text"),
    }
    for name, (text, says) in cases.items():
        (tmp_path / name).write_bytes(text)
        line = refused(good, "--calib", name)
        assert name in line and says in line
    assert "no text file" in refused(good, "--calib", "none.txt")
    (tmp_path / "folder").mkdir()
    assert "folder is a folder; give a text file" in refused(good, "--calib", "folder")


def test_no_tokenizer_and_one_of_another_model(refused: Any, model: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).unlink()
    assert "has no tokenizer" in refused(model)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINYMOE / name, model)
    line = refused(model)
    assert "vocabulary of 64" in line and "copy the model's own tokenizer" in line


# ---------------------------------------------------------------- the disk


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def full(*args: Any, **kwargs: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_met_before_the_work(
    refused: Any, good: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1 << 30, 1 << 30, 1000))
    line = refused(good)
    assert "out.partial needs" in line
    assert "its disk has 1.00 kB free; free some or write elsewhere" in line


@pytest.mark.parametrize("passes", [QUICK, "vq{bits=4,rounds=1}", "dense{group=16}"])
def test_what_is_asked_of_the_disk_first_is_what_is_on_it_at_the_end(
    passes: str, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(
        "moecc.commands.compile.free_space", lambda path, count: asked.append(count)
    )
    remove, held = journal.Journal.remove, []

    def removing(self: Any) -> None:
        held.extend(f.stat().st_size for f in self.folder.rglob("*.safetensors"))
        remove(self)

    monkeypatch.setattr(journal.Journal, "remove", removing)
    args = (
        "compile",
        good,
        "--passes",
        passes,
        "-o",
        tmp_path / "out",
        "--rows",
        "4",
        "--length",
        "16",
    )
    assert cli.main([str(a) for a in args]) == 0
    written = (tmp_path / "out" / "model.safetensors").stat().st_size + sum(held)
    assert 0.8 * written < asked[0] <= written


def test_a_disk_that_fills_up_before_the_artifact(
    refused: Any, good: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = iter([1 << 30])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1 << 30, 0, next(left, 1000)))
    assert re.search(r"artifact needs 1\.\d\d MB and its disk has 1\.00 kB free", refused(good))


@pytest.mark.parametrize("calls", [0, 1, 3])
def test_a_disk_that_fills_up_while_writing(
    calls: int, refused: Any, good: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the first layer of the journal, at the second, and at the artifact's weights."""
    counted = iter(range(calls))
    sync = os.fsync
    monkeypatch.setattr(
        files.os, "fsync", lambda fd: sync(fd) if next(counted, None) is not None else full()
    )
    line = refused(good)
    assert "No space left on device" in line and "free some space or write elsewhere" in line


@pytest.mark.parametrize("name", ["_json", "copy_small_files"])
def test_a_disk_that_fills_up_at_the_small_files(
    name: str, refused: Any, good: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"moecc.artifact.write.{name}", full)
    line = refused(good)
    assert "writing out failed: No space left on device; make room or choose another place" in line


@pytest.mark.parametrize("fits", [True, False])
def test_an_artifact_that_does_not_load(
    fits: bool, refused: Any, good: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("size mismatch\nfor this and that")

    monkeypatch.setattr(verify, "free_memory", lambda: 1 << 40 if fits else 0)
    monkeypatch.setattr(verify.hf, "load", broken)
    monkeypatch.setattr(verify, "trace", broken)
    assert (
        "artifact: what was written can't be loaded again: size mismatch; nothing was kept"
        in refused(good)
    )


def test_a_resumed_run_that_fails_keeps_what_the_first_had_finished(
    refused: Any,
    good: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    args = [
        "compile",
        str(good),
        "--passes",
        QUICK,
        "-o",
        "out",
        "--rows",
        "4",
        "--length",
        "16",
        "--json",
    ]
    monkeypatch.chdir(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        stop(patch, "after saving", 3, interrupt)
        assert cli.main(args) == 130
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: Usage(1 << 30, 0, 1000))
        assert "free some" in refused(good)
    assert cli.main(args) == 0
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
