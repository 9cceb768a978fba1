"""Attention with its cache as one node, `moecc::CachedAttention`, and its standard operators.

  1. `attention_graph` recognizes each layer's attention: projected rows and cache in, rows out.
     The nodes stay as they are where anything else is on the way
  2. one node takes the place of all of it. Its function has the same operators, but does not
     repeat keys and values for grouped heads
  3. the op library has a kernel for the node, so a token costs one node instead of twenty. The
     kernel takes a cache with room for more tokens than the mask has (the function does not: ONNX
     Runtime refuses it). If the outputs are the same memory, it writes the new keys and values into
     that cache; else it copies the cache, with what lies in the room behind them

ONNX Runtime ignores a function's overload, so the name says what a function does: it is
CachedAttention, with Norm if each query and key is normed, with Rope if they are rotated.

Shapes: B batch, S new tokens, P past ones, T = P + S, H heads of queries, G of keys and values,
d and e their widths, r rotated channels. rows [B, S, H d + G d + G e]; past_key [B, G, P, d];
past_value [B, G, P, e]; mask bool [B or 1, H or 1, S, T]; q_norm, k_norm [d]; cos, sin
[B, S, r / 2]; y [B, S, H e]; present_key [B, G, T, d]; present_value [B, G, T, e].
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from moecc.backends.onnx import graph
from moecc.backends.onnx.graph import DOMAIN, Attribute, Ops
from moecc.backends.onnx.rewrites.attention_graph import Found, find

NAME = "CachedAttention"
# In the metadata of a model if every layer's attention is such a node.
ROOM = "moecc.cache_may_have_room"
_OPSET = 23  # the first with Attention, RotaryEmbedding and RMSNormalization
_INTS, _INT, _FLOAT = ir.AttributeType.INTS, ir.AttributeType.INT, ir.AttributeType.FLOAT
_ATTRIBUTES = {
    "parts": _INTS,  # the widths of the queries, keys and values in a row
    "queries": _INTS,  # shapes to reshape them to: [0, 0, heads, width]
    "keys": _INTS,
    "values": _INTS,
    "scale": _FLOAT,
    "eps": _FLOAT,
    "interleaved": _INT,
}


def fuse(model: ir.Model) -> bool:
    """Put one node for the attention of every layer whose graph has the known form.

    Leave the model alone below opset 23. Return whether these nodes alone read the cache.
    """
    if model.opset_imports[""] < _OPSET:
        return False
    for node in [n for n in model.graph if n.op_type == "Attention" and not n.domain]:
        if (found := find(node)) is not None:
            _replace(model, node, found)
    RemoveUnusedNodesPass()(model)
    past = [v for v in model.graph.inputs if (v.name or "").startswith("past_key_values.")]
    return all(node.op_type.startswith(NAME) for value in past for node, _ in value.uses())


def _replace(model: ir.Model, node: ir.Node, found: Found) -> None:
    query, key, value = found.query, found.key, found.value
    name = NAME + ("" if query.norm is None else "Norm") + ("Rope" if query.angles else "")
    attributes: dict[str, Attribute] = {
        "parts": [side.heads * side.width for side in (query, key, value)],
        "queries": [0, 0, query.heads, query.width],
        "keys": [0, 0, key.heads, key.width],
        "values": [0, 0, value.heads, value.width],
        "scale": found.scale,
        "eps": query.eps,
        "interleaved": query.interleaved,
    }
    op = Ops()
    rows = op.Concat(query.rows, key.rows, value.rows, axis=-1)
    norms = [] if query.norm is None else [query.norm, key.norm]
    inputs = [rows, found.past_key, found.past_value, found.mask, *norms, *query.angles]
    outputs = op.foreign(DOMAIN, name, inputs, attributes, count=3)
    graph.insert_before(model, node, op)
    replaced = found.output, found.present_key, found.present_value
    for old, new in zip(replaced, outputs, strict=True):
        new.shape, new.type, own = old.shape, old.type, old.name
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        old.name, new.name = f"{own}.before", own
    made = function(name)
    model.functions[made.identifier()] = made


def function(name: str) -> ir.Function:
    """Return the body of the operator of this name."""
    normed, rotated = "Norm" in name, "Rope" in name
    names = ["rows", "past_key", "past_value", "mask"]
    names += ["q_norm", "k_norm"] if normed else []
    names += ["cos", "sin"] if rotated else []
    values = {n: ir.Value(name=n) for n in names}
    op = Ops()

    def given(attribute: str, target: str = "value_ints") -> ir.Attr:
        """Return the node's attribute as the attribute `target` of a node inside."""
        return ir.RefAttr(target, attribute, _ATTRIBUTES[attribute])

    def heads(rows: ir.Value, shape: str) -> ir.Value:
        return op.Reshape(rows, op.Constant(value_ints=given(shape)))

    def turned(x: ir.Value) -> ir.Value:
        return op.Transpose(x, perm=[0, 2, 1, 3])

    def prepared(x: ir.Value, norm: str) -> ir.Value:
        if normed:
            x = op.RMSNormalization(x, values[norm], epsilon=given("eps", "epsilon"))
        x = turned(x)
        if rotated:
            flag = given("interleaved", "interleaved")
            x = op.RotaryEmbedding(x, values["cos"], values["sin"], interleaved=flag)
        return x

    parts = op.Constant(value_ints=given("parts"))
    q, k, v = op.several("Split", 3, values["rows"], parts, axis=-1)
    queries = prepared(heads(q, "queries"), "q_norm")
    new_key = prepared(heads(k, "keys"), "k_norm")
    key = op.Concat(values["past_key"], new_key, axis=-2)
    value = op.Concat(values["past_value"], turned(heads(v, "values")), axis=-2)
    y = op.Attention(queries, key, value, values["mask"], scale=given("scale", "scale"))
    y = op.Reshape(turned(y), op.ints(0, 0, -1))
    outputs = [y, key, value]
    return graph.function(name, list(values.values()), outputs, op, _OPSET, list(_ATTRIBUTES))
