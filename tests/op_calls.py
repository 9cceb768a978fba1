"""Calls of every op of moecc's dialect, drawn by `slow_vq4`.

Shapes: T tokens, k choices per token, E experts, N rows, K columns, D hidden, F intermediate,
r rank.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import slow_vq4 as slow
import torch
from torch import Tensor

from moecc.ir import gates, ops

E, D, F = 4, 8, 6  # experts, hidden, intermediate
ATTRIBUTES: dict[str, Any] = dict(act="silu", gate="glu", alpha=1.7, limit=0.8, eps=1e-6)
Call = tuple[Any, list[Any], dict[str, Any]]  # op, positional arguments, attributes


def floats(
    salt: int, *shape: int, dtype: torch.dtype = torch.float64, scale: float = 1.0
) -> Tensor:
    """Draw numbers of -scale..scale."""
    return (torch.from_numpy(slow.uniform(salt, *shape)) * scale).to(dtype)


def whole(
    salt: int, *shape: int, low: int = 0, high: int = 255, dtype: torch.dtype = torch.uint8
) -> Tensor:
    """Draw whole numbers of low..high."""
    return torch.from_numpy(slow.numbers(salt, *shape) % (high - low + 1) + low).to(dtype)


def routed(tokens: int = 5, top_k: int = 2, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Draw x [T, D], chosen experts and routing weights [T, k]; expert 2 gets no token."""
    index = whole(2, tokens, top_k, high=E - 2, dtype=torch.int64)
    index = torch.where(index == 2, torch.full_like(index, E - 1), index)
    return [floats(1, tokens, D, dtype=dtype), index, floats(3, tokens, top_k, dtype=dtype)]


def dense(
    *, optional: bool, gate: str = "glu", dtype: torch.dtype = torch.float64
) -> list[Tensor | None]:
    """Draw the operands of `experts` after the routing: two weights, two biases, a norm."""
    n = gates.rows_per_unit(gate) * F
    extra = [floats(6, E, n, dtype=dtype), floats(7, E, D, dtype=dtype), floats(8, D, dtype=dtype)]
    weights = floats(4, E, n, D, dtype=dtype), floats(5, E, D, F, dtype=dtype)
    return [*weights, *(extra if optional else [None] * 3)]


