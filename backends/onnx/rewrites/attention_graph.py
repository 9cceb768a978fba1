"""Recognize the attention of one layer in the exported graph.

From an Attention node the graph is followed back to the rows that projections made and to the
cache, and forward to the rows that the output projection takes. Shapes and letters as in
`attention`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx_ir as ir

from moecc.backends.onnx.graph import producer

# Attributes of Attention that the fused node does not have, and the values that mean nothing.
_WITHOUT_EFFECT = {"softcap": 0.0, "is_causal": 0, "qk_matmul_output_mode": 0}


@dataclass
class Side:
    """Queries, keys or values, and the projection's rows [B, S, heads width] they come from."""

    rows: ir.Value
    heads: int
    width: int
    norm: ir.Value | None = None
    eps: float = 0.0
    angles: list[ir.Value] = field(default_factory=list)  # cos, sin; none without a rotation
    interleaved: int = 0


@dataclass
class Found:
    """One layer's attention."""

    query: Side
    key: Side
    value: Side
    mask: ir.Value
    past_key: ir.Value
    past_value: ir.Value
    present_key: ir.Value
    present_value: ir.Value
    output: ir.Value  # [B, S, H e]
    scale: float


class _Unknown(Exception):
    """The graph has something here that the fused node cannot express."""


def find(node: ir.Node) -> Found | None:
    """Return the attention around an Attention node, None if the graph has any other form."""
    try:
        return _find(node)
    except _Unknown:
        return None


def _find(node: ir.Node) -> Found:
    attributes = {name: a.value for name, a in node.attributes.items()}
    _require(all(attributes.get(name, v) == v for name, v in _WITHOUT_EFFECT.items()))
    _require("scale" in attributes and len(node.inputs) == 4 and len(node.outputs) == 1)
    q, k, v, mask = (_given(value) for value in node.inputs)
    _require(mask.dtype == ir.DataType.BOOL)
    present_key, present_value = _unrepeated(k), _unrepeated(v)
    past_key, new_key = _appended(present_key)
    past_value, new_value = _appended(present_value)
    query, key = _rotated(q), _rotated(new_key)
    value = _split(_source(new_value, "Transpose", perm=[0, 2, 1, 3]))
    _require((query.norm is None) == (key.norm is None) and query.eps == key.eps)
    _require(query.angles == key.angles and query.interleaved == key.interleaved)
    _require(query.width == key.width and key.heads == value.heads and query.heads % key.heads == 0)
    turned = _only_user(node.outputs[0], "Transpose", perm=[0, 2, 1, 3])
    output = _only_user(turned.outputs[0], "Reshape").outputs[0]
    _require(len(_sizes(output)) == 3 and _sizes(output)[1:] == [None, query.heads * value.width])
    return Found(
        query,
        key,
        value,
        _unexpanded(mask),
        past_key,
        past_value,
        present_key,
        present_value,
        output,
        float(attributes["scale"]),
    )


def _require(holds: bool) -> None:
    if not holds:
        raise _Unknown


def _given(value: ir.Value | None) -> ir.Value:
    if value is None:
        raise _Unknown
    return value


def _sizes(value: ir.Value) -> list[int | None]:
    """Return a shape with None for every open size."""
    if value.shape is None:
        raise _Unknown
    return [size if isinstance(size, int) else None for size in value.shape]


def _source(value: ir.Value | None, op_type: str, **attributes: int | list[int]) -> ir.Value:
    """Return the first input of the node that computes a value: `op_type` with these attributes."""
    node = producer(value)
    if node is None or node.op_type != op_type or node.domain:
        raise _Unknown
    for name, wanted in attributes.items():
        found = node.attributes[name].value
        _require((list(found) if isinstance(wanted, list) else found) == wanted)
    return _given(node.inputs[0])


def _only_user(value: ir.Value, op_type: str, **attributes: int | list[int]) -> ir.Node:
    users = [node for node, _ in value.uses()]
    _require(len(users) == 1 and not value.is_graph_output())
    _source(users[0].outputs[0], op_type, **attributes)
    return users[0]


def _unrepeated(value: ir.Value) -> ir.Value:
    """Return keys or values [B, G, T, d] before each head is repeated for its group of queries."""
    node = value.producer()
    if node is None or node.op_type != "Reshape":
        return value
    heads, wide = _sizes(value)[1], _given(node.inputs[0])
    longer = _source(wide, "Expand")  # [B, G, 1, T, d] to [B, G, H / G, T, d]
    present = _source(longer, "Unsqueeze")
    before, after = _sizes(longer), _sizes(wide)
    _require(len(before) == 5 and before[2] == 1 and before[1] == _sizes(present)[1] == after[1])
    groups, repeated = after[1], after[2]
    _require(groups is not None and repeated is not None and groups * repeated == heads)
    return present


def _unexpanded(mask: ir.Value) -> ir.Value:
    """Return a mask before it is repeated for rows or heads: the operators repeat it themselves."""
    node = mask.producer()
    if node is None or node.op_type != "Expand":
        return mask
    before = _given(node.inputs[0])
    if before.shape is None or mask.shape is None or len(before.shape) != 4:
        return mask
    return before if before.shape[2:] == mask.shape[2:] else mask


def _appended(present: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Return the past and the new part of a cache."""
    past, node = _source(present, "Concat", axis=-2), producer(present)
    assert node is not None
    _require(len(node.inputs) == 2 and past.is_graph_input() and present.is_graph_output())
    return past, _given(node.inputs[1])


def _rotated(value: ir.Value) -> Side:
    """Follow queries or keys [B, heads, S, width], rotated or not, back to their rows."""
    angles, interleaved, node = [], 0, value.producer()
    if node is not None and node.op_type == "RotaryEmbedding":
        # Without position ids, cos is [B, S, d / 2]; without the attribute, all channels turn.
        _require(len(node.inputs) == 3 and "rotary_embedding_dim" not in node.attributes)
        value, *angles = (_given(v) for v in node.inputs)
        interleaved = node.attributes["interleaved"].as_int()
    side = _split(_source(value, "Transpose", perm=[0, 2, 1, 3]))
    side.angles, side.interleaved = angles, interleaved
    return side


def _split(value: ir.Value) -> Side:
    """Follow [B, S, heads, width], normed or not, back to rows [B, S, heads width]."""
    norm, eps, node = None, 0.0, value.producer()
    if node is not None and node.op_type == "RMSNormalization":
        value, norm = (_given(v) for v in node.inputs)
        eps = node.attributes["epsilon"].as_float()
        _require(node.attributes["axis"].as_int() == -1 and len(_sizes(norm)) == 1)
    sizes, rows = _sizes(value), _source(value, "Reshape")
    _require(len(sizes) == 4)
    heads, width = sizes[2:]
    if heads is None or width is None:
        raise _Unknown
    _require(_sizes(rows)[2:] == [heads * width])
    return Side(rows, heads, width, norm, eps)
