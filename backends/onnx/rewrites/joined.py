"""Quantized matrices of one input, whose results are concatenated, as one matrix: queries, keys and values of an attention.

A product of a few rows costs as much as what a runtime does around it, and every MatMulNBits rounds its input anew.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
import torch
from torch import Tensor

from moecc.backends.onnx.bodies import lazy


def join(model: ir.Model) -> None:
    """Replace every Concat of such products. Initializers must have their values (`weights.Weights.fill`)."""
    for node in [
        n for n in model.graph if n.op_type == "Concat" and n.attributes["axis"].as_int() == -1
    ]:
        products = [v.producer() for v in node.inputs if v is not None]
        if len(products) == len(node.inputs) and _alike(products):
            _join(model, node, products)  # type: ignore[arg-type]


def _alike(products: Sequence[ir.Node | None]) -> bool:
    first = products[0]
    for one in products:
        if (
            first is None
            or one is None
            or one.op_type != "MatMulNBits"
            or len(one.outputs[0].uses()) != 1
        ):
            return False
        same = one.inputs[0] is first.inputs[0] and len(one.inputs) == len(first.inputs)
        same = same and all(
            (a is None) == (b is None) for a, b in zip(one.inputs, first.inputs, strict=True)
        )
        if not same or _without_rows(one) != _without_rows(first):
            return False
    return True


def _without_rows(node: ir.Node) -> dict[str, int]:
    return {name: a.value for name, a in node.attributes.items() if name != "N"}


def _join(model: ir.Model, node: ir.Node, products: Sequence[ir.Node]) -> None:
    first = products[0]
    stacked = [
        _stacked(model, [p.inputs[i] for p in products]) for i in range(1, len(first.inputs))
    ]
    rows = sum(p.attributes["N"].as_int() for p in products)
    one = ir.node(
        "MatMulNBits",
        [first.inputs[0], *stacked],
        {**first.attributes, "N": rows},
        domain=first.domain,
    )
    model.graph.insert_before(node, one)
    y, old = one.outputs[0], node.outputs[0]
    y.name, y.type, y.shape = f"{old.name}.joined", old.type, old.shape
    old.replace_all_uses_with(y)
    parts = [v for p in products for v in p.inputs[1:] if v is not None]
    for gone in (node, *products):
        model.graph.remove(gone, safe=True)
    for value in parts:
        if not value.uses():
            del model.graph.initializers[value.name]  # type: ignore[arg-type]


def _stacked(model: ir.Model, parts: Sequence[ir.Value | None]) -> ir.Value | None:
    """One initializer with the rows of several, read when it is written."""
    if any(p is None for p in parts):
        return None
    values = [p for p in parts if p is not None]
    shapes = [[int(n) for n in v.shape] for v in values]  # type: ignore[union-attr, arg-type]
    shape = [sum(s[0] for s in shapes), *shapes[0][1:]]

    def make() -> Tensor:
        return torch.cat([torch.from_numpy(v.const_value.numpy().copy()) for v in values])  # type: ignore[union-attr]

    return lazy(model, f"{values[0].name}.joined", shape, values[0].dtype, make)  # type: ignore[arg-type]
