"""Tracing without weights: real-size models in little memory, and errors of one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import fails
from families import ALL
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import AutoConfig, LlamaConfig, MixtralConfig, T5Config

from moecc.frontend import experts
from moecc.frontend.capture import capture
from moecc.frontend.compressed import compress_module
from moecc.frontend.skeleton import skeleton
from moecc.ir import ops

torch.set_num_threads(1)
linux = pytest.mark.skipif(sys.platform != "linux", reason="its limits and /proc are Linux's")

TINY = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_local_experts=4,
    max_position_embeddings=64,
)
DEEPSEEK_V3 = dict(
    model_type="deepseek_v3",
    vocab_size=129280,
    hidden_size=7168,
    intermediate_size=18432,
    num_hidden_layers=61,
    num_attention_heads=128,
    num_key_value_heads=128,
    max_position_embeddings=163840,
    moe_intermediate_size=2048,
    n_routed_experts=256,
    n_shared_experts=1,
    num_experts_per_tok=8,
    n_group=8,
    topk_group=4,
    norm_topk_prob=True,
    routed_scaling_factor=2.5,
    first_k_dense_replace=3,
    q_lora_rank=1536,
    kv_lora_rank=512,
    qk_rope_head_dim=64,
    qk_nope_head_dim=128,
    v_head_dim=128,
    dtype="bfloat16",
)

# Beyond its imports, the process may take 1 GiB of addresses.
MEASURE = """
import json, resource, sys, torch
torch.set_num_threads(1)
from transformers import AutoConfig
from moecc.frontend.capture import capture
from moecc.frontend.skeleton import skeleton
from moecc.ir import ops
config = json.loads(sys.argv[1])
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + 2**30
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
found = skeleton(AutoConfig.for_model(config.pop("model_type"), **config))
program = capture(found)
nodes = [n for n in program.graph.nodes if n.target is ops.EXPERTS]
print(json.dumps({
    "nodes": len(nodes), "layers": program.graph_module.meta["layers"],
    "bytes": sum(p.numel() * p.element_size() for p in found.model.parameters()),
    "rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
}))
"""


def measure(config: dict[str, Any]) -> dict[str, int]:
    """Trace in a process of its own; return what came out, and the peak memory in bytes."""
    command = [sys.executable, "-c", MEASURE, json.dumps(config)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    result: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return result


@linux
def test_a_25_gb_model_is_traced_in_1_gb() -> None:
    """The first four layers of DeepSeek-V3; one tensor of experts takes 15 GB."""
    result = measure({**DEEPSEEK_V3, "num_hidden_layers": 4})
    assert (result["nodes"], result["layers"]) == (1, 4)
    assert result["bytes"] > 25e9
    assert result["rss"] < 1.5e9


@linux
@pytest.mark.skipif(not ALL, reason="a minute; MOECC_ALL_FAMILIES=1 runs it")
def test_deepseek_v3_is_traced_in_1_gb() -> None:
    result = measure(DEEPSEEK_V3)
    assert (result["nodes"], result["layers"]) == (58, 61)
    assert result["bytes"] > 1.3e12
    assert result["rss"] < 1.5e9


# ---------------------------------------------------------------- skeletons


def test_parameters_are_fake_and_buffers_are_real() -> None:
    found = skeleton(MixtralConfig(**TINY))
    assert all(isinstance(p.data, FakeTensor) for p in found.model.parameters())
    buffers = dict(found.model.named_buffers())
    frequencies = buffers["model.rotary_emb.inv_freq"]
    assert not isinstance(frequencies, FakeTensor)
    assert frequencies[0] == 1.0 and frequencies.device.type == "cpu"


def test_a_tensor_that_no_machine_holds_is_never_allocated() -> None:
    """One tensor of DeepSeek-V3's experts takes 30 GB in float32."""
    huge = dict(num_local_experts=65536, hidden_size=8192, intermediate_size=8192)
    found = skeleton(MixtralConfig(**{**TINY, **huge}), torch.float32)
    assert max(p.nbytes for p in found.model.parameters()) == 65536 * 2 * 8192 * 8192 * 4
    assert all(isinstance(p.data, FakeTensor) for p in found.model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_is_the_one_asked_for(dtype: torch.dtype) -> None:
    found = skeleton(MixtralConfig(**TINY), dtype)
    assert {p.dtype for p in found.model.parameters()} == {dtype}


def test_dtype_is_the_configs_by_default() -> None:
    assert next(skeleton(MixtralConfig(**TINY)).model.parameters()).dtype == torch.float32
    assert (
        next(skeleton(MixtralConfig(**TINY, dtype="bfloat16")).model.parameters()).dtype
        == torch.bfloat16
    )


def test_correction_bias_keeps_float32_in_a_bfloat16_model() -> None:
    config = AutoConfig.for_model(
        "deepseek_v3",
        **{**TINY, "num_key_value_heads": 4},
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=0,
    )
    buffers = dict(skeleton(config, torch.bfloat16).model.named_buffers())
    bias = next(b for name, b in buffers.items() if name.endswith("e_score_correction_bias"))
    assert bias.dtype == torch.float32


def test_a_folder_gives_the_same_program_as_its_config(tmp_path: Path) -> None:
    config = MixtralConfig(**TINY)
    config.save_pretrained(tmp_path)
    found = skeleton(tmp_path)
    assert found.folder == tmp_path
    assert [n.target for n in capture(found).graph.nodes] == [
        n.target for n in capture(skeleton(config)).graph.nodes
    ]


def test_a_module_is_left_as_it_was() -> None:
    from transformers import MixtralForCausalLM

    model = MixtralForCausalLM(MixtralConfig(**TINY)).train()
    before, cache = model.config._experts_implementation, model.config.use_cache
    capture(skeleton(model))
    assert model.training and "forward" not in model.__dict__
    assert (model.config._experts_implementation, model.config.use_cache) == (before, cache)


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (3, ("int", "folder")),
        (LlamaConfig(), ("llama", "no experts")),
        (T5Config(), ("t5", "encoder-decoder")),
        ("./no/such/folder", ("no folder './no/such/folder'", "give a checkpoint folder")),
        (nn.Linear(2, 2), ("Linear", "no experts")),
        (
            MixtralConfig(**TINY, quantization_config={"quant_method": "gptq"}),
            ("gptq", "unquantized"),
        ),
    ],
)
def test_wrong_sources_are_one_line_errors(source: Any, words: tuple[str, ...]) -> None:
    fails(lambda: skeleton(source), *words)


