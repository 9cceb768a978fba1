"""Adapter folders as PEFT saves them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor


def adapter(folder: Path, shapes: dict[str, tuple[int, ...]], **config: Any) -> dict[str, Tensor]:
    """Write an adapter with random matrices as PEFT saves it; return its tensors."""
    folder.mkdir(exist_ok=True)
    g = torch.Generator().manual_seed(0)
    tensors = {
        f"base_model.model.{name}.weight": torch.randn(shape, generator=g) * 0.2
        for name, shape in shapes.items()
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    plain = dict(peft_type="LORA", r=2, lora_alpha=8, bias="none", use_dora=False)
    (folder / "adapter_config.json").write_text(json.dumps(plain | config))
    return tensors


def linear(module: str, rows: int, columns: int, rank: int = 2) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a linear's adapter."""
    return {f"{module}.lora_A": (rank, columns), f"{module}.lora_B": (rows, rank)}
