"""Rounding float tensors to the 16-bit types of the format."""

from __future__ import annotations

import torch
from torch import Tensor


def compact(values: Tensor) -> Tensor:
    """Round to float16 or bfloat16, whichever loses less in the sum of squares.

    bfloat16 wins if float16's range is exceeded or hardly used. A few values among float16's
    subnormals do not decide for bfloat16, which would cost all others three bits.
    """
    half, wide = values.to(torch.float16), values.to(torch.bfloat16)
    lost = [(t.double() - values.double()).square().sum() for t in (half, wide)]
    return (half if bool(lost[0] <= lost[1]) else wide).contiguous()
