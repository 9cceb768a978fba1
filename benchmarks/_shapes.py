"""Random checkpoints that have the layer shapes of large models, with few layers and experts.

Weights are noise with what trained ones have too: a part of low rank, rows and columns of unequal
size, and a few columns that stick out. What a weight costs to code depends on none of this.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from moecc.pipeline.work import Experts, Scope

_SHARD = 1 << 30  # bytes
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
        vocabulary = 150_000
        return Scope(
            (own,) * self.layers,
            tokens,
            self.layers * attention,
            vocabulary * self.hidden,
            weighted,
            outputs=vocabulary,
        )

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
    """Write a checkpoint in bfloat16, with the example's tokenizer; one tensor in memory at a time.

    Names and shapes are those of a model of two experts, and each of its experts is every other.
    """
    torch.manual_seed(seed)
    folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as place:
        small = transformers.AutoModelForCausalLM.from_config(
            shape.small(2, layers), dtype=torch.bfloat16
        )
        small.save_pretrained(place)
        with safe_open(Path(place) / "model.safetensors", "pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}
    config = shape.small(experts, layers)
    config.architectures, config.dtype = small.config.architectures, torch.bfloat16
    config.save_pretrained(folder)
    shards = _Shards(folder)
    for name, sizes in shapes.items():
        sizes = [experts, *sizes[1:]] if sizes[0] == 2 else sizes
        first, _, rest = name.partition(".experts.0.")
        if not rest:
            names = [] if ".experts.1." in name else [name]
        else:
            names = [f"{first}.experts.{e}.{rest}" for e in range(experts)]
        for each in names:
            shards.add(each, _matrices(sizes))
    shards.close()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EXAMPLE / name, folder)


class _Shards:
    """The files of a checkpoint, written one by one."""

    def __init__(self, folder: Path):
        self.folder, self.places = folder, dict[str, str]()
        self.tensors, self.bytes = dict[str, Tensor](), 0

    def add(self, name: str, tensor: Tensor) -> None:
        self.tensors[name] = tensor
        self.bytes += tensor.nbytes
        if self.bytes > _SHARD:
            self._write()

    def close(self) -> None:
        self._write()
        index = {"metadata": {}, "weight_map": self.places}
        (self.folder / "model.safetensors.index.json").write_text(json.dumps(index))

    def _write(self) -> None:
        file = f"model-{len(set(self.places.values())) + 1:05}.safetensors"
        save_file(self.tensors, self.folder / file, metadata={"format": "pt"})
        self.places.update(dict.fromkeys(self.tensors, file))
        self.tensors, self.bytes = {}, 0


def _matrices(sizes: Sequence[int]) -> Tensor:
    """One tensor: a vector near one, or matrices that are drawn."""
    found = torch.empty(*sizes, dtype=torch.bfloat16)
    if found.dim() == 1:
        return found.copy_(_near_one(found))
    for matrix in found.view(-1, *sizes[-2:]):
        matrix.copy_(_drawn(*matrix.shape))
    return found


def _drawn(rows: int, columns: int) -> Tensor:
    size = torch.exp(0.25 * torch.randn(columns))
    size[torch.randperm(columns)[: max(1, columns // 200)]] *= 3
    low = torch.randn(rows, 16) @ torch.randn(16, columns) / 8
    unequal = torch.exp(0.2 * torch.randn(rows, 1))
    return 0.02 * (torch.randn(rows, columns) + low) * size * unequal


def _near_one(vector: Tensor) -> Tensor:
    return 1 + 0.05 * torch.randn(vector.shape)
