"""A graph as text: one line per node, with types, shapes and digests; golden tests compare it.

%linear : f32[6, 8] = aten.linear(%x, %w_layers_0_weight)
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, fx

from moecc.ir.tensors import Held, Weight, digest

SHORT = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "bool",
}


def type_text(value: object) -> str:
    """Return type and shape of a tensor, such as `f32[2, 3]`; of a tuple, those of its elements."""
    if isinstance(value, Tensor):
        return f"{SHORT.get(value.dtype, str(value.dtype))}[{', '.join(map(str, value.shape))}]"
    if isinstance(value, (list, tuple)):
        return "(" + ", ".join(map(type_text, value)) + ")"
    return str(value)


def arg_text(value: object) -> str:
    """Return an argument as its node's line prints it."""
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(arg_text, value)) + "]"
    return f"%{value.name}" if isinstance(value, fx.Node) else str(value)


def target_text(target: object) -> str:
    """Return the name of an op, such as `aten.linear`, or of a function."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target).removesuffix(".default")
    return str(getattr(target, "__name__", target))


def node_text(node: fx.Node) -> str:
    """Return a node's name and target, as messages name it."""
    return f"node %{node.name} ({target_text(node.target)})"


def line(node: fx.Node, weights: Mapping[str, Weight], tensors: Held) -> str:
    """Return a node's line; a held tensor is printed with its digest, so that its values count."""
    if node.op == "output":
        return f"return {arg_text(node.args[0])}"
    return (
        f"%{node.name} : {type_text(node.meta.get('val'))} = {_expression(node, weights, tensors)}"
    )


def _expression(node: fx.Node, weights: Mapping[str, Weight], tensors: Held) -> str:
    if node.op == "placeholder":
        weight = weights.get(node.name)
        if weight is None:
            return "input"
        if weight.name in tensors:
            return f'held "{weight.name}" #{digest(tensors[weight.name])}'
        return f'{"derived" if weight.recipe else "weight"} "{weight.name}"'
    named = [f"{k}={arg_text(v)}" for k, v in node.kwargs.items()]
    return f"{target_text(node.target)}({', '.join([*map(arg_text, node.args), *named])})"
