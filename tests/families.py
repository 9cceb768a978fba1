"""A tiny model of every MoE family that moecc takes.

`make("mixtral")` builds one: two decoder layers, four experts, random float32 weights. A row says
how its configuration differs from COMMON, and what its experts must look like. Names are
transformers' model types. The tests of a family that the installed transformers lacks are skipped
(`Missing`).
"""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from moecc.frontend.config import model_class

ALL = os.environ.get("MOECC_ALL_FAMILIES") == "1"  # `make test-all`: every case of every test

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
    max_position_embeddings=256,
    num_experts=4,
    num_local_experts=4,
    n_routed_experts=4,
    moe_num_experts=4,
    num_experts_per_tok=2,
    moe_k=2,
    moe_topk=2,
    n_shared_experts=1,
    moe_num_shared_experts=1,
    num_shared_experts=1,
    shared_expert_intermediate_size=16,
    shared_intermediate_size=16,
    n_group=2,
    topk_group=1,
    first_k_dense_replace=0,
    num_dense_layers=0,
    decoder_sparse_step=1,
    moe_layer_start_index=0,
    num_nextn_predict_layers=0,
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_rope_head_dim=8,
    qk_nope_head_dim=8,
    v_head_dim=8,
    index_n_heads=2,
    index_head_dim=16,
    index_topk=4,
    mamba_d_state=4,
    mamba_d_conv=2,
    mamba_n_heads=4,
    mamba_d_head=16,
    mamba_n_groups=1,
    mamba_dt_rank=4,
    use_mamba_kernels=False,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)


@dataclass(frozen=True)
class Family:
    """One family."""

    config: dict[str, Any] = field(default_factory=dict)  # beyond COMMON
    layers: int = 2  # MoE layers that run
    gate: dict[str, Any] = field(default_factory=dict)  # attributes other than the default
    interleaved: bool = False
    transposed: bool = False
    longest: int | None = None  # longest sequence that the trace holds for, None for any
    config_class: str | None = None  # module:class, if no model type names the configuration
    unreached: int = 0  # experts parameters that a text trace doesn't reach


MLA = dict(num_key_value_heads=4)
HYBRID = dict(layer_types=["linear_attention", "full_attention"])
FULL = dict(layer_types=["full_attention", "full_attention"])
SPARSE = dict(mlp_layer_types=["sparse", "sparse"])
MROPE = dict(rope_type="default", rope_theta=10000.0, mrope_section=[1, 1, 2])
OAI = dict(gate="oai", alpha=1.702, limit=7.0)
CLAMP = dict(gate="clamp", limit=10.0)

