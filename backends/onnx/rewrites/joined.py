"""Join quantized matrices of one input into one: the queries, keys and values of an attention.

It applies where their results are concatenated. A runtime spends as much around a product of few
rows as on the product, and every MatMulNBits rounds its input again.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
import torch
from torch import Tensor

from moecc.backends.onnx.graph import drop_initializer, lazy, producer, sizes


def join(model: ir.Model) -> None:
    """Replace every Concat of such products. `weights.Weights.fill` must have run before."""
    for node in [n for n in model.graph if n.op_type == "Concat"]:
        if node.attributes["axis"].as_int() != -1:
            continue
        products = [made for v in node.inputs if (made := producer(v)) is not None]
        if len(products) == len(node.inputs) and all(_alike(p, products[0]) for p in products):
            _join(model, node, products)


def _alike(one: ir.Node, first: ir.Node) -> bool:
    """Say whether a node is a product of the same input as the first, and differs in rows alone."""
    if one.op_type != "MatMulNBits" or len(one.outputs[0].uses()) != 1:
        return False
    if one.inputs[0] is not first.inputs[0] or len(one.inputs) != len(first.inputs):
        return False
    pairs = zip(one.inputs, first.inputs, strict=True)
    same = all((a is None) == (b is None) for a, b in pairs)
    return same and _without_rows(one) == _without_rows(first)


def _without_rows(node: ir.Node) -> dict[str, int]:
    return {name: a.as_int() for name, a in node.attributes.items() if name != "N"}


def _join(model: ir.Model, node: ir.Node, products: Sequence[ir.Node]) -> None:
    first = products[0]
    operands = range(1, len(first.inputs))
    stacked = [_stacked(model, [p.inputs[i] for p in products]) for i in operands]
    rows = sum(p.attributes["N"].as_int() for p in products)
    attributes: dict[str, ir.Attr | int] = {**first.attributes, "N": rows}
    inputs = [first.inputs[0], *stacked]
    one = ir.node("MatMulNBits", inputs, attributes, domain=first.domain)
    model.graph.insert_before(node, one)
    y, old = one.outputs[0], node.outputs[0]
    y.name, y.type, y.shape = f"{old.name}.joined", old.type, old.shape
    old.replace_all_uses_with(y)
    parts = [v for p in products for v in p.inputs[1:] if v is not None]
    for gone in (node, *products):
        model.graph.remove(gone, safe=True)
    for value in parts:
        drop_initializer(model, value)


def _stacked(model: ir.Model, parts: Sequence[ir.Value | None]) -> ir.Value | None:
    """Return one initializer with the rows of several, read when the file is written."""
    values = [p for p in parts if p is not None]
    if len(values) < len(parts):
        return None
    shapes = [sizes(v) for v in values]
    shape = [sum(s[0] for s in shapes), *shapes[0][1:]]
    stored, dtype = [v.const_value for v in values], values[0].dtype
    tensors = [t for t in stored if t is not None]
    assert dtype is not None and len(tensors) == len(stored), "an initializer has no value yet"

    def make() -> Tensor:
        return torch.cat([torch.from_numpy(t.numpy().copy()) for t in tensors])

    return lazy(model, f"{values[0].name}.joined", shape, dtype, make)
