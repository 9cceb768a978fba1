"""The format `vq4`, version 1, read index by index: written from the format alone, nothing shared with `moecc.ir.vq4`.

A projection is a dict of arrays by name; an absent tensor is None. E experts, N rows, K columns, r basis rows:
  codes u8 [E, N, Kp/v]; signs u8 [E, N, Kp/8]; codebook i8 [E or 1, 256, v]; scale, bias [E, N]; basis [r, D];
  coef i8 [E, N, r] (gate_up) or [E, r, F] (down); coef_scale [E, N] or [E, r];
  mean_codes, mean_signs, mean_codebook, mean_scale: as those without mean_, of one matrix in place of E.
`draw` makes one from a formula that no library's random numbers enter, so its bytes stay the same for ever.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Projection = dict[str, Any]
NAMES = (
    "codes", "signs", "codebook", "scale", "bias", "basis", "coef", "coef_scale",
    "mean_codes", "mean_signs", "mean_codebook", "mean_scale",
)  # fmt: skip


# ---- reading


def vq_weight(p: Projection, e: int, n: int, k: int) -> int:
    """The whole number that codes, codebook and sign bit give for one weight."""
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
    """VQ_e of every expert: whole numbers [E, N, K]."""
    experts, rows = p["codes"].shape[:2]
    out = np.zeros((experts, rows, columns), dtype=np.int64)
    for e in range(experts):
        for n in range(rows):
            for k in range(columns):
                out[e, n, k] = vq_weight(p, e, n, k)
    return out


def coefficient(p: Projection, e: int, i: int, j: int) -> float:
    """An entry of an expert's scaled coef: [N, r] for gate_up, [r, F] for down; the scale belongs to its row."""
    return int(p["coef"][e, i, j]) * float(p["coef_scale"][e, i])


def mean_of(p: Projection) -> Projection | None:
    """The matrix that all experts share as it is, as the codes of a single expert."""
    return None if p["mean_codes"] is None else {name: p[f"mean_{name}"] for name in NAMES[:4]}


def dense(p: Projection, columns: int, *, input_side: bool) -> np.ndarray:
    """The float64 [E, N, K] that a projection stands for, bias left out."""
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
    x: np.ndarray, index: np.ndarray, weight: np.ndarray, gate_up: Projection, down: Projection,
    gate: Callable[[np.ndarray], np.ndarray], norm: Callable[[np.ndarray], np.ndarray] | None = None,
) -> np.ndarray:  # fmt: skip
    """The output [T, D] of a layer's experts, by the format's two formulas. `norm` acts on each expert's output."""
    out = np.zeros_like(x, dtype=np.float64)
    mean_in, mean_out = mean_of(gate_up), mean_of(down)
    for t in range(x.shape[0]):
        low_in = (
            None if gate_up["basis"] is None else _matvec(gate_up["basis"], x[t])
        )  # once per token
        shared_in = None if mean_in is None else _coded(mean_in, 0, x[t])  # once per token
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
            low = np.array([
                sum(coefficient(down, e, r, f) * hidden[f] for f in range(len(hidden))) for r in range(len(low_out))
            ])  # fmt: skip
            y = _coded(down, e, hidden)
            if down["bias"] is not None:
                y = y + down["bias"][e].astype(np.float64)
            if norm is not None:  # then what is shared is applied per expert
                y = y + (_matvec(down["basis"].T, low) if len(low) else 0.0)
                out[t] += w * norm(y if mean_out is None else y + _coded(mean_out, 0, hidden))
            else:
                out[t] += w * y
                low_out, hidden_out = low_out + w * low, hidden_out + w * hidden
        if norm is None and len(low_out):
            out[t] += _matvec(down["basis"].T, low_out)  # once per token
        if norm is None and mean_out is not None:
            out[t] += _coded(mean_out, 0, hidden_out)  # once per token
    return out


def _coded(p: Projection, e: int, x: np.ndarray) -> np.ndarray:
    """scale_e * (VQ_e x)."""
    return np.array([
        float(p["scale"][e, n]) * sum(vq_weight(p, e, n, k) * float(x[k]) for k in range(len(x)))
        for n in range(p["codes"].shape[1])
    ])  # fmt: skip


