"""MoE layers in the format, drawn by `slow_vq4`: as tensors, packed for a GPU, and computed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypedDict

import slow_vq4 as slow
import torch
from torch import Tensor

from moecc.backends.triton import pack
from moecc.ir import ops, vq4
from moecc.ir.gates import rows_per_unit

Projection = dict[str, Tensor | None]
Packed = tuple[Tensor, Tensor, Tensor, Projection, Projection, Tensor | None]


class Attributes(TypedDict):
    """The attributes of `moecc::vq_experts`."""

    act: str
    gate: str
    alpha: float
    limit: float
    eps: float


@dataclass
class Layer:
    """One layer's experts, and tokens x [T, D] with their routing, index and weight [T, k]."""

    x: Tensor
    index: Tensor
    weight: Tensor
    gate_up: Projection
    down: Projection
    post_norm: Tensor | None
    attributes: Attributes

    @property
    def gated(self) -> bool:
        return self.attributes["gate"] != "none"

    def packed(self) -> Packed:
        """Return the arguments of moecc.backends.triton.launch.vq_experts."""
        gate_up = pack.pack_projection(self.gate_up, gated=self.gated)
        down = pack.pack_projection(self.down, gated=False)
        return self.x, self.index, self.weight, gate_up, down, self.post_norm

    def to(self, device: str) -> Layer:
        def moved(p: Projection) -> Projection:
            return {name: None if t is None else t.to(device) for name, t in p.items()}

        return replace(
            self,
            x=self.x.to(device),
            index=self.index.to(device),
            weight=self.weight.to(device),
            gate_up=moved(self.gate_up),
            down=moved(self.down),
            post_norm=None if self.post_norm is None else self.post_norm.to(device),
        )

    def reference(self) -> Tensor:
        """Return the output of the op's definition, on the stored tensors."""
        operands: list[Tensor | None] = []
        for p in (self.gate_up, self.down):
            operands += [*(p[name] for name in vq4.TENSORS), None, None]
        return ops.vq_experts_reference(
            self.x, self.index, self.weight, *operands, self.post_norm, **self.attributes
        )


def tensors(p: slow.Projection, dtype: torch.dtype = torch.float16) -> Projection:
    """Return a projection's arrays as tensors, floats in `dtype`."""
    return {
        name: t.to(dtype) if t is not None and t.is_floating_point() else t
        for name, t in slow.tensors(p).items()
    }


def draw_layer(
    bits: int = 2,
    *,
    tokens: int = 5,
    top_k: int = 2,
    experts: int = 4,
    hidden: int = 40,
    intermediate: int = 24,
    shared: bool = False,
    rank: int = 0,
    bias: bool = False,
    mean: int = 0,
    norm: bool = False,
    act: str = "silu",
    gate: str = "glu",
    dtype: torch.dtype = torch.float32,
    scales: torch.dtype = torch.float16,
) -> Layer:
    """Draw a layer and tokens routed through it.

    shared: one codebook for the layer. mean: bits of the mean, 0 for none. dtype: of the tokens.
    scales: dtype of the stored float tensors.
    """
    common = dict(experts=experts, bits=bits, shared=shared, rank=rank, bias=bias, mean=mean)
    gate_up = slow.draw(bits, rows=rows_per_unit(gate) * intermediate, columns=hidden, **common)
    down = slow.draw(bits + 50, rows=hidden, columns=intermediate, input_side=False, **common)
    x, index, weight = slow.draw_routing(
        3, tokens=tokens, top_k=top_k, experts=experts, hidden=hidden
    )
    return Layer(
        x=torch.from_numpy(x).to(dtype),
        index=torch.from_numpy(index),
        weight=torch.from_numpy(weight).float(),
        gate_up=tensors(gate_up, scales),
        down=tensors(down, scales),
        post_norm=1 + torch.from_numpy(slow.uniform(4, hidden)).float() / 4 if norm else None,
        attributes=Attributes(act=act, gate=gate, alpha=1.7, limit=0.8, eps=1e-6),
    )


# name -> options of draw_layer
FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "shared-codebook": dict(shared=True),
    "bias": dict(bias=True),
    "basis": dict(rank=3),
    "wide-basis": dict(rank=40),
    "mean": dict(mean=3),
    "mean-of-4-bit": dict(mean=4),
    "everything": dict(rank=3, bias=True, mean=2, shared=True),
    "norm": dict(norm=True, bias=True),
    "norm-and-everything": dict(norm=True, rank=3, bias=True, mean=2),
    "no-gate": dict(gate="none", act="relu2", bias=True, rank=2, mean=2),
    "bfloat16": dict(dtype=torch.bfloat16, scales=torch.bfloat16, rank=3, bias=True, mean=2),
    "float16": dict(dtype=torch.float16, rank=3, bias=True),
}

# name -> chosen experts [T, k], number of experts
ROUTINGS = {
    "one-token": (torch.tensor([[2, 0]]), 4),
    "one-expert-takes-all": (torch.full((19, 1), 1), 4),
    "expert-without-a-token": (torch.tensor([[0, 3], [3, 0], [0, 1]]), 4),
    "the-same-expert-twice": (torch.tensor([[1, 1], [0, 1], [2, 2]]), 4),
    "more-experts-than-slots": (torch.tensor([[6, 2]]), 7),
    "blocks-with-padding": (torch.tensor([[0]] * 9 + [[1]] * 8 + [[3]] * 3), 4),
    "three-choices": (torch.tensor([[0, 1, 2], [3, 2, 1]]), 4),
}

# largest error as a share of the largest output; 2 units in the last place of 16-bit outputs
WITHIN = {
    torch.float32: 2e-4,
    torch.float16: 2e-3,
    torch.bfloat16: 1.6e-2,
}


def draw_routed(routing: str, bits: int) -> Layer:
    """Draw a layer and tokens with a routing of ROUTINGS."""
    index, experts = ROUTINGS[routing]
    tokens, top_k = index.shape
    layer = draw_layer(bits, tokens=tokens, top_k=top_k, experts=experts, rank=2, mean=2, bias=True)
    return replace(layer, index=index)


def assert_within(out: Tensor, wanted: Tensor) -> None:
    """Assert that an output is as near to the reference as its type allows."""
    assert out.dtype == wanted.dtype and bool(wanted.abs().max() > 0)
    error = (out.cpu().double() - wanted.double()).abs().max() / wanted.double().abs().max()
    assert error < WITHIN[wanted.dtype], float(error)


def bits_of(tensors: Mapping[str, Tensor | None]) -> int:
    """Return the number of bits that these tensors hold."""
    return sum(8 * t.numel() * t.element_size() for t in tensors.values() if t is not None)