FAMILIES: dict[str, Family] = {
    "afmoe": Family(),
    "aria_text": Family(transposed=True),
    "axk1": Family({**MLA, **SPARSE}),
    "axk2": Family(MLA, layers=1),
    "bailing_hybrid": Family(MLA),
    "beam": Family({**SPARSE, **FULL}, gate=dict(gate="f32")),
    "cohere2_moe": Family(),
    "dbrx": Family(
        dict(
            d_model=32,
            n_heads=4,
            n_layers=2,
            max_seq_len=256,
            attn_config=dict(kv_n_heads=2, clip_qkv=8.0, rope_theta=10000.0),
            ffn_config=dict(ffn_hidden_size=16, moe_num_experts=4, moe_top_k=2, hidden_size=32),
        )
    ),
    "deepseek_ocr2_text": Family({**MLA, **SPARSE}),
    "deepseek_v2": Family(MLA),
    "deepseek_v3": Family(MLA),
    "deepseek_v32": Family(MLA),
    "deepseek_v4": Family(gate=CLAMP, longest=127),
    "dots1": Family(),
    "dots3_note_text": Family(MLA, layers=1),
    "ernie4_5_moe": Family(),
    "ernie4_5_vl_moe_text": Family(
        dict(moe_intermediate_size=[16, 16], rope_parameters=MROPE), layers=1, unreached=2
    ),
    "exaone_moe": Family(),
    "flex_olmo": Family(),
    "flint": Family(dict(mlp_only_layers=[], **FULL)),
    "gemma4_text": Family(
        dict(
            enable_moe_block=True,
            top_k_experts=2,
            layer_types=["sliding_attention", "full_attention"],
            sliding_window=8,
            hidden_size_per_layer_input=8,
            vocab_size_per_layer_input=64,
            num_kv_shared_layers=0,
            global_head_dim=8,
        ),
        gate=dict(act="gelu_tanh"),
    ),
    "glm4_moe": Family(),
    "glm4_moe_lite": Family(MLA, layers=1),
    "glm4v_moe_text": Family(dict(rope_parameters=dict(MROPE, partial_rotary_factor=1.0))),
    "glm5_next_text": Family(
        dict(MLA, index_topk=32, index_kpool=16, qk_rope_head_dim=0, **SPARSE), gate=CLAMP
    ),
    "glm_moe_dsa": Family(MLA),
    "gpt_oss": Family(
        dict(layer_types=["sliding_attention", "full_attention"], sliding_window=8),
        gate=OAI,
        interleaved=True,
        transposed=True,
    ),
    "granitemoe": Family(),
    "granitemoe_swa": Family(),
    "granitemoehybrid": Family(dict(layer_types=["mamba", "attention"], mamba_chunk_size=8)),
    "granitemoeshared": Family(),
    "hunyuan_v1_moe": Family(),
    "hy_v3": Family(layers=1),
    "hy_v4": Family(MLA, layers=1, gate=CLAMP),
    "inkling2_text": Family(
        dict(unpadded_vocab_size=64), gate=dict(gate="softcap", alpha=4.0, limit=25.0)
    ),
    "inkling_text": Family(),
    "jamba": Family(
        dict(attn_layer_period=2, attn_layer_offset=1, expert_layer_period=1, expert_layer_offset=0)
    ),
    "jetmoe": Family(dict(num_key_value_heads=2, kv_channels=8, activation_function="silu")),
    "kimi_linear": Family(MLA, layers=1),
    "kolibri1": Family(),
    "laguna": Family(layers=1),
    "lfm2_moe": Family(dict(layer_types=["conv", "full_attention"], num_dense_layers=0)),
    "llama4_text": Family(
        dict(
            interleave_moe_layer_step=1,
            intermediate_size_mlp=48,
            attention_chunk_size=64,
            use_qk_norm=True,
            num_experts_per_tok=1,
        ),
        transposed=True,
    ),
    "longcat_flash": Family(
        dict(
            num_layers=2,
            num_hidden_layers=4,
            num_key_value_heads=4,
            expert_ffn_hidden_size=16,
            ffn_hidden_size=48,
            zero_expert_num=2,
            moe_topk=2,
        )
    ),
    "mellum": Family(),
    "mimo_v2_flash": Family(layers=1),
    "minimax": Family(dict(HYBRID, block_size=64), longest=63),
    "minimax_m2": Family(),
    "minimax_m3_vl_text": Family(gate=OAI),
    "mistral4": Family(dict(num_key_value_heads=4, head_dim=16, qk_head_dim=16)),
    "mistral_large4_text": Family(MLA),
    "mixtral": Family(),
    "muse_spark_text": Family(),
    "nemotron_h": Family(
        dict(
            num_hidden_layers=None,
            layers_block_type=["moe", "attention", "mamba", "moe"],
            mamba_num_heads=4,
            mamba_head_dim=8,
            ssm_state_size=8,
            n_groups=1,
            chunk_size=8,
            conv_kernel=2,
            moe_latent_size=None,
            moe_shared_expert_intermediate_size=16,
        ),
        gate=dict(act="relu2", gate="none"),
    ),
    "olmoe": Family(),
    "openai_privacy_filter": Family(gate=OAI, transposed=True),
    "phimoe": Family(),
    "qwen2_moe": Family(),
    "qwen3_5_moe_text": Family(HYBRID),
    "qwen3_moe": Family(),
    "qwen3_next": Family(HYBRID),
    "qwen3_omni_moe_text": Family(),
    "qwen3_vl_moe_text": Family(),
    "qwen4_exp_text": Family(),
    "solar_open": Family(),
    "step3p7_text": Family(
        dict(num_hidden_layers=2, sliding_window=8, **FULL, **SPARSE),
        config_class="transformers.models.step3p7.configuration_step3p7:Step3p7TextConfig",
    ),
    "unlimited_ocr_text": Family(MLA, layers=1),
    "zaya": Family(dict(num_experts_per_tok=1)),
}

SAMPLE = (
    "mixtral",
    "qwen2_moe",
    "deepseek_v3",
    "gpt_oss",
    "llama4_text",
    "dbrx",
    "nemotron_h",
    "phimoe",
    "muse_spark_text",
    "qwen3_next",
)


class Missing(pytest.skip.Exception):
    """Skips the test: the installed transformers has no such family."""


def _config_class(name: str) -> Any:
    where = FAMILIES[name].config_class
    try:
        if where:
            module, _, attribute = where.partition(":")
            return getattr(importlib.import_module(module), attribute)
        return type(AutoConfig.for_model(name))
    except (ImportError, AttributeError, ValueError) as error:
        raise Missing(f"transformers has no {name}") from error


def _knows(default: Any, key: str) -> bool:
    try:
        return hasattr(default, key)
    except Exception:  # a property that fails on a default configuration exists nevertheless
        return True


def config(name: str) -> Any:
    """Return the tiny configuration of a family; raise Missing if there is none."""
    cls = _config_class(name)
    default = cls()
    known = {key: value for key, value in COMMON.items() if _knows(default, key)}
    known.update(FAMILIES[name].config)
    return cls(**{key: value for key, value in known.items() if value is not None})


def make(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """Return a model with seeded random weights, in evaluation mode; raise Missing as `config`."""
    cfg = config(name)
    cls = model_class(cfg)
    torch.manual_seed(0)
    model = (getattr(cls, "from_config", None) or cls._from_config)(cfg, dtype=dtype).eval()
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")
    model.config.use_cache = False
    _randomize(model)
    return model


@torch.no_grad()
def _randomize(model: torch.nn.Module) -> None:
    """Draw matrices wide enough that experts and routing differ, and biases that aren't zero."""
    generator = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if p.dim() >= 2:
            p.copy_(torch.randn(p.shape, generator=generator) * 0.2)
        elif not torch.isfinite(p).all() or "bias" in name:
            p.copy_(torch.randn(p.shape, generator=generator) * 0.02)
        elif "post_expert_norm" in name:
            p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    for name, b in model.named_buffers():
        if "correction_bias" in name or name.endswith("expert_bias"):
            b.copy_(torch.randn(b.shape, generator=generator) * 0.1)
