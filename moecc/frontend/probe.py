"""Which gate an experts module applies, found by running it on random numbers.

The flags of transformers say whether there is a gate, but not which: `_apply_gate` is free code. It
needs no weights, so it can be run on a model that has none and compared with every gate of
`moecc.ir.gates`. A gate that matches none of them is an error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TypedDict

import torch
from torch import Tensor, nn

from moecc.errors import MoeccError
from moecc.ir.gates import ACTIVATIONS, GATES, apply_gate
from moecc.ir.reference import norm_output
from moecc.types import FamilyModule

ADVICE = "add the function to moecc/ir/gates.py, or report the family"


class GateAttributes(TypedDict):
    """The gate as moecc::experts and `moecc.ir.gates.apply_gate` take it."""

    act: str
    gate: str
    alpha: float
    limit: float


@dataclass(frozen=True)
class Layout:
    """The gate of an experts module, and the storage order of its parameters.

    interleaved: gate and up rows alternate. transposed: [E, in, out] instead of [E, out, in].
    """

    act: str
    gate: str = "glu"
    alpha: float = 1.0
    limit: float = 0.0
    interleaved: bool = False
    transposed: bool = False

    def gate_attributes(self) -> GateAttributes:
        """Return the gate without the storage order, as the ops take it."""
        return GateAttributes(act=self.act, gate=self.gate, alpha=self.alpha, limit=self.limit)

    def apply(self, rows: Tensor) -> Tensor:
        """Apply the gate to rows [n, 2F] in the module's own order; the result is [n, F]."""
        if self.interleaved:
            rows = torch.cat((rows[..., ::2], rows[..., 1::2]), -1)
        return apply_gate(rows, **self.gate_attributes())


def _samples(width: int) -> Tensor:
    """Return 96 rows [96, width] of scales 0.5 to 2000.

    Small values tell activations apart, large ones reach any clamp.
    """
    generator = torch.Generator(device="cpu").manual_seed(0)
    scales = torch.tensor([0.5, 1.0, 4.0, 20.0, 200.0, 2000.0], device="cpu").repeat_interleave(16)
    shape = (len(scales), width)
    rows = torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32)
    return rows * scales[:, None]


def _close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def activation_name(act: Callable[[Tensor], Tensor] | None) -> str | None:
    """Return the name of an activation in `moecc.ir.gates.ACTIVATIONS`, or None if it has none."""
    if act is None:
        return None
    x = _samples(32)
    try:
        y = act(x)
    except TypeError:  # an activation of two arguments (inkling2)
        return None
    return next((name for name, f in ACTIVATIONS.items() if _close(f(x), y)), None)


def plain_layout(
    owner: str, act: Callable[[Tensor], Tensor], *, gate: str = "glu", transposed: bool = False
) -> Layout:
    """Return the layout of a class whose gate function is known; its activation is identified.

    Raise MoeccError, which names the class `owner`, if the activation isn't known.
    """
    name = activation_name(act)
    if name is None:
        raise MoeccError(f"{owner}: activation {type(act).__name__} isn't known; {ADVICE}")
    return Layout(name, gate, transposed=transposed)


def _numbers(module: nn.Module, *names: str) -> list[float]:
    """Return the finite numbers among attributes of a module, by dotted names."""
    values = [_attribute(module, name) for name in names]
    return [float(v) for v in values if isinstance(v, (int, float)) and math.isfinite(v)]


def _attribute(owner: object, name: str) -> object:
    for part in name.split("."):
        owner = getattr(owner, part, None)
    return owner


def _candidates(module: FamilyModule) -> Iterator[Layout]:
    """Yield the layouts to try, likely ones first, so that the plain gate is found at once."""
    named = activation_name(getattr(module, "act_fn", None))
    acts = sorted(ACTIVATIONS, key=lambda name: name != named)
    variants = {gate.wide for gate in GATES.values()}  # told apart by rounding alone
    for interleaved in (False, True):
        for name, gate in GATES.items():
            if name in variants:
                continue
            limits = _numbers(module, *gate.limit) if gate.limit else [0.0]
            for limit in limits:
                for alpha in _numbers(module, *gate.alpha) or [1.0]:
                    for act in [gate.act] if gate.act else acts:
                        yield Layout(act, name, alpha, limit, interleaved)


def _with_rounding(module: FamilyModule, layout: Layout, rows: Tensor) -> Layout:
    """Return the fp32 variant of `layout` if only it gives the module's bfloat16 numbers."""
    wide = GATES[layout.gate].wide
    if not wide:
        return layout
    rows = rows.bfloat16()
    expected, other = module._apply_gate(rows), replace(layout, gate=wide)
    is_wide = not torch.equal(layout.apply(rows), expected) and torch.equal(
        other.apply(rows), expected
    )
    return other if is_wide else layout


@torch.no_grad()
def probe_gate(module: FamilyModule) -> Layout:
    """Return the layout of a module of transformers' experts interface.

    Call it outside fake mode. It reads no weight and leaves the random state alone. Raise
    MoeccError if the gate can't be run on its own or isn't known.
    """
    owner, transposed = type(module).__name__, bool(getattr(module, "is_transposed", False))
    if not getattr(module, "has_gate", True):
        return plain_layout(owner, module.act_fn, gate="none", transposed=transposed)
    rows = _samples(32)
    try:
        expected = module._apply_gate(rows)
    except Exception as error:
        raise MoeccError(
            f"{owner}: its gate can't be run on its own ({error}); {ADVICE}"
        ) from error
    for layout in _candidates(module):
        if _close(layout.apply(rows), expected):
            return replace(_with_rounding(module, layout, rows), transposed=transposed)
    raise MoeccError(f"{owner}: its gate function isn't one that moecc knows; {ADVICE}")


@torch.no_grad()
def probe_post_norm(norm: nn.Module, owner: str) -> float:
    """Return the epsilon of the norm on an expert's output.

    Raise MoeccError unless the norm scales by 1 + weight and then normalises, as the op does.
    """
    eps = next(iter(_numbers(norm, "eps", "variance_epsilon")), None)
    weight, x = _samples(32)[20] * 0.1, _samples(32)[:48]
    if eps is not None and hasattr(norm, "weight"):
        got = torch.func.functional_call(norm, {"weight": weight}, (x,))
        if _close(got, norm_output(x, 1.0 + weight, eps)):
            return eps
    raise MoeccError(
        f"{owner}: the norm on its experts' outputs ({type(norm).__name__}) isn't known; {ADVICE}"
    )
