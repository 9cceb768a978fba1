"""The ONNX nodes that moecc's own ops become when PyTorch's exporter meets them.

op                      node
moecc::vq_experts       moecc::VQExperts, inputs `bodies.coded_inputs()`
moecc::experts          moecc::Experts, the experts of a layer that was left dense
moecc::q_linear         com.microsoft::MatMulNBits
moecc::expert_linear    Gather and MatMul
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias, cast

import onnx
import onnx_ir as ir
import onnxscript
import torch
from onnxscript import values

from moecc.backends.onnx import bodies
from moecc.backends.onnx.graph import DOMAIN, MICROSOFT, Attribute, Opset, sizes
from moecc.errors import MoeccError
from moecc.ir import ops

_Node: TypeAlias = Callable[..., ir.Value]


_op = cast(Opset, onnxscript.opset18)
_Parameter = onnx.defs.OpSchema.FormalParameter
_Option = onnx.defs.OpSchema.FormalParameterOption
_STORED = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)", "tensor(uint8)", "tensor(int8)"]
_FLOATS = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]


def _operator(
    domain: str, name: str, inputs: list[tuple[str, str]], required: int, attributes: dict[str, str]
) -> _Node:
    """Return an operator for which onnx has no schema.

    inputs: (name, type); an input of type "T" has the output's type.
    """
    parameters = [
        _Parameter(n, t, param_option=_Option.Single if i < required else _Option.Optional)
        for i, (n, t) in enumerate(inputs)
    ]
    kinds, declared = onnx.defs.OpSchema.AttrType, onnx.defs.OpSchema.Attribute
    schema = onnx.defs.OpSchema(
        name,
        domain,
        1,
        inputs=parameters,
        outputs=[_Parameter("y", "T")],
        attributes=[declared(k, getattr(kinds, v)) for k, v in attributes.items()],
        type_constraints=[
            ("T", _FLOATS, ""),
            *((f"W{i}", _STORED, "") for i in range(len(inputs))),
        ],
    )
    return values.Op(values.Opset(domain, 1), name, schema)


def _typed(names: list[str]) -> list[tuple[str, str]]:
    """Return the inputs of an experts node with their types."""
    known = {"x": "T", "topk_index": "tensor(int64)", "topk_weight": "tensor(float)"}
    return [(n, known.get(n, f"W{i}")) for i, n in enumerate(names)]


_GATE = {"act": "STRING", "gate": "STRING", "alpha": "FLOAT", "limit": "FLOAT", "eps": "FLOAT"}
_VQ_EXPERTS = _operator(DOMAIN, "VQExperts", _typed(bodies.coded_inputs()), 3, _GATE)
_EXPERTS = _operator(DOMAIN, "Experts", _typed(bodies.dense_inputs()), 5, _GATE)
_MATMUL_NBITS = _operator(
    MICROSOFT,
    "MatMulNBits",
    [
        ("A", "T"),
        ("B", "tensor(uint8)"),
        ("scales", "W2"),
        ("zero_points", "W3"),
        ("g_idx", "W4"),
        ("bias", "W5"),
    ],
    3,
    {"K": "INT", "N": "INT", "bits": "INT", "block_size": "INT", "accuracy_level": "INT"},
)


def _float(x: ir.Value) -> ir.Value:
    return x if x.dtype == ir.DataType.FLOAT else _op.Cast(x, to=int(ir.DataType.FLOAT))


def _vq_experts(
    x: ir.Value,
    topk_index: ir.Value,
    topk_weight: ir.Value,
    *operands: ir.Value | None,
    **attributes: Attribute,
) -> ir.Value:
    names = [a.name for a in ops.VQ_EXPERTS._schema.arguments][3:]
    given = dict(zip(names, operands, strict=False))
    corrections = [f"{p}_{t}" for p in ("gate_up", "down") for t in ("slope", "offset")]
    if any(given.get(name) is not None for name in corrections):
        raise MoeccError("an affine correction that isn't folded can't be exported")
    stored = [given.get(n) for n in bodies.coded_inputs()[3:]]
    return _VQ_EXPERTS(x, topk_index, _float(topk_weight), *stored, **attributes)


def _experts(
    x: ir.Value,
    topk_index: ir.Value,
    topk_weight: ir.Value,
    *operands: ir.Value | None,
    **attributes: Attribute,
) -> ir.Value:
    return _EXPERTS(x, topk_index, _float(topk_weight), *operands, **attributes)


def _q_linear(
    x: ir.Value,
    weight: ir.Value,
    scale: ir.Value,
    zero: ir.Value,
    bias: ir.Value | None = None,
    *,
    bits: int,
) -> ir.Value:
    """`weights` stores the operands in MatMulNBits's order."""
    (rows, packed), groups = sizes(weight), sizes(scale)[1]
    columns = packed * 8 // bits
    inputs = [x, weight, scale, zero] if bias is None else [x, weight, scale, zero, None, bias]
    return _MATMUL_NBITS(
        *inputs,
        K=columns,
        N=rows,
        bits=bits,
        block_size=columns // groups,
        accuracy_level=4,  # int8 activations: with others the 8-bit kernel decodes on every call
    )


def _expert_linear(x: ir.Value, topk_index: ir.Value, weight: ir.Value) -> ir.Value:
    """x [T, D] or [T, k, D]; weight [E, N, D] -> [T, k, N]."""
    one, three = (_op.Constant(value_ints=[axis]) for axis in (1, 3))
    assert x.shape is not None
    rows = _op.Unsqueeze(x, one) if len(x.shape) == 2 else x
    own = _op.Gather(weight, topk_index)  # [T, k, N, D]
    return _op.Squeeze(_op.MatMul(own, _op.Unsqueeze(rows, three)), three)


TABLE: dict[_Node, _Node] = {
    ops.VQ_EXPERTS: _vq_experts,
    ops.EXPERTS: _experts,
    ops.Q_LINEAR: _q_linear,
    torch.ops.moecc.expert_linear.default: _expert_linear,
}
