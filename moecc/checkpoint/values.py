"""The dtype that a tensor gets when a model is loaded, and the check that it is finite."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from moecc.errors import MoeccError
from moecc.ir.tensors import nonfinite
from moecc.types import FamilyModule

_LARGEST = 1e15  # 10^8 squares of it add up to less than float32 holds
_WIDE = (torch.bfloat16, torch.float32, torch.float64)


def kept_dtype(model: FamilyModule, name: str, declared: Tensor, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the tensor `name` in a model that is loaded as `dtype`.

    Some tensors keep the dtype of `declared`, the model's own tensor: codes and indices, buffers,
    and parameters that the model declares in another dtype than its first float parameter.
    transformers also lists exceptions that stay float32, mostly routing biases.
    """
    if not declared.is_floating_point():
        return declared.dtype
    if (planned := planned_dtype(model, name, dtype)) is not None:
        return planned
    is_buffer = not isinstance(_attribute(model, name), nn.Parameter)
    usual = next((p.dtype for p in model.parameters() if p.is_floating_point()), dtype)
    return declared.dtype if is_buffer or declared.dtype != usual else dtype


def planned_dtype(model: FamilyModule, name: str, dtype: torch.dtype) -> torch.dtype | None:
    """Return the dtype that transformers keeps the tensor `name` in, if it makes an exception.

    dtype: of the whole model.
    """
    plan: dict[str, torch.dtype] = (
        model._get_dtype_plan(dtype) if hasattr(model, "_get_dtype_plan") else {}
    )
    found = (kept for p, kept in plan.items() if re.search(p.replace("*", ".*"), name))
    return next(found, None)


def _attribute(model: nn.Module, name: str) -> object:
    path, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(path), leaf, None)


def require_finite(tensor: Tensor, what: str) -> None:
    """Raise MoeccError if a float tensor holds NaN or infinity; `what` names it and its file."""
    if found := nonfinite(tensor):
        raise MoeccError(f"{what} holds {found}: fetch it again or retrain it")


def require_squares(tensor: Tensor, what: str) -> None:
    """Raise MoeccError if float32 can't hold sums of squares of a matrix; `what` names it.

    Every pass measures errors by them. Single rows may hold extreme numbers on purpose, such as a
    bias that keeps a router from an expert.
    """
    if tensor.dim() < 2 or tensor.numel() == 0 or tensor.dtype not in _WIDE:
        return
    low, high = tensor.detach().aminmax()
    if (largest := max(-float(low), float(high))) > _LARGEST:
        raise MoeccError(
            f"{what} holds {largest:.3g}, and float32 can't hold the squares of such weights: "
            "fetch it again or retrain it"
        )
