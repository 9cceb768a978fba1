"""The format `vq4`, version 1, read index by index.

This reader was written from the format alone and shares nothing with `moecc.ir.vq4`. A projection
is a dict of arrays by name; an absent tensor is None. E experts, N rows, K columns, Kp padded
columns, v columns per code, r basis rows, D hidden, F intermediate:

  codes u8 [E, N, Kp/v]; signs u8 [E, N, Kp/8]; codebook i8 [E or 1, 256, v]; scale, bias [E, N];
  basis [r, D]; coef i8 [E, N, r] (gate_up) or [E, r, F] (down); coef_scale [E, N] or [E, r];
  mean_codes, mean_signs, mean_codebook, mean_scale: as those without mean_, with one matrix for E.

`draw` makes a projection from a formula that uses no library's random numbers, so its bytes never
change.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

Projection = dict[str, Any]
CODED = ("codes", "signs", "codebook", "scale")
NAMES = (*CODED, "bias", "basis", "coef", "coef_scale", *(f"mean_{name}" for name in CODED))


# ---- reading


def vq_weight(p: Projection, e: int, n: int, k: int) -> int:
    """Return the whole number that codes, codebook and sign bit give for one weight."""
    books, _, v = p["codebook"].shape
    code = int(p["codes"][e, n, k // v])
    value = int(p["codebook"][e if books > 1 else 0, code, k % v])
    if p["signs"] is None:
        return value
    byte = int(p["signs"][e, n, k // 8])
    group = k // 4
    nibble = byte % 16 if group % 2 == 0 else byte // 16
    negative = (nibble >> (k % 4)) % 2 == 1
    return -1 - value if negative else value


def unscaled(p: Projection, columns: int) -> np.ndarray:
    """Return VQ_e of every expert: whole numbers [E, N, K]."""
    experts, rows = p["codes"].shape[:2]
    out = np.zeros((experts, rows, columns), dtype=np.int64)
    for e in range(experts):
        for n in range(rows):
            for k in range(columns):
                out[e, n, k] = vq_weight(p, e, n, k)
    return out


def coefficient(p: Projection, e: int, i: int, j: int) -> float:
    """Return one entry of an expert's scaled coef: [N, r] for gate_up, [r, F] for down.

    Each row of coef has its own scale.
    """
    return int(p["coef"][e, i, j]) * float(p["coef_scale"][e, i])


def mean_of(p: Projection) -> Projection | None:
    """Return the mean of all experts, as the codes of a single expert; None without one."""
    return None if p["mean_codes"] is None else {name: p[f"mean_{name}"] for name in CODED}


def dense(p: Projection, columns: int, *, input_side: bool) -> np.ndarray:
    """Return the float64 [E, N, K] that a projection stands for, without its bias."""
    out = unscaled(p, columns).astype(np.float64)
    experts, rows, _ = out.shape
    mean = mean_of(p)
    for e in range(experts):
        for n in range(rows):
            for k in range(columns):
                value = out[e, n, k] * float(p["scale"][e, n])
                if p["basis"] is not None:
                    for r in range(p["basis"].shape[0]):
                        if input_side:
                            value += coefficient(p, e, n, r) * float(p["basis"][r, k])
                        else:
                            value += float(p["basis"][r, n]) * coefficient(p, e, r, k)
                if mean is not None:
                    value += float(mean["scale"][0, n]) * vq_weight(mean, 0, n, k)
                out[e, n, k] = value
    return out


def layer(
    x: np.ndarray,
    index: np.ndarray,
    weight: np.ndarray,
    gate_up: Projection,
    down: Projection,
    gate: Callable[[np.ndarray], np.ndarray],
    norm: Callable[[np.ndarray], np.ndarray] | None = None,
) -> np.ndarray:
    """Return the output [T, D] of a layer's experts, by the format's two formulas.

    x [T, D], index and weight [T, k]. `norm` acts on each expert's output.
    """
    out = np.zeros_like(x, dtype=np.float64)
    mean_in, mean_out = mean_of(gate_up), mean_of(down)
    for t in range(x.shape[0]):
        # a basis and a mean are applied once per token, for all of its experts
        low_in = None if gate_up["basis"] is None else _matvec(gate_up["basis"], x[t])
        shared_in = None if mean_in is None else _coded(mean_in, 0, x[t])
        low_out = np.zeros(0 if down["basis"] is None else down["basis"].shape[0])
        hidden_out: Any = 0.0
        for e, w in zip(index[t].tolist(), weight[t].tolist(), strict=True):
            rows = _coded(gate_up, e, x[t])
            for n in range(len(rows)):
                if low_in is not None:
                    rows[n] += sum(
                        coefficient(gate_up, e, n, r) * low_in[r] for r in range(len(low_in))
                    )
                if shared_in is not None:
                    rows[n] += shared_in[n]
                if gate_up["bias"] is not None:
                    rows[n] += float(gate_up["bias"][e, n])
            hidden = gate(rows)
            units = range(len(hidden))
            low = np.array(
                [
                    sum(coefficient(down, e, r, f) * hidden[f] for f in units)
                    for r in range(len(low_out))
                ]
            )
            y = _coded(down, e, hidden)
            if down["bias"] is not None:
                y = y + down["bias"][e].astype(np.float64)
            if norm is not None:  # a norm per expert needs basis and mean per expert too
                y = y + (_matvec(down["basis"].T, low) if len(low) else 0.0)
                out[t] += w * norm(y if mean_out is None else y + _coded(mean_out, 0, hidden))
            else:
                out[t] += w * y
                low_out, hidden_out = low_out + w * low, hidden_out + w * hidden
        if norm is None and len(low_out):
            out[t] += _matvec(down["basis"].T, low_out)
        if norm is None and mean_out is not None:
            out[t] += _coded(mean_out, 0, hidden_out)
    return out


def _coded(p: Projection, e: int, x: np.ndarray) -> np.ndarray:
    """Return scale_e * (VQ_e x)."""
    columns = range(len(x))
    return np.array(
        [
            float(p["scale"][e, n]) * sum(vq_weight(p, e, n, k) * float(x[k]) for k in columns)
            for n in range(p["codes"].shape[1])
        ]
    )


def _matvec(matrix: np.ndarray, vector: np.ndarray) -> np.ndarray:
    return np.array(
        [sum(float(a) * float(b) for a, b in zip(row, vector, strict=True)) for row in matrix]
    )


SILU_GLU = dict(act="silu", gate="glu", alpha=0.0, limit=0.0, eps=1e-6)  # `silu_glu` for the op


def silu_glu(rows: np.ndarray) -> np.ndarray:
    """Apply the most common gate: silu(gate rows) * up rows."""
    g, u = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    return g / (1 + np.exp(-g)) * u


# ---- drawing


def numbers(salt: int, *shape: int) -> np.ndarray:
    """Return 32-bit numbers as i64 of `shape`: a counter mixed as in splitmix64.

    The mixing is written out so that it never changes.
    """
    z = np.arange(1, int(np.prod(shape)) + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        z = z + np.uint64(salt) * np.uint64(0xD1B54A32D192ED03)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) >> np.uint64(32)).astype(np.int64).reshape(shape)


def uniform(salt: int, *shape: int, low: float = -1.0, high: float = 1.0) -> np.ndarray:
    """Return float64 numbers on a grid of 64 steps.

    Every float type with six bits or more holds them exactly.
    """
    return low + (high - low) * (numbers(salt, *shape) % 64) / 64


def draw(
    salt: int,
    *,
    experts: int,
    rows: int,
    columns: int,
    bits: int,
    shared: bool = False,
    rank: int = 0,
    bias: bool = False,
    input_side: bool = True,
    mean: int = 0,
) -> Projection:
    """Draw a projection: float tensors as float16 arrays, absent tensors None.

    shared: one codebook for all experts. mean: bits of the mean of all experts, 0 for none.
    """
    v, wide = (2 if bits == 4 else 4), (columns + 7) // 8 * 8
    books, hidden = (1 if shared else experts), (columns if input_side else rows)
    least = 0 if bits == 3 else -127
    signs = numbers(salt + 1, experts, rows, wide // 8) % 256
    coef = (experts, rows, rank) if input_side else (experts, rank, columns)
    one: Projection = dict.fromkeys(CODED)
    if mean:
        one = draw(salt + 10, experts=1, rows=rows, columns=columns, bits=mean)
    coef_scale = uniform(salt + 7, *coef[:2], low=0.001, high=0.003).astype(np.float16)
    return {
        "codes": (numbers(salt, experts, rows, wide // v) % 256).astype(np.uint8),
        "signs": signs.astype(np.uint8) if bits == 3 else None,
        "codebook": (numbers(salt + 2, books, 256, v) % (128 - least) + least).astype(np.int8),
        "scale": uniform(salt + 3, experts, rows, low=0.002, high=0.006).astype(np.float16),
        "bias": uniform(salt + 4, experts, rows).astype(np.float16) if bias else None,
        "basis": uniform(salt + 5, rank, hidden).astype(np.float16) if rank else None,
        "coef": (numbers(salt + 6, *coef) % 255 - 127).astype(np.int8) if rank else None,
        "coef_scale": coef_scale if rank else None,
        **{f"mean_{name}": one[name] for name in CODED},
    }


def draw_layer(
    salt: int,
    *,
    experts: int = 3,
    hidden: int = 12,
    intermediate: int = 10,
    bits: int = 2,
    shared: bool = False,
    rank: int = 2,
    bias: bool = True,
    mean: int = 0,
) -> tuple[Projection, Projection]:
    """Draw gate_up and down of one layer with a gate; by default neither K is a multiple of 8."""
    common = dict(experts=experts, bits=bits, shared=shared, rank=rank, bias=bias, mean=mean)
    return (
        draw(salt, rows=2 * intermediate, columns=hidden, **common),
        draw(salt + 50, rows=hidden, columns=intermediate, input_side=False, **common),
    )


def draw_routing(
    salt: int, *, tokens: int, top_k: int, experts: int, hidden: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw x [T, D], chosen experts [T, k] (different ones per token), routing weights [T, k]."""
    order = np.argsort(numbers(salt + 1, tokens, experts), axis=1, kind="stable")
    weight = uniform(salt + 2, tokens, top_k, low=0.1, high=1.0)
    return uniform(salt, tokens, hidden), order[:, :top_k].astype(np.int64), weight


def tensors(p: Projection) -> dict[str, Tensor | None]:
    """Return a projection's arrays as tensors."""
    return {name: None if value is None else torch.from_numpy(value) for name, value in p.items()}


def arrays(p: dict[str, Tensor | None]) -> Projection:
    """Return a projection's tensors as arrays, floats in float64: numpy has no bfloat16."""

    def array(t: Tensor) -> np.ndarray:
        return np.asarray((t.double() if t.is_floating_point() else t).numpy())

    return {k: None if t is None else array(t) for k, t in p.items()}
