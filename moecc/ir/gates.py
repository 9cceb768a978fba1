"""The closed set of activations and gate functions of MoE experts.

A gate turns the rows of the first projection into hidden units: [n, 2F] -> [n, F]; without a gate,
[n, F] -> [n, F]. Rows are canonical: all gate rows first, then all up rows. The set comes from the
`_apply_gate` methods of transformers 5. A function outside the set is an error
(`moecc.frontend.probe.probe_gate`), never a guess.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

Activation: TypeAlias = Callable[[Tensor], Tensor]

ACTIVATIONS: dict[str, Activation] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "identity": lambda x: x,
}


def _clamped(g: Tensor, u: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    return g.clamp(max=limit), u.clamp(-limit, limit)


def _clamp(g: Tensor, u: Tensor, act: Activation, alpha: float, limit: float) -> Tensor:
    g, u = _clamped(g, u, limit)
    return act(g) * u


def _clamp_f32(g: Tensor, u: Tensor, act: Activation, alpha: float, limit: float) -> Tensor:
    return _clamp(_up(g), _up(u), act, alpha, limit).to(g.dtype)


def _clamp_after(g: Tensor, u: Tensor, act: Activation, alpha: float, limit: float) -> Tensor:
    return act(g).clamp(max=limit) * u.clamp(-limit, limit)


def _oai(g: Tensor, u: Tensor, act: Activation, alpha: float, limit: float) -> Tensor:
    g, u = _clamped(g, u, limit)
    return (u + 1) * (g * torch.sigmoid(g * alpha))


def _softcap(g: Tensor, u: Tensor, act: Activation, alpha: float, limit: float) -> Tensor:
    gf, uf = _up(g), _up(u)
    capped = torch.tanh(gf / alpha) * alpha
    return (capped * torch.sigmoid(gf) * (torch.tanh(uf / limit) * limit)).to(g.dtype)


def _up(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


@dataclass(frozen=True)
class Gate:
    """One gate function, and how a module that applies it is told (`moecc.frontend.probe`).

    compute: f(gate rows, up rows, activation, alpha, limit), which defines its alpha and limit.
    alpha, limit: attributes of a module that may hold them, dotted. act: the activation, if it is
    always the same. wide: the gate that computes the same in float32.
    """

    compute: Callable[[Tensor, Tensor, Activation, float, float], Tensor]
    alpha: tuple[str, ...] = ()
    limit: tuple[str, ...] = ()
    act: str = ""
    wide: str = ""


_ALPHA, _LIMIT = ("alpha", "swiglu_alpha"), ("limit", "swiglu_limit")
_SOFTCAPS = ("act_fn.gate_softcap.softcap",), ("act_fn.up_softcap.softcap",)

GATES: dict[str, Gate] = {
    "glu": Gate(lambda g, u, act, alpha, limit: act(g) * u, wide="f32"),
    "f32": Gate(lambda g, u, act, alpha, limit: (act(_up(g)) * _up(u)).to(g.dtype)),
    "clamp": Gate(_clamp, limit=_LIMIT, wide="clamp_f32"),  # deepseek_v4, glm5_next, hy_v4
    "clamp_f32": Gate(_clamp_f32),
    "clamp_after": Gate(_clamp_after, limit=_LIMIT),  # step3p7
    "oai": Gate(_oai, _ALPHA, _LIMIT, act="silu"),  # gpt_oss, openai_privacy_filter, minimax_m3_vl
    "softcap": Gate(_softcap, *_SOFTCAPS, act="silu"),  # inkling2: alpha caps gate, limit caps up
}


def rows_per_unit(gate: str) -> int:
    """Return the rows of the first projection per hidden unit, N / F: 2 with a gate, 1 without."""
    return 1 if gate == "none" else 2


def apply_gate(rows: Tensor, act: str, gate: str, alpha: float, limit: float) -> Tensor:
    """Return the hidden units [..., F] for rows [..., N] of the first projection."""
    if gate == "none":
        return ACTIVATIONS[act](rows)
    g, u = rows.chunk(2, dim=-1)
    return GATES[gate].compute(g, u, ACTIVATIONS[act], alpha, limit)
