"""Models that cannot be compiled: each is refused in one line, and the disk stays as it was."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from made import Command, checkpoint
from refusals import Refused, edit_config, edit_tensors
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

torch.set_num_threads(1)
pytestmark = pytest.mark.usefixtures("traced_once")


# ---------------------------------------------------------------- the model


def test_a_missing_folder_is_refused(refused: Refused) -> None:
    assert "nothing" in refused("./nothing")
    assert "no folder ''; give a checkpoint folder or a hub id" in refused("")
    assert "no folder 'owner/nothing' here" in refused("owner/nothing")


def test_a_dense_model_is_refused(refused: Refused, tmp_path: Path) -> None:
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


def test_an_unknown_family_is_refused(refused: Refused, model: Path) -> None:
    edit_config(model, model_type="mixture_of_unicorns", architectures=["UnicornForCausalLM"])
    line = refused(model)
    assert "mixture_of_unicorns" in line and "config.json" in line


def test_a_model_with_code_of_its_own_is_refused(refused: Refused, model: Path) -> None:
    code = {"AutoConfig": "configuration_unicorn.UnicornConfig"}
    edit_config(model, model_type="unicorn", auto_map=code)
    for options in ([], ["--trust-remote-code"]):
        assert "moecc doesn't run a model's own code" in refused(model, *options)


def test_an_encoder_decoder_is_refused(refused: Refused, model: Path) -> None:
    edit_config(model, is_encoder_decoder=True)
    assert "encoder-decoder" in refused(model)


def test_a_file_that_is_no_configuration_is_refused(refused: Refused, model: Path) -> None:
    for text in ("", "{", "[]", "{}", "null"):
        (model / "config.json").write_text(text)
        assert "config" in refused(model)
    (model / "config.json").unlink()
    assert "no config.json" in refused(model)


def test_a_quantized_checkpoint_is_refused(refused: Refused, model: Path) -> None:
    edit_config(model, quantization_config={"quant_method": "gptq", "bits": 4})
    says = "quantized already (gptq); give the unquantized checkpoint, or one of fp8 or mxfp4"
    assert says in refused(model)


def test_pickled_weights_are_refused(refused: Refused, model: Path) -> None:
    (model / "model.safetensors").unlink()
    assert "no *.safetensors weights" in refused(model)
    (model / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    assert "pickled weights ('pytorch_model.bin')" in refused(model)


# ---------------------------------------------------------------- tensors


def test_a_missing_tensor_is_named(refused: Refused, model: Path) -> None:
    edit_tensors(model, lambda t: t.pop("model.layers.1.self_attn.o_proj.weight"))
    line = refused(model)
    assert "'model.layers.1.self_attn.o_proj.weight'" in line and "missing" in line


def test_a_missing_expert_is_named(refused: Refused, model: Path) -> None:
    names = load_file(model / "model.safetensors")
    name = next(n for n in names if "layers.1" in n and ".experts.2." in n)
    edit_tensors(model, lambda t: t.pop(name))
    line = refused(model)
    assert "takes 4 experts" in line and name in line and "fetch it again" in line


def test_missing_shards_and_bad_indices_are_named(refused: Refused, model: Path) -> None:
    names = list(load_file(model / "model.safetensors"))
    (model / "model.safetensors").rename(model / "model-00001-of-00002.safetensors")
    index = {n: f"model-0000{1 + (i % 2)}-of-00002.safetensors" for i, n in enumerate(names)}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    line = refused(model)
    assert "lacks 'model-00002-of-00002.safetensors'" in line and "fetch it again" in line
    (model / "model.safetensors.index.json").write_text("{}")
    assert "isn't a valid index" in refused(model)
    (model / "model.safetensors.index.json").write_text('{"weight_map": {"x": 3}}')
    assert "'weight_map' must give file names" in refused(model)


@pytest.mark.parametrize("keep", [0, 4, 100, -1000, -1])
def test_truncated_files_are_refused(keep: int, refused: Refused, model: Path) -> None:
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
def test_nan_and_infinity_are_named_whenever_they_are_read(
    part: str, value: float, refused: Refused, model: Path
) -> None:
    """Some weights are read only behind the layers, or when the artifact is written."""
    name = next(n for n in load_file(model / "model.safetensors") if part in n)
    edit_tensors(model, lambda t: t[name].view(-1)[-1:].fill_(value))
    line = refused(model)
    what = "1 NaN and 0 infinite" if value != value else "0 NaN and 1 infinite"
    assert f"'{name}'" in line and what in line and "fetch it again or retrain it" in line


# ---------------------------------------------------------------- a config that does not fit


WRONG: list[tuple[str, object]] = [
    ("hidden_size", 64),
    ("intermediate_size", 96),
    ("num_local_experts", 8),
    ("num_hidden_layers", 3),
    ("vocab_size", 65),
    ("num_attention_heads", 8),
    ("num_key_value_heads", 4),
    ("num_experts_per_tok", 5),
    ("hidden_act", "sillu"),
    ("head_dim", 7),
    ("num_local_experts", 3),
    ("num_local_experts", 0),
    ("hidden_size", -32),
    ("hidden_size", "wide"),
]


@pytest.mark.parametrize(("entry", "value"), WRONG)
def test_a_config_of_other_sizes_is_refused(
    entry: str, value: object, refused: Refused, model: Path
) -> None:
    edit_config(model, **{entry: value})
    line = refused(model)
    assert len(line) > 30 and "tokenizer" not in line


TAKES_ONE = "but a token takes 1 expert"
ENTRIES: dict[str, tuple[str, object, str]] = {
    "too many experts per token": (
        "num_experts_per_tok",
        9,
        f"num_experts_per_tok is 9 and num_local_experts 4, {TAKES_ONE}",
    ),
    "no expert per token": (
        "num_experts_per_tok",
        0,
        f"num_experts_per_tok is 0 and num_local_experts 4, {TAKES_ONE}",
    ),
    "heads": ("num_attention_heads", 3, "the model can't be traced: Attempting to broadcast"),
    "activation": ("hidden_act", "mystery", "hidden_act 'mystery' is unknown"),
    "type": (
        "hidden_size",
        "64",
        "field 'hidden_size': TypeError: Field 'hidden_size' expected int, got str",
    ),
}


@pytest.mark.parametrize(("entry", "value", "says"), ENTRIES.values(), ids=ENTRIES.keys())
def test_a_config_that_makes_no_model_is_named_with_its_entry(
    entry: str, value: object, says: str, moecc: Command, model: Path
) -> None:
    edit_config(model, **{entry: value})
    (model / "model.safetensors").unlink()  # else they are what doesn't fit
    got = moecc("inspect", model)
    assert got.code == 2 and got.err.startswith(f"moecc: error: {model}") and says in got.err
    assert got.err.endswith("; check config.json\n")


@pytest.mark.parametrize("where", ["__init__", "forward"])
def test_too_little_memory_is_no_fault_of_the_config(
    where: str, moecc: Command, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def short(*args: object, **kwargs: object) -> NoReturn:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 GB")

    edit_config(model, rms_norm_eps=0.0009)  # no test has traced it before
    monkeypatch.setattr(MixtralSparseMoeBlock, where, short)
    got = moecc("inspect", model)
    assert got.code == 2 and got.err.startswith("moecc: error: out of memory (")
    assert "config.json" not in got.err


def test_a_config_of_more_layers_than_the_weights_is_refused_before_a_model_is_built(
    refused: Refused, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "moecc.frontend.skeleton.build", lambda *_: pytest.fail("a model was built")
    )
    edit_config(model, num_hidden_layers=1024)
    says = f"num_hidden_layers in {model}/config.json is 1024, and the weights there are of 2 layer"
    assert says in refused(model)
    edit_config(model, num_hidden_layers=10**9)
    assert "is '1000000000', and moecc takes at most 1024" in refused(model)
    (model / "model.safetensors").unlink()
    edit_config(model, num_hidden_layers=1024)
    assert f"{model} has no *.safetensors weights" in refused(model)


def test_a_process_prints_one_line_too(model: Path) -> None:
    """torch logs a traceback for an op that can't be traced, which capsys does not see."""
    edit_config(model, num_attention_heads=3)
    (model / "model.safetensors").unlink()
    args = (sys.executable, "-m", "moecc.cli", "inspect", model, "--json")
    got = subprocess.run(args, capture_output=True, text=True)
    assert (got.returncode, got.stdout) == (2, "")
    last = got.stderr.splitlines()[-1]
    assert "Traceback" not in got.stderr and last.startswith(f"moecc: error: {model} (mixtral): ")


def test_a_tensor_of_another_shape_is_named(refused: Refused, model: Path) -> None:
    edit_config(model, intermediate_size=96)
    line = refused(model)
    assert "but config.json implies" in line and "check that it belongs to these weights" in line
