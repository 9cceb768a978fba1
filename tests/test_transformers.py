"""A loaded artifact in transformers and PEFT: what works as for any quantized model, and what is
refused in one sentence."""

from __future__ import annotations

import copy
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from made import PROMPT, Compile, checkpoint, load, logits
from pipelines import ROOT
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Trainer,
    TrainingArguments,
)

from moecc import MoeccError
from moecc.artifact.decode import float_tensors
from moecc.frontend.compressed import CompressedProjection, QuantizedLinear
from moecc.types import FamilyModule

pytestmark = pytest.mark.usefixtures("traced_once")


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory, traced_once: None) -> dict[str, Path]:
    """Artifacts by family: 2-bit experts everywhere, quantized linears in two of them."""
    from moecc import cli

    folder, made = tmp_path_factory.mktemp("artifacts"), {}
    dense = {"qwen2_moe": ",dense{bits=4,group=16}", "mixtral": ",dense{group=16}"}
    for family in ("mixtral", "qwen2_moe", "gpt_oss", "dbrx"):
        model = checkpoint(folder / f"{family}-float", family)
        passes = f"klt{{rank=2,mean=2}},vq{{rounds=1}}{dense.get(family, '')}"
        out = made[family] = folder / family
        args = "compile", model, "--passes", passes, "-o", out, "--rows", 4, "--length", 16
        assert cli.main([str(a) for a in args]) == 0
    return made


@pytest.fixture
def artifact(artifacts: dict[str, Path]) -> Path:
    """A mixtral with 2-bit experts and 8-bit linears."""
    return artifacts["mixtral"]


# ---------------------------------------------------------------- loading, moving, saving


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "dbrx"])
def test_the_model_without_its_head_has_the_same_hidden_states(
    artifacts: dict[str, Path], family: str, tmp_path: Path
) -> None:
    whole = load(artifacts[family])
    base = AutoModel.from_pretrained(artifacts[family], dtype=torch.float32).eval()
    with torch.no_grad():
        want = whole.base_model(input_ids=PROMPT)[0]
        assert torch.equal(base(input_ids=PROMPT)[0], want)
        base.save_pretrained(tmp_path)
        again = AutoModel.from_pretrained(tmp_path, dtype=torch.float32).eval()
        assert torch.equal(again(input_ids=PROMPT)[0], want)
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == {"lm_head.weight"} and not info["unexpected_keys"]


def test_another_head_takes_the_place_of_the_first(artifact: Path) -> None:
    model, info = AutoModelForSequenceClassification.from_pretrained(
        artifact, num_labels=3, output_loading_info=True
    )
    assert set(info["missing_keys"]) == {"score.weight"}
    assert set(info["unexpected_keys"]) == {"lm_head.weight"}
    assert model(input_ids=PROMPT).logits.shape == (1, 3)


