"""An error as a share of its reference, wherever one is reported or trained on."""

from __future__ import annotations

import torch
from torch import Tensor


def relative(error: Tensor | float, reference: Tensor | float) -> Tensor:
    """Return error / reference, element by element; both are 0 or more.

    Where the reference is zero, or so small that the quotient is no number, the share is 0 without
    an error and 1 with one. An error that is infinite or no number stays so.
    """
    e, r = (torch.as_tensor(x, dtype=_dtype(x)) for x in (error, reference))
    share = e / torch.where(r > 0, r, 1)
    defined = (r > 0) & (share.isfinite() | ~e.isfinite())
    return torch.where(defined | ~e.isfinite(), share, (e > 0).to(share.dtype))


def _dtype(value: Tensor | float) -> torch.dtype:
    return value.dtype if isinstance(value, Tensor) else torch.float64
