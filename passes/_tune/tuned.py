"""The stored tensors of compressed experts as values that an optimizer can move.

Codebooks and coefficients are whole numbers in the format; their gradient goes straight through the
rounding. Codes and signs have no gradient and stay.
"""

from __future__ import annotations

from collections.abc import Callable, Container

import torch
from torch import Tensor

from moecc.ir import vq4
from moecc.ir.moe import MoE
from moecc.ir.program import Program
from moecc.passes._code.codebooks import clamp_codebook
from moecc.passes._code.half import compact

Group = dict[str, object]  # a parameter group of an optimizer
# kind -> learning rate at 2 bit, in units of the tensor's own (`_unit`)
RATES = {
    "codebook": 0.15,
    "scale": 2e-3,
    "bias": 2e-2,
    "basis": 5e-3,
    "coef": 0.3,
    "coef_scale": 2e-3,
    "mean_codebook": 0.15,
    "mean_scale": 2e-3,
}
_WHOLE = ("codebook", "mean_codebook", "coef")  # whole numbers in the format


def split(batches: int) -> tuple[list[int], list[int]]:
    """The calibration batches that train, and those that are held out.

    An eighth is held out, at least one; a single batch does both.
    """
    held_out = list(range(7, batches, 8)) or [batches - 1]
    return [i for i in range(batches) if i not in held_out] or held_out, held_out


class Tuned:
    """The tensors behind the compressed experts nodes `found`, by placeholder.

    Each is trained in units of its own size.
    """

    def __init__(self, program: Program, found: list[MoE]):
        self.program = program
        self.names: dict[str, str] = {}  # placeholder -> weight name
        self.kinds: dict[str, str] = {}
        self.bits: dict[str, int] = {}  # of the codes
        values: dict[str, Tensor] = {}
        for projection in (p for moe in found for p in moe.projections):
            for kind in RATES:
                node = projection.operand(kind)
                if node is None:
                    continue
                name, matrix = node.name, vq4.MEAN if kind.startswith(vq4.MEAN) else ""
                self.names[name], self.kinds[name] = program.weights[name].name, kind
                self.bits[name] = projection.bits(matrix)
                values[name] = program.read(self.names[name]).float().clone()
        self.unit = {k: _unit(self.kinds[k], v) for k, v in values.items()}
        self.parameters = {k: (v / self.unit[k]).requires_grad_() for k, v in values.items()}

    def groups(self, factor: float) -> list[Group]:
        """Parameter groups for an optimizer, rates multiplied by `factor`.

        Per extra bit the rate is divided by 3, because less is left to correct. Larger steps
        lowered the flips of the routers at 3 bit, but raised the divergence.
        """
        rates = {
            k: RATES[self.kinds[k]] * factor * 3.0 ** (2 - self.bits[k]) for k in self.parameters
        }
        return [{"params": [p], "lr": rates[k]} for k, p in self.parameters.items()]

    def rounded(self, wanted: Container[str] | None = None) -> dict[str, Tensor]:
        """Differentiable values by placeholder, those `wanted`.

        Whole numbers are rounded with a straight-through gradient.
        """
        found: dict[str, Tensor] = {}
        for k, p in self.parameters.items():
            if wanted is not None and k not in wanted:
                continue
            value = p * self.unit[k]
            rounding = self._rounding(k)
            found[k] = value if rounding is None else value + (rounding(value) - value).detach()
        return found

    @torch.no_grad()
    def stored(self, wanted: Container[str] | None = None) -> dict[str, Tensor]:
        """The tensors, those `wanted`, exactly as `store` writes them."""
        found: dict[str, Tensor] = {}
        for k, p in self.parameters.items():
            if wanted is not None and k not in wanted:
                continue
            value = (p * self.unit[k]).detach()
            rounding = self._rounding(k)
            found[k] = compact(value) if rounding is None else rounding(value).to(torch.int8)
        return found

    def _rounding(self, placeholder: str) -> Callable[[Tensor], Tensor] | None:
        kind, bits = self.kinds[placeholder], self.bits[placeholder]
        if kind.endswith("codebook"):
            return lambda value: clamp_codebook(value, bits)
        return (lambda value: value.round().clamp(-127, 127)) if kind == "coef" else None

    def state(self) -> dict[str, Tensor]:
        """A copy of all parameters."""
        return {k: p.detach().clone() for k, p in self.parameters.items()}

    @torch.no_grad()
    def restore(self, state: dict[str, Tensor]) -> None:
        """Set all parameters to what `state` returned."""
        for k, p in self.parameters.items():
            p.copy_(state[k])

    def store(self) -> bool:
        """Write the tensors that differ from the program's; return whether any did."""
        changed = False
        for placeholder, value in self.stored().items():
            held = self.program.read(self.names[placeholder])
            if held.dtype != value.dtype or not torch.equal(held, value):
                self.program.add(self.names[placeholder], value)
                changed = True
        return changed


def _unit(kind: str, value: Tensor) -> Tensor:
    """The unit that a tensor moves in.

    Scales move relative to themselves, signed tensors relative to their mean size, whole numbers in
    steps of one.
    """
    if kind.endswith("scale"):
        return value.abs().clamp(min=1e-8)
    return value.new_ones(()) if kind in _WHOLE else value.abs().mean().clamp(min=1e-8)