@pytest.mark.parametrize(
    ("auto", "stored", "said"),
    [
        (AutoModelForCausalLM, "model.layers.1.mlp.router.weight", ""),
        (AutoModelForCausalLM, "lm_head.weight", ""),
        (AutoModel, "model.layers.1.mlp.router.weight", "layers.1.mlp.router.weight"),
        (AutoModelForSequenceClassification, "model.norm.weight", ""),
    ],
)
def test_a_lost_tensor_is_named_and_not_drawn_at_random(
    artifacts: dict[str, Path], auto: Any, stored: str, said: str, tmp_path: Path
) -> None:
    shutil.copytree(artifacts["gpt_oss"], tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[stored]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(MoeccError, match=rf" has no tensor for '{re.escape(said or stored)}' "):
        auto.from_pretrained(tmp_path)


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_stored_scale_that_is_no_number_is_refused(
    artifact: Path, value: float, tmp_path: Path
) -> None:
    shutil.copytree(artifact, tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    name = next(name for name in tensors if name.endswith("down.scale"))
    tensors[name][1, 2] = value
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(MoeccError, match=rf"^'{re.escape(name)}' of .* holds .*: fetch it again"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_class_without_the_stored_modules_is_refused(artifact: Path, tmp_path: Path) -> None:
    config = json.loads((artifact / "config.json").read_text())
    for file in artifact.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    with pytest.raises(MoeccError, match=r"layers.1.*': MixtralModel has no such module"):
        AutoModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["eager", "grouped_mm", "batched_mm"])
def test_compressed_experts_run_whatever_implementation_is_set(artifact: Path, name: str) -> None:
    model = load(artifact)
    want = logits(model)
    model.set_experts_implementation(name)
    assert model.config._experts_implementation == name
    assert torch.equal(logits(model), want)
    assert torch.equal(logits(copy.deepcopy(model)), want)


@pytest.mark.parametrize("cast", [lambda m: m.to(torch.bfloat16), lambda m: m.bfloat16()])
def test_a_cast_leaves_compressed_tensors_as_they_are_stored(artifact: Path, cast: Any) -> None:
    model = load(artifact)
    parts = (CompressedProjection, QuantizedLinear)
    compressed = [m for m in model.modules() if isinstance(m, parts)]
    before = [{k: v.clone() for k, v in m.state_dict().items()} for m in compressed]
    assert cast(model).lm_head.weight.dtype == torch.bfloat16
    for module, tensors in zip(compressed, before, strict=True):
        after = module.state_dict()
        assert after.keys() == tensors.keys() and len(after) >= 3
        assert all(
            torch.equal(after[k], v) and after[k].dtype == v.dtype for k, v in tensors.items()
        )
    assert logits(model).dtype == torch.bfloat16


def test_half_is_refused_as_for_every_quantized_model(artifact: Path) -> None:
    with pytest.raises(ValueError, match=r"`.half\(\)` is not supported for quantized model"):
        load(artifact).half()


def test_shards_that_transformers_writes_load(artifact: Path, tmp_path: Path) -> None:
    model = load(artifact)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert torch.equal(logits(load(tmp_path)), logits(model))


@pytest.mark.parametrize("buffers", [False, True])
def test_layers_may_lie_on_disk(artifact: Path, tmp_path: Path, buffers: bool) -> None:
    """With buffers, the compressed tensors too; they are read while a layer runs."""
    want = logits(load(artifact))
    rest = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
    model = AutoModelForCausalLM.from_pretrained(
        artifact,
        dtype=torch.float32,
        device_map={"model.layers.1": "disk", **dict.fromkeys(rest, "cpu")},
        offload_folder=str(tmp_path / "offload"),
        offload_buffers=buffers,
    ).eval()
    codes = model.model.layers[1].mlp.experts.gate_up.codes
    assert codes.is_meta == buffers
    assert torch.equal(logits(model), want)
    if buffers:
        with pytest.raises(MoeccError, match="its tensors are offloaded; load the model without"):
            model.dequantize()
        assert torch.equal(logits(model), want)


def test_beams_and_compiled_code_give_what_eager_code_gives(artifact: Path) -> None:
    model = load(artifact)
    model.generation_config.eos_token_id = None
    options = dict(max_new_tokens=4, num_beams=3, num_return_sequences=2, do_sample=False)
    found = model.generate(PROMPT, return_dict_in_generate=True, output_scores=True, **options)
    assert found.sequences.shape == (2, PROMPT.shape[1] + 4)
    with torch.no_grad():
        scores = model(input_ids=found.sequences).logits.log_softmax(-1)[
            :, PROMPT.shape[1] - 1 : -1
        ]
    chosen = scores.gather(-1, found.sequences[:, PROMPT.shape[1] :, None]).sum((1, 2))
    torch.testing.assert_close(found.sequences_scores, chosen / 4, rtol=1e-4, atol=1e-4)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(logits(compiled), logits(model), rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- the float model


@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss", "dbrx"])
def test_dequantize_gives_the_float_model(
    artifacts: dict[str, Path], family: str, tmp_path: Path
) -> None:
    """The same tensors as the target `dense` writes, run by transformers' own code."""
    model = load(artifacts[family])
    want = logits(model)
    assert model.dequantize() is model
    found = model.state_dict()
    for name, tensor in float_tensors(artifacts[family], torch.float32).items():
        assert torch.equal(found[name], tensor.read()), name
    torch.testing.assert_close(logits(model), want, rtol=1e-4, atol=1e-5)
    assert not any("moecc" in type(m).__module__ for m in model.modules())
    assert not any(k == "forward" for m in model.modules() for k in vars(m))
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    torch.testing.assert_close(logits(load(tmp_path)), logits(model))
    with pytest.raises(ValueError, match="first quantize your model"):
        model.dequantize()


def test_dequantize_takes_a_dtype(artifact: Path) -> None:
    model = load(artifact).dequantize(torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    want = load(artifact, torch.bfloat16)
    assert float((logits(model) - logits(want)).norm() / logits(want).norm()) < 0.05


def test_a_model_that_was_saved_can_be_dequantized(artifact: Path, tmp_path: Path) -> None:
    """Saving puts the name of the type, a string, into the configuration of the model."""
    model = load(artifact)
    want, dtype = logits(model), model.dtype
    model.save_pretrained(tmp_path)
    assert {p.dtype for p in model.dequantize().parameters()} == {dtype}
    torch.testing.assert_close(logits(model), want, rtol=1e-4, atol=1e-5)


def test_offsets_without_a_place_in_the_float_model_change_nothing(
    compile: Compile, tmp_path: Path
) -> None:
    model = checkpoint(tmp_path / "model")
    passes = "vq{rounds=1},affine{offset=on},fold"
    assert compile(model, tmp_path / "out", passes).code == 0
    loaded = load(tmp_path / "out")
    want = logits(loaded)
    with pytest.raises(MoeccError, match="offsets are stored, and its family has no biases"):
        loaded.dequantize()
    assert torch.equal(logits(loaded), want)


# ---------------------------------------------------------------- adapters


def lora(**options: Any) -> Any:
    return peft.LoraConfig(
        **{"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **options}
    )


def adapted(model: FamilyModule, **options: Any) -> FamilyModule:
    """Return `model` with an adapter whose matrices are random."""
    wrapped = peft.get_peft_model(model, lora(**options))
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in wrapped.named_parameters():
            if "lora" in name:
                p.copy_(torch.randn(p.shape, generator=g) * 0.1)
    return wrapped.eval()


def trained(model: FamilyModule, folder: Path, **options: Any) -> None:
    """Train an adapted model on PROMPT by transformers' Trainer, for a few steps."""
    rows = [{"input_ids": PROMPT[0], "labels": PROMPT[0]}] * 4
    chosen = dict(max_steps=4, learning_rate=2e-2, report_to=[], use_cpu=True, save_strategy="no")
    arguments = TrainingArguments(output_dir=str(folder / "runs"), **{**chosen, **options})
    Trainer(model, arguments, train_dataset=rows).train()


def loss(model: FamilyModule) -> float:
    with torch.no_grad():
        return float(model(input_ids=PROMPT, labels=PROMPT).loss)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "gpt_oss"])
def test_an_adapter_trains_on_the_artifact_and_loads_again(
    artifacts: dict[str, Path], family: str, tmp_path: Path
) -> None:
    """On quantized linears of 8 and 4 bit, and on float ones."""
    model = load(artifacts[family])
    base = model.state_dict()
    before = {k: v.clone() for k, v in base.items()}
    wrapped = peft.get_peft_model(model, lora())
    start = loss(wrapped)
    trained(wrapped, tmp_path, gradient_checkpointing=True)
    assert loss(wrapped.eval()) < start - 0.05
    assert all(torch.equal(base[k], v) for k, v in before.items())
    wrapped.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(load(artifacts[family]), tmp_path / "adapter").eval()
    assert torch.equal(logits(again), logits(wrapped))
    with again.disable_adapter():
        assert torch.equal(logits(again), logits(load(artifacts[family])))


def test_a_model_without_an_adapter_is_not_trained(artifact: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Please attach trainable adapters"):
        trained(load(artifact), tmp_path)


def test_a_model_with_an_adapter_inside_is_not_saved_as_an_artifact(
    artifact: Path, tmp_path: Path
) -> None:
    model = load(artifact)
    wrapped = peft.get_peft_model(model, lora())
    with pytest.raises(MoeccError, match=r"q_proj is a layer of PEFT, .* save the adapter alone"):
        model.save_pretrained(tmp_path / "inside")
    assert list(tmp_path.glob("inside/*")) == []
    wrapped.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    wrapped.unload().save_pretrained(tmp_path / "alone")
    assert torch.equal(logits(load(tmp_path / "alone")), logits(load(artifact)))


def test_adapters_of_quantized_linears_are_those_of_the_float_model(artifact: Path) -> None:
    """Merging must wait for the float model: codes can't hold the sum."""
    wrapped = adapted(load(artifact))
    want = logits(wrapped)
    assert float((want - logits(load(artifact))).norm() / want.norm()) > 0.05
    for merge in (wrapped.merge_and_unload, wrapped.merge_adapter):
        for safe in (False, True):
            with pytest.raises(MoeccError, match=r"q_proj: the codes .* can't hold an adapter too"):
                merge(safe_merge=safe)
    assert torch.equal(logits(wrapped), want)
    wrapped.dequantize()
    assert all("lora" in n for n, p in wrapped.named_parameters() if p.requires_grad)
    torch.testing.assert_close(logits(wrapped), want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits(wrapped.merge_and_unload()), want, rtol=1e-4, atol=1e-5)


def test_mixed_adapters_of_quantized_linears_are_not_merged_either(artifact: Path) -> None:
    """Their tuner leaves out PEFT's own check before merging."""
    wrapped = peft.get_peft_model(load(artifact), lora(), mixed=True)
    for merge in (wrapped.merge_and_unload, wrapped.base_model.merge_adapter):
        with pytest.raises(MoeccError, match=r"q_proj: the codes .* can't hold an adapter too"):
            merge()


def test_all_linear_finds_quantized_linears(artifacts: dict[str, Path]) -> None:
    wrapped = peft.get_peft_model(load(artifacts["qwen2_moe"]), lora(target_modules="all-linear"))
    adapted = {n for n, m in wrapped.named_modules() if isinstance(m, peft.tuners.lora.Linear)}
    config = json.loads((artifacts["qwen2_moe"] / "config.json").read_text())
    quantized = {f"base_model.model.{n}" for n in config["quantization_config"]["linears"]}
    assert quantized and quantized < adapted


ATTENTION = ["q_proj", "v_proj"]


@pytest.mark.parametrize(
    ("config", "reader"),
    [
        (lambda: lora(use_dora=True), "use_dora"),
        (lambda: lora(use_dora=True, target_modules="all-linear"), "use_dora"),
        (lambda: lora(init_lora_weights="pissa"), "init_lora_weights='pissa'"),
        (lambda: peft.HRAConfig(target_modules=ATTENTION), "HRA"),
        (lambda: peft.LoHaConfig(target_modules=ATTENTION), "LOHA"),
    ],
)
def test_adapters_that_read_the_weights_are_refused(
    artifacts: dict[str, Path], config: Any, reader: str
) -> None:
    model = load(artifacts["qwen2_moe"])
    want = logits(model)
    message = f"q_proj: {re.escape(reader)} needs the float weights of a quantized linear"
    with pytest.raises(MoeccError, match=message):
        peft.get_peft_model(model, config())
    assert torch.equal(logits(model), want)
    assert peft.get_peft_model(load(artifacts["gpt_oss"]), lora(use_dora=True)) is not None


@pytest.mark.parametrize(
    "targets",
    [
        {"target_parameters": ["mlp.experts.gate_up_proj"], "target_modules": None},
        {"target_parameters": ["down_proj"]},  # PEFT alone would train attention without a word
        {"target_modules": ["experts"]},
        {"target_modules": ["q_proj", "gate_up"]},
        {"target_modules": ["q_proj", "w1", "w2", "w3"]},  # PEFT's former names
    ],
)
def test_compressed_experts_take_no_adapter(artifact: Path, targets: dict[str, Any]) -> None:
    with pytest.raises(MoeccError, match=r"layers.0.mlp.experts: compressed experts take no adap"):
        peft.get_peft_model(load(artifact), lora(**targets))


def test_experts_of_the_dequantized_model_take_one(artifact: Path, tmp_path: Path) -> None:
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    model = load(artifact).dequantize()
    wrapped = peft.get_peft_model(model, lora(target_modules=None, target_parameters=parameters))
    start = loss(wrapped)
    trained(wrapped, tmp_path)
    assert loss(wrapped.eval()) < start - 0.05


def test_the_way_of_an_adapter_that_the_readme_tells(
    artifacts: dict[str, Path], compile: Compile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its code, on a small model: train on the artifact, save, absorb; the result acts the same."""
    text = (ROOT / "README.md").read_text()
    part = text[text.index("**An adapter that you trained on the compressed model**") :]
    code = re.search(r"\n\n((?:    .*\n|\n)+)", part)[1].replace("\n    ", "\n").strip()
    monkeypatch.chdir(tmp_path)
    passes = "vq{rounds=1},affine,fold"
    model = artifacts["qwen2_moe"].with_name("qwen2_moe-float")
    assert compile(model, tmp_path / "OUT", passes).code == 0
    rows = [{"input_ids": PROMPT[0], "labels": PROMPT[0]}] * 4
    arguments = TrainingArguments(
        "runs", max_steps=4, learning_rate=2e-2, report_to=[], use_cpu=True, save_strategy="no"
    )
    names: dict[str, Any] = {"rows": rows, "arguments": arguments}
    exec(code, names)
    wrapped = names["model"].eval().float()
    want, plain = logits(wrapped), logits(load(tmp_path / "OUT"))
    assert compile(model, "AGAIN", f"{passes},absorb{{path=ADAPTER}}").code == 0
    got = logits(load(tmp_path / "AGAIN"))
    near, far = (float((got - x).norm()) for x in (want, plain))
    assert near < 0.01 * far
