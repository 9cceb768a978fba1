"""Random checkpoints that have the layer shapes of large models, with few layers and experts.

Weights are noise with what trained ones have too: a part of low rank, rows and columns of unequal
size, and a few columns that stick out. What a weight costs to code depends on none of this.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor

from moecc.pipeline.work import Experts, Scope

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "tinymoe"


@dataclass(frozen=True)
class Shape:
    """A large model: its sizes, and the configuration of a small one with the same layers."""

    config: str  # class of transformers
    hidden: int
    intermediate: int
    experts: int
    chosen: int
    layers: int  # that have experts
    others: dict[str, object]
    names: tuple[str, str] = ("num_experts", "moe_intermediate_size")

    @property
    def weights_per_expert(self) -> int:
        return 3 * self.hidden * self.intermediate

    @property
    def weights(self) -> int:
        """Of all routed experts."""
        return self.weights_per_expert * self.experts * self.layers

    def scope(self, tokens: int, *, weighted: bool) -> Scope:
        """Return what a run goes through; the way besides the routed experts is four matrices."""
        own = Experts(
            self.experts, 2 * self.intermediate, self.hidden, self.intermediate, self.chosen
        )
        attention = 4 * self.hidden**2
        ends = 150_000 * self.hidden
        return Scope((own,) * self.layers, tokens, self.layers * attention, ends, weighted)

    def small(self, experts: int, layers: int) -> transformers.PretrainedConfig:
        """Return the configuration with fewer experts and layers."""
        count, width = self.names
        sizes = {"hidden_size": self.hidden, "num_hidden_layers": layers, count: experts}
        sizes |= {width: self.intermediate, "num_experts_per_tok": min(self.chosen, experts // 2)}
        alike = {"vocab_size": 4096, "max_position_embeddings": 2048, "tie_word_embeddings": False}
        return getattr(transformers, self.config)(**sizes, **alike, **self.others)


def _heads(count: int, kv: int, width: int = 128) -> dict[str, object]:
    return {"num_attention_heads": count, "num_key_value_heads": kv, "head_dim": width}


SHAPES = {
    "qwen3-30b-a3b": Shape("Qwen3MoeConfig", 2048, 768, 128, 8, 48, _heads(32, 4)),
    "qwen1.5-moe-a2.7b": Shape(
        "Qwen2MoeConfig",
        *(2048, 1408, 60, 4, 24),
        {
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "shared_expert_intermediate_size": 5632,
        },
    ),
    "mixtral-8x7b": Shape(
        "MixtralConfig",
        *(4096, 14336, 8, 2, 32),
        _heads(32, 8),
        ("num_local_experts", "intermediate_size"),
    ),
    "glm-4.5-air": Shape(
        "Glm4MoeConfig",
        *(4096, 1408, 128, 8, 45),
        {**_heads(96, 8), "first_k_dense_replace": 0, "n_group": 1, "topk_group": 1},
        ("n_routed_experts", "moe_intermediate_size"),
    ),
    "gpt-oss-120b": Shape(
        "GptOssConfig",
        *(2880, 2880, 128, 4, 36),
        _heads(64, 8, 64),
        ("num_local_experts", "intermediate_size"),
    ),
    "deepseek-v3": Shape(
        "DeepseekV3Config",
        *(7168, 2048, 256, 8, 58),
        {
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "first_k_dense_replace": 0,
            "n_group": 1,
            "topk_group": 1,
        },
        ("n_routed_experts", "moe_intermediate_size"),
    ),
}


def write(shape: Shape, folder: Path, experts: int, layers: int, seed: int = 0) -> None:
    """Write a checkpoint in bfloat16, with the example's tokenizer."""
    torch.manual_seed(seed)
    config = shape.small(experts, layers)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            for matrix in parameter.view(-1, *parameter.shape[-2:]):
                matrix.copy_(_drawn(*matrix.shape[-2:]) if matrix.dim() > 1 else _near_one(matrix))
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EXAMPLE / name, folder)


def _drawn(rows: int, columns: int) -> Tensor:
    size = torch.exp(0.25 * torch.randn(columns))
    size[torch.randperm(columns)[: max(1, columns // 200)]] *= 3
    low = torch.randn(rows, 16) @ torch.randn(16, columns) / 8
    unequal = torch.exp(0.2 * torch.randn(rows, 1))
    return 0.02 * (torch.randn(rows, columns) + low) * size * unequal


def _near_one(vector: Tensor) -> Tensor:
    return 1 + 0.05 * torch.randn(vector.shape)
