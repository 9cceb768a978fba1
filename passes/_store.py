"""Rounding float tensors to the 16-bit types of the format."""

from __future__ import annotations

import torch
from torch import Tensor


def compact(values: Tensor) -> Tensor:
    """float16 where its range holds every value without losing precision, else bfloat16."""
    size = values.abs()
    small = size[size > 0].min() if bool((size > 0).any()) else size.new_tensor(1.0)
    fits = (
        float(size.max()) < 65504 and float(small) >= 2**-16
    )  # a quarter of a bit or less is lost in subnormals above this
    return values.to(torch.float16 if fits else torch.bfloat16).contiguous()