def test_a_model_on_the_meta_device_is_refused() -> None:
    from transformers import MixtralForCausalLM

    with torch.device("meta"):
        model = MixtralForCausalLM(MixtralConfig(**TINY))
    fails(lambda: skeleton(model), "meta device")


def test_a_folder_without_config_is_named(tmp_path: Path) -> None:
    fails(lambda: skeleton(tmp_path), "config.json", str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    fails(lambda: skeleton(tmp_path), "config.json")


def test_an_unknown_hub_id_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: Any, **kwargs: Any) -> None:
        raise OSError("we are\noffline")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    fails(lambda: skeleton("nobody/nothing"), "nobody/nothing", "hub")


def test_experts_of_an_unknown_class_are_reported_as_such() -> None:
    config = AutoConfig.for_model(
        "doge", **{k: v for k, v in TINY.items() if k != "num_local_experts"}, is_moe=True
    )
    config.num_experts = 16
    fails(lambda: skeleton(config), "doge", "doesn't know")


# ---------------------------------------------------------------- compressed modules


def specs(rows: int, columns: int) -> dict[str, tuple[tuple[int, ...], str]]:
    return {
        "codes": ((4, rows, -(-columns // 8) * 2), "uint8"),
        "codebook": ((4, 256, 4), "int8"),
        "scale": ((4, rows), "float16"),
    }


def compressed(model: nn.Module) -> None:
    for module in experts.experts_modules(model).values():
        attributes = {**experts.gate_of(module), "eps": 0.0}
        compress_module(
            module, specs(32, 32), specs(32, 16), attributes, ["gate_up_proj", "down_proj"]
        )


def test_a_compressed_module_runs_its_stored_tensors() -> None:
    from transformers import MixtralForCausalLM

    model = MixtralForCausalLM(MixtralConfig(**TINY, experts_implementation="eager")).eval()
    experts.register()
    model.set_experts_implementation("moecc")
    compressed(model)
    names = {k for k in model.state_dict() if k.startswith("model.layers.0.mlp.experts.")}
    assert names == {
        f"model.layers.0.mlp.experts.{p}.{t}"
        for p in ("gate_up", "down")
        for t in ("codes", "codebook", "scale")
    }
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.rpartition(".")[2] in ("codes", "codebook"):
                buffer.random_(-100 if buffer.dtype == torch.int8 else 0, 100)
            elif name.endswith(".scale"):
                buffer.fill_(0.001)
        ids = torch.arange(6).view(1, 6)
        logits = model(input_ids=ids).logits
        program = capture(skeleton(model))
        assert torch.isfinite(logits).all()
        torch.testing.assert_close(program.module()(input_ids=ids).logits, logits)
    assert sum(n.target is ops.VQ_EXPERTS for n in program.graph.nodes) == 2


def test_a_compressed_checkpoint_is_traced_without_its_tensors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("moecc.frontend.skeleton.prepare", lambda model, found: compressed(model))
    found = skeleton(MixtralConfig(**TINY, quantization_config={"quant_method": "moecc"}))
    buffers = dict(found.model.named_buffers())
    assert isinstance(buffers["model.layers.0.mlp.experts.down.codes"], FakeTensor)
    program = capture(found)
    nodes = [n for n in program.graph.nodes if n.target is ops.VQ_EXPERTS]
    assert [n.meta["path"] for n in nodes] == [
        "model.layers.0.mlp.experts",
        "model.layers.1.mlp.experts",
    ]
    assert [n.meta["layer"] for n in nodes] == [1, 2]
