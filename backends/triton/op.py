"""moecc::vq_experts_packed: moecc::vq_experts on codes in the order of tiles, as a module on a GPU holds them.

  moecc::vq_experts_packed(x, topk_index, topk_weight, gate_up's vq4.TENSORS, down's, post_norm, *, act, gate, alpha, limit, eps)

The kernels on CUDA and ROCm, and on the CPU under TRITON_INTERPRET=1; elsewhere the definition: put the codes back into their
order, then `moecc.ir.ops.vq_experts_reference`, whose derivatives are this op's. To torch.compile and torch.export it is one node.
"""

from __future__ import annotations

import os
from typing import Any

from torch import Tensor

from moecc.backends.triton import pack
from moecc.ir import ops, vq4
from moecc.ir.gates import rows_per_unit


def _projections(
    operands: tuple[Tensor | None, ...],
) -> tuple[dict[str, Tensor | None], dict[str, Tensor | None]]:
    count = len(vq4.TENSORS)
    gate_up, down = (
        dict(zip(vq4.TENSORS, operands[i : i + count], strict=True)) for i in (0, count)
    )
    return gate_up, down


def reference(
    x: Tensor,
    topk_index: Tensor,
    topk_weight: Tensor,
    *operands: Tensor | None,
    gate: str,
    **attributes: Any,
) -> Tensor:
    """The definition. operands: gate_up, down, post_norm."""
    gate_up, down = _projections(operands)
    scale = gate_up["scale"]
    assert scale is not None
    up = pack.unpack_projection(gate_up, x.shape[1], gated=gate != "none")
    below = pack.unpack_projection(down, scale.shape[1] // rows_per_unit(gate), gated=False)
    stored = [t for p in (up, below) for t in (*(p[name] for name in vq4.TENSORS), None, None)]
    return ops.vq_experts_reference(
        x, topk_index, topk_weight, *stored, operands[-1], gate=gate, **attributes
    )


def kernel(
    x: Tensor, topk_index: Tensor, topk_weight: Tensor, *operands: Tensor | None, **attributes: Any
) -> Tensor:
    """What runs. An index outside 0..E-1 counts as zero in the kernels; the reference raises IndexError."""
    if not x.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return reference(x, topk_index, topk_weight, *operands, **attributes)
    from moecc.backends.triton.launch import vq_experts

    return vq_experts(
        x, topk_index, topk_weight, *_projections(operands), operands[-1], **attributes
    )


ops.define(
    "vq_experts_packed",
    f"{ops.ROUTED}, {ops.operands_of('gate_up', vq4.TENSORS)}, {ops.operands_of('down', vq4.TENSORS)}, Tensor? post_norm",
    ops.ATTRIBUTES,
    reference,
    ops.same_shape,
    kernel,
)