def _matvec(matrix: np.ndarray, vector: np.ndarray) -> np.ndarray:
    return np.array(
        [sum(float(a) * float(b) for a, b in zip(row, vector, strict=True)) for row in matrix]
    )


def silu_glu(rows: np.ndarray) -> np.ndarray:
    """The most common gate: silu(gate rows) * up rows."""
    g, u = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    return g / (1 + np.exp(-g)) * u


# ---- drawing


def numbers(salt: int, *shape: int) -> np.ndarray:
    """32-bit numbers, as i64 of `shape`, from a counter: splitmix64's mixing, written out so that it never changes."""
    z = np.arange(1, int(np.prod(shape)) + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        z = z + np.uint64(salt) * np.uint64(0xD1B54A32D192ED03)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) >> np.uint64(32)).astype(np.int64).reshape(shape)


def uniform(salt: int, *shape: int, low: float = -1.0, high: float = 1.0) -> np.ndarray:
    """float64 on a grid of 64 steps, so that every float type with six bits or more holds it exactly."""
    return low + (high - low) * (numbers(salt, *shape) % 64) / 64


def draw(
    salt: int, *, experts: int, rows: int, columns: int, bits: int, shared: bool = False, rank: int = 0,
    bias: bool = False, input_side: bool = True, mean: int = 0,
) -> Projection:  # fmt: skip
    """A projection of the format with numbers of its own: float tensors as float16 arrays, absent tensors None.

    mean: bits of the matrix that all experts share as it is, 0 for none."""
    v, wide = (2 if bits == 4 else 4), (columns + 7) // 8 * 8
    books, hidden = (1 if shared else experts), (columns if input_side else rows)
    least = 0 if bits == 3 else -127
    signs = numbers(salt + 1, experts, rows, wide // 8) % 256
    coef = (experts, rows, rank) if input_side else (experts, rank, columns)
    one = (
        draw(salt + 10, experts=1, rows=rows, columns=columns, bits=mean)
        if mean
        else dict.fromkeys(NAMES)
    )
    return {
        "codes": (numbers(salt, experts, rows, wide // v) % 256).astype(np.uint8),
        "signs": signs.astype(np.uint8) if bits == 3 else None,
        "codebook": (numbers(salt + 2, books, 256, v) % (128 - least) + least).astype(np.int8),
        "scale": uniform(salt + 3, experts, rows, low=0.002, high=0.006).astype(np.float16),
        "bias": uniform(salt + 4, experts, rows).astype(np.float16) if bias else None,
        "basis": uniform(salt + 5, rank, hidden).astype(np.float16) if rank else None,
        "coef": (numbers(salt + 6, *coef) % 255 - 127).astype(np.int8) if rank else None,
        "coef_scale": uniform(salt + 7, *coef[:2], low=0.001, high=0.003).astype(np.float16)
        if rank
        else None,
        **{f"mean_{name}": one[name] for name in NAMES[:4]},
    }


def draw_layer(
    salt: int, *, experts: int = 3, hidden: int = 12, intermediate: int = 10, bits: int = 2, shared: bool = False,
    rank: int = 2, bias: bool = True, mean: int = 0,
) -> tuple[Projection, Projection]:  # fmt: skip
    """gate_up and down of one layer with a gate; by default K is no multiple of 8 in either."""
    common: dict[str, Any] = dict(
        experts=experts, bits=bits, shared=shared, rank=rank, bias=bias, mean=mean
    )
    return (
        draw(salt, rows=2 * intermediate, columns=hidden, **common),
        draw(salt + 50, rows=hidden, columns=intermediate, input_side=False, **common),
    )


def draw_routing(
    salt: int, *, tokens: int, top_k: int, experts: int, hidden: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x [T, D], chosen experts [T, k] (different ones per token), routing weights [T, k]."""
    index = np.argsort(numbers(salt + 1, tokens, experts), axis=1, kind="stable")[:, :top_k].astype(
        np.int64
    )
    return uniform(salt, tokens, hidden), index, uniform(salt + 2, tokens, top_k, low=0.1, high=1.0)