def basis(salt: int, coef_shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """Draw basis [r, D], coef i8 of `coef_shape`, coef_scale."""
    rank = coef_shape[2] if coef_shape[1] != 2 else 2
    return [
        floats(salt, rank, D, dtype=dtype),
        whole(salt + 1, *coef_shape, low=-127, high=127, dtype=torch.int8),
        floats(salt + 2, *coef_shape[:2], dtype=dtype, scale=0.01),
    ]


def mean(salt: int, bits: int, rows: int, columns: int, dtype: torch.dtype) -> list[Tensor | None]:
    """Draw codes, signs, codebook and scale of a mean of all experts."""
    drawn = slow.draw(salt, experts=1, rows=rows, columns=columns, bits=bits)
    return [cast(drawn[name], dtype) for name in slow.CODED]


def cast(value: np.ndarray | None, dtype: torch.dtype) -> Tensor | None:
    """Return a drawn array as a tensor, floats in `dtype`."""
    t = None if value is None else torch.from_numpy(value)
    return t if t is None or not t.is_floating_point() else t.to(dtype)


def klt(
    *, optional: bool, means: bool | None = None, dtype: torch.dtype = torch.float64
) -> list[Tensor | None]:
    """Draw the operands of klt_experts after the routing.

    means: with means, by default as `optional` says.
    """
    weights = dense(optional=optional, dtype=dtype)
    up: list[Tensor | None] = [None] * 3
    down: list[Tensor | None] = [None] * 3
    if optional:
        up, down = [*basis(20, (E, 2 * F, 3), dtype)], [*basis(30, (E, 2, F), dtype)]
    up_mean: list[Tensor | None] = [None] * 4
    down_mean: list[Tensor | None] = [None] * 4
    if optional if means is None else means:
        up_mean, down_mean = mean(25, 3, 2 * F, D, dtype), mean(35, 4, D, F, dtype)
    return [*weights[:2], *up, *up_mean, *down, *down_mean, *weights[2:]]


def vq(
    bits: int,
    *,
    optional: bool,
    means: bool | None = None,
    shared: bool = False,
    affine: bool | None = None,
    dtype: torch.dtype = torch.float64,
) -> list[Tensor | None]:
    """Draw the operands of vq_experts after the routing.

    Codebooks stay whole numbers of type i8. A mean has other bits than the experts.
    """
    found: list[Tensor | None] = []
    affine = optional if affine is None else affine
    means = optional if means is None else means
    gate_up, down = slow.draw_layer(
        bits,
        experts=E,
        hidden=D,
        intermediate=F,
        bits=bits,
        shared=shared,
        rank=2 if optional else 0,
        bias=optional,
        mean={2: 3, 3: 4, 4: 2}[bits] if means else 0,
    )
    for p, rows, salt in ((gate_up, 2 * F, 40), (down, D, 50)):
        found += [cast(value, dtype) for value in p.values()]
        found.append(1 + floats(salt, E, rows, dtype=dtype, scale=0.1) if affine else None)
        found.append(floats(salt + 1, E, rows, dtype=dtype, scale=0.1) if affine else None)
    return [*found, floats(8, D, dtype=dtype) if optional else None]


def quantized(bits: int, *, bias: bool, dtype: torch.dtype = torch.float64) -> list[Tensor | None]:
    """Draw the operands of q_linear with K = 16.

    x, weight u8 [N, K bits / 8], scale [N, K / 8], zero u8 [N, K / 8], bias [N].
    """
    return [
        floats(60, 3, 5, 16, dtype=dtype),
        whole(61, 7, 16 * bits // 8),
        floats(62, 7, 2, dtype=dtype, scale=0.01),
        whole(63, 7, 2, high=2**bits - 1),
        floats(64, 7, dtype=dtype) if bias else None,
    ]


def calls(dtype: torch.dtype = torch.float64) -> dict[str, Call]:
    """Draw a call of every op: without optional operands, with all of them, with a mean alone."""
    found: dict[str, Call] = {}
    for optional in (False, True):
        suffix = "-all" if optional else ""
        r = routed(dtype=dtype)
        args = [*r, *dense(optional=optional, dtype=dtype)]
        found[f"experts{suffix}"] = ops.EXPERTS, args, ATTRIBUTES
        args = [*r, *klt(optional=optional, dtype=dtype)]
        found[f"klt{suffix}"] = ops.KLT_EXPERTS, args, ATTRIBUTES
        for bits in (2, 3, 4):
            args = [*r, *vq(bits, optional=optional, shared=bits == 4, dtype=dtype)]
            found[f"vq{bits}{suffix}"] = ops.VQ_EXPERTS, args, ATTRIBUTES
        for bits in (4, 8):
            args = quantized(bits, bias=optional, dtype=dtype)
            found[f"q_linear{bits}{suffix}"] = ops.Q_LINEAR, args, {"bits": bits}
    x, index, _ = r = routed(dtype=dtype)
    args = [*r, *klt(optional=False, means=True, dtype=dtype)]
    found["klt-mean"] = ops.KLT_EXPERTS, args, ATTRIBUTES
    args = [*r, *vq(2, optional=False, means=True, dtype=dtype)]
    found["vq2-mean"] = ops.VQ_EXPERTS, args, ATTRIBUTES
    weight, per_slot = floats(70, E, 3, D, dtype=dtype), floats(71, 5, 2, D, dtype=dtype)
    expert_linear = torch.ops.moecc.expert_linear.default
    found["expert_linear"] = expert_linear, [x, index, weight], {}
    found["expert_linear-slots"] = expert_linear, [per_slot, index, weight], {}
    return found


CALLS = calls()


def is_float(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
