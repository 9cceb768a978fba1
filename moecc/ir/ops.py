"""The moecc dialect: one node per MoE layer, defined by an eager reference.

  moecc::experts        the dense experts of a layer, straight from the trace
  moecc::klt_experts    the same without the parts that the experts share (basis, mean); the
                        remainder is still dense
  moecc::vq_experts     the compressed form (`moecc.ir.vq4`)
  moecc::q_linear       a group-quantized dense linear (attention, shared expert)
  moecc::expert_linear  one projection per chosen expert, not combined (JetMoE's mixture of
                        attention heads)

Each op has a schema, a fake shape, an eager reference (`moecc.ir.reference`) and a backward that
differentiates the reference (`moecc.ir.register`). The reference is the definition: passes write
the op, and tests compare the backends with it. Attributes are keyword-only without defaults,
because torch.export drops arguments that equal a default.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from moecc.ir import vq4
from moecc.ir.reference import (
    VQ_OPERANDS,
    dequantize_linear,
    expert_linear_reference,
    experts_reference,
    klt_experts_reference,
    q_linear_reference,
    vq_experts_reference,
)
from moecc.ir.register import define

__all__ = [
    "ATTRIBUTES",
    "EXPERTS",
    "KLT_EXPERTS",
    "MOE_OPS",
    "Q_LINEAR",
    "REFERENCE",
    "ROUTED",
    "VQ_EXPERTS",
    "define",
    "dequantize_linear",
    "operands_of",
    "same_shape",
    "vq_experts_reference",
]

ATTRIBUTES = "str act, str gate, float alpha, float limit, float eps"
ROUTED = "Tensor x, Tensor topk_index, Tensor topk_weight"
_DENSE = f"{ROUTED}, Tensor gate_up, Tensor down"
_BIASES = "Tensor? gate_up_bias, Tensor? down_bias"
_NORM = "Tensor? post_norm"


def operands_of(projection: str, names: Sequence[str]) -> str:
    """Return the schema text of one projection's tensors."""
    required = {"codes", "codebook", "scale"}
    return ", ".join(f"{'Tensor' if t in required else 'Tensor?'} {projection}_{t}" for t in names)


def _of_both(names: Sequence[str]) -> str:
    return ", ".join(operands_of(projection, names) for projection in ("gate_up", "down"))


def same_shape(
    x: Tensor, topk_index: Tensor, topk_weight: Tensor, *args: object, **kwargs: object
) -> Tensor:
    """Return the fake result of an MoE op, [T, D]."""
    torch._check(x.dim() == 2 and topk_index.dim() == 2 and topk_weight.dim() == 2)
    torch._check(topk_index.size(0) == x.size(0))
    return x.new_empty(x.shape)


define("experts", f"{_DENSE}, {_BIASES}, {_NORM}", ATTRIBUTES, experts_reference, same_shape)
define(
    "klt_experts",
    f"{_DENSE}, {_of_both(vq4.SHARED)}, {_BIASES}, {_NORM}",
    ATTRIBUTES,
    klt_experts_reference,
    same_shape,
)
define(
    "vq_experts",
    f"{ROUTED}, {_of_both(VQ_OPERANDS)}, {_NORM}",
    ATTRIBUTES,
    vq_experts_reference,
    same_shape,
)
define(
    "q_linear",
    "Tensor x, Tensor weight, Tensor scale, Tensor zero, Tensor? bias",
    "int bits",
    q_linear_reference,
    lambda x, weight, *rest, bits: x.new_empty((*x.shape[:-1], weight.shape[0])),
)
define(
    "expert_linear",
    "Tensor x, Tensor topk_index, Tensor weight",
    "",
    expert_linear_reference,
    lambda x, topk_index, weight: x.new_empty((*topk_index.shape, weight.shape[1])),
)

EXPERTS = torch.ops.moecc.experts.default
KLT_EXPERTS = torch.ops.moecc.klt_experts.default
VQ_EXPERTS = torch.ops.moecc.vq_experts.default
Q_LINEAR = torch.ops.moecc.q_linear.default
MOE_OPS = frozenset({EXPERTS, KLT_EXPERTS, VQ_EXPERTS})
# Call these, not the ops, under autograd: an op's own backward runs its reference a second time.
REFERENCE: dict[object, Callable[..., Tensor]] = {
    EXPERTS: experts_reference,
    KLT_EXPERTS: klt_experts_reference,
    VQ_EXPERTS: vq_experts_reference,
}
