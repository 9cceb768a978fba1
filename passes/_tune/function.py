"""Functions with a gradient of their own, as PyTorch takes them, with types."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Context(Protocol):
    """What PyTorch keeps from forward to backward."""

    needs_input_grad: tuple[bool, ...]

    @property
    def saved_tensors(self) -> tuple[Tensor, ...]: ...
    def save_for_backward(self, *tensors: Tensor | None) -> None: ...


def applied(function: type[torch.autograd.Function], *args: object) -> Tensor:
    """Return the result of a function that gives one tensor."""
    y: Tensor = function.apply(*args)
    return y
