"""Low-rank adapters in the program: a placeholder for W becomes one for the derived W + B A.

Shapes: W [N, K], A [r, K], B [N, r]. A and B are held under `<weight>.lora_a` and `<weight>.lora_b`
until they are merged.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from moecc.ir.program import Program, Weight
from moecc.ir.relative import relative

_SUFFIX = ".adapted"


@dataclass(frozen=True)
class AdaptedWeight:
    """A weight W that stands for W + B A."""

    placeholder: str
    weight: str  # its own name
    a: str  # the names of the two factors
    b: str


def attach(program: Program, placeholder: str, a: Tensor, b: Tensor) -> None:
    """Let `placeholder`, which stands for a plain weight, stand for that weight plus `b` @ `a`."""
    name = program.weights[placeholder].name
    sources = (name, f"{name}.lora_a", f"{name}.lora_b")
    program.tensors[sources[1]], program.tensors[sources[2]] = a, b
    recipe = fx.Graph()
    w, low, high = (recipe.placeholder(n) for n in ("w", "a", "b"))
    product = recipe.call_function(torch.ops.aten.mm.default, (high, low))
    recipe.output(recipe.call_function(torch.ops.aten.add.Tensor, (w, product)))
    derived = fx.GraphModule(torch.nn.Module(), recipe)
    program.weights[placeholder] = Weight(name + _SUFFIX, derived, sources)


def attached(program: Program) -> list[AdaptedWeight]:
    """The adapted weights of a program, in the order of its placeholders."""
    return [
        AdaptedWeight(placeholder, *weight.sources)
        for placeholder, weight in program.weights.items()
        if weight.recipe is not None and weight.name.endswith(_SUFFIX)
    ]


def merge(program: Program, adapted: AdaptedWeight) -> float:
    """Make W + B A the plain weight again, rounded to the type that the checkpoint stores W in.

    Return the relative squared error of this rounding.
    """
    value = program.read(adapted.weight + _SUFFIX)
    program.weights[adapted.placeholder] = Weight(adapted.weight)
    program.rewrite(adapted.weight, value)
    for name in (adapted.a, adapted.b):
        program.tensors.pop(name)
    error = (program.read(adapted.weight) - value).square().sum()
    return float(relative(error, value.square().sum()))
