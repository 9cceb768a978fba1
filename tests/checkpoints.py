"""Tiny checkpoints of several families, and models without weights for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM

from moecc.checkpoint.files import write_safetensors
from moecc.errors import MoeccError
from moecc.frontend.build import fake_parameters

# One set serves all families: a key that a configuration class doesn't know is left out.
COMMON: dict[str, Any] = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    moe_intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=128,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    num_experts=4,
    num_local_experts=4,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_group=2,
    topk_group=1,
    shared_expert_intermediate_size=16,
    n_shared_experts=1,
    first_k_dense_replace=1,
    decoder_sparse_step=1,
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_rope_head_dim=8,
    qk_nope_head_dim=8,
    v_head_dim=8,
    mamba_d_state=4,
    mamba_d_conv=2,
    mamba_dt_rank=4,
)
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "qwen2_moe": {},
    "deepseek_v3": {"num_key_value_heads": 4},
    "phimoe": {},
    "jamba": dict(
        attn_layer_period=2, attn_layer_offset=1, expert_layer_period=1, expert_layer_offset=0
    ),
    "gpt_oss": dict(layer_types=["sliding_attention", "full_attention"], sliding_window=8),
    "olmoe": {},
    "minimax_m2": {},
    "lfm2_moe": dict(layer_types=["conv", "full_attention"], num_dense_layers=0),
    "granitemoe": {},
}
# Names in a "qwen2_moe" checkpoint.
EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"
NORM = "model.norm.weight"


def tiny(family: str, dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    """A model of random numbers; `more` are changes to its configuration."""
    base = AutoConfig.for_model(family)
    options = {key: value for key, value in COMMON.items() if hasattr(base, key)}
    config = AutoConfig.for_model(family, **options | FAMILIES[family] | more)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.randn(tensor.shape) * 0.2)
    return model


def skeleton(folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """The model of a checkpoint with fake parameters; `changes` are to its configuration."""
    config = AutoConfig.from_pretrained(folder, **changes)
    with fake_parameters(FakeTensorMode(allow_non_fake_inputs=True)):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def saved(folder: Path, family: str = "qwen2_moe", *, shard: str = "1GB", **more: Any) -> Path:
    """Save a tiny model in `folder`; return the folder."""
    tiny(family, **more).save_pretrained(folder, max_shard_size=shard)
    return folder


def edit(folder: Path, changes: Mapping[str, Tensor | None]) -> None:
    """Replace, add or (None) drop tensors of a single-file checkpoint."""
    tensors = {**safetensors.torch.load_file(folder / "model.safetensors"), **changes}
    write_safetensors(
        folder / "model.safetensors", {n: t for n, t in tensors.items() if t is not None}
    )


def assert_same(got: Tensor, want: Tensor, name: str) -> None:
    assert got.dtype == want.dtype, name
    assert torch.equal(got, want), name


def fails(action: Callable[[], object], *words: str) -> None:
    """Assert that `action` raises a MoeccError of one line that has all of `words`."""
    with pytest.raises(MoeccError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message
