"""Attention with its cache as one node: `moecc::CachedAttention`, and what that means in standard operators.

  1. from every Attention node the graph is followed back to the rows that projections made and to the cache, and forward to
     the rows that the output projection takes. Where anything else is on the way, the nodes stay as they are
  2. what was found becomes one node, whose function has the same operators but repeats no keys and values for grouped heads
  3. the op library has a kernel for it, so that a token costs one node where there were twenty. To it a cache may be given that
     has room for more tokens than mask says there are; that one it writes into, and returns as it is

The names say what a function does besides, because ONNX Runtime ignores a function's overload: CachedAttention, and with Norm
a norm of each query and key, with Rope a rotation of them.

Shapes: B batch, S new tokens, P past ones, T = P + S, H heads of queries, G of keys and values, d and e their widths, r
rotated channels. rows [B, S, H d + G d + G e]; past_key [B, G, P, d]; past_value [B, G, P, e]; mask bool [B or 1, H or 1, S, T];
q_norm, k_norm [d]; cos, sin [B, S, r / 2]; y [B, S, H e]; present_key [B, G, T, d]; present_value [B, G, T, e].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from moecc.backends.onnx.bodies import DOMAIN, Ops

NAME = "CachedAttention"
ROOM = (
    "moecc.cache_may_have_room"  # in the metadata of a model all of whose layers have such a node
)
_OPSET = 23  # the first with Attention, RotaryEmbedding and RMSNormalization
_NORM, _ROPE = ("q_norm", "k_norm"), ("cos", "sin")
_INTS, _FLOAT = ir.AttributeType.INTS, ir.AttributeType.FLOAT
_ATTRIBUTES = {
    "parts": _INTS, "queries": _INTS, "keys": _INTS, "values": _INTS,  # rows are split so; shapes [0, 0, heads, width]
    "scale": _FLOAT, "eps": _FLOAT, "interleaved": ir.AttributeType.INT,
}  # fmt: skip


@dataclass
class _Side:
    """Queries or keys on their way back to a projection's rows."""

    rows: ir.Value
    heads: int
    width: int
    norm: ir.Value | None = None
    eps: float = 0.0
    angles: tuple[ir.Value, ir.Value] | None = None  # cos, sin
    interleaved: int = 0


class _Other(Exception):
    """The graph has something here that the op doesn't know."""


def fuse(model: ir.Model) -> bool:
    """Put one node for the attention of every layer whose graph is of the known form; for opset 23 and later.

    Whether those nodes are all that reads a cache."""
    if model.opset_imports[""] < _OPSET:
        return False
    for node in [n for n in model.graph if n.op_type == "Attention" and not n.domain]:
        try:
            _fuse(model, node)
        except _Other:
            continue
    RemoveUnusedNodesPass()(model)
    past = [v for v in model.graph.inputs if v.name.startswith("past_key_values.")]  # type: ignore[union-attr]
    return all(node.op_type.startswith(NAME) for value in past for node, _ in value.uses())


def _fuse(model: ir.Model, node: ir.Node) -> None:
    q, k, v, mask = (node.inputs[i] if i < len(node.inputs) else None for i in range(4))
    attributes = {name: a.value for name, a in node.attributes.items()}
    plain = {"softcap": 0.0, "is_causal": 0, "qk_matmul_output_mode": 0}
    _require(
        q is not None
        and k is not None
        and v is not None
        and mask is not None
        and mask.dtype == ir.DataType.BOOL
    )
    _require(len(node.inputs) == 4 and len(node.outputs) == 1)
    _require(
        all(attributes.get(name, value) == value for name, value in plain.items())
        and "scale" in attributes
    )
    assert mask is not None
    mask = _unexpanded(mask)
    present_key, present_value = _unrepeated(k), _unrepeated(v)
    past_key, new_key = _appended(present_key)
    past_value, new_value = _appended(present_value)
    query, key = _side(q), _side(new_key)
    value = _split(_source(new_value, "Transpose", perm=[0, 2, 1, 3]))
    _require((query.norm is None) == (key.norm is None) and query.eps == key.eps)
    _require(query.angles == key.angles and query.interleaved == key.interleaved)
    _require(query.width == key.width and key.heads == value.heads and query.heads % key.heads == 0)
    last = _only_user(
        _only_user(node.outputs[0], "Transpose", perm=[0, 2, 1, 3]).outputs[0], "Reshape"
    ).outputs[0]
    _require(_sizes(last)[1:] == [None, query.heads * value.width] and len(_sizes(last)) == 3)

    name = NAME + ("" if query.norm is None else "Norm") + ("" if query.angles is None else "Rope")
    op = Ops()
    rows = op.Concat(query.rows, key.rows, value.rows, axis=-1)
    norms = [] if query.norm is None else [query.norm, key.norm]
    given: dict[str, Any] = {
        "parts": [s.heads * s.width for s in (query, key, value)], "queries": [0, 0, query.heads, query.width],
        "keys": [0, 0, key.heads, key.width], "values": [0, 0, value.heads, value.width],
        "scale": float(attributes["scale"]), "eps": query.eps, "interleaved": query.interleaved,
    }  # fmt: skip
    outputs = [op.value() for _ in range(3)]
    op.tape.op_multi_out(
        name,
        [rows, past_key, past_value, mask, *norms, *(query.angles or ())],
        given,
        domain=DOMAIN,
        outputs=outputs,
    )
    for one in op.tape.nodes:
        for output in one.outputs:
            output.name = f"{node.name}.{output.name}"
        model.graph.insert_before(node, one)
    for old, new in zip((last, present_key, present_value), outputs, strict=True):
        new.shape, new.type, own = old.shape, old.type, old.name
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        old.name, new.name = f"{own}.before", own
    made = function(name)
    model.functions[made.identifier()] = made


# ---------------------------------------------------------------- what the graph has


def _require(holds: bool) -> None:
    if not holds:
        raise _Other


def _sizes(value: ir.Value) -> list[int | None]:
    if value.shape is None:
        raise _Other
    return [size if isinstance(size, int) else None for size in value.shape]


def _source(value: ir.Value | None, op_type: str, **attributes: Any) -> ir.Value:
    """The first input of the `op_type` node with these attributes that made a value."""
    node = None if value is None else value.producer()
    _require(node is not None and node.op_type == op_type and not node.domain)
    assert node is not None
    for name, wanted in attributes.items():
        found = node.attributes[name].value
        _require((list(found) if isinstance(wanted, list) else found) == wanted)
    first = node.inputs[0]
    assert first is not None
    return first


def _only_user(value: ir.Value, op_type: str, **attributes: Any) -> ir.Node:
    users = [node for node, _ in value.uses()]
    _require(len(users) == 1 and not value.is_graph_output())
    _source(users[0].outputs[0], op_type, **attributes)
    return users[0]


def _unrepeated(value: ir.Value | None) -> ir.Value:
    """[B, G, T, d] from the same, or from what repeats each head for its group of queries: [B, H, T, d]."""
    assert value is not None
    producer = value.producer()
    if producer is None or producer.op_type != "Reshape":
        return value
    heads, wide = _sizes(value)[1], producer.inputs[0]
    longer = _source(wide, "Expand")  # [B, G, 1, T, d] to [B, G, H / G, T, d]
    present = _source(longer, "Unsqueeze")
    assert wide is not None
    before, after = _sizes(longer), _sizes(wide)
    _require(len(before) == 5 and before[2] == 1 and before[1] == _sizes(present)[1] == after[1])
    _require(None not in (after[1], after[2], heads) and after[1] * after[2] == heads)  # type: ignore[operator]
    return present


def _unexpanded(mask: ir.Value) -> ir.Value:
    """A mask before it is repeated for rows or heads, which the operators do themselves."""
    node = mask.producer()
    if node is None or node.op_type != "Expand":
        return mask
    before: ir.Value = node.inputs[0]  # type: ignore[assignment]
    same = before.shape is not None and mask.shape is not None and len(before.shape) == 4
    return before if same and before.shape[2:] == mask.shape[2:] else mask  # type: ignore[index]


def _appended(present: ir.Value) -> tuple[ir.Value, ir.Value]:
    """What was there and what is new, of a cache that has both."""
    past = _source(present, "Concat", axis=-2)
    inputs = present.producer().inputs  # type: ignore[union-attr]
    _require(len(inputs) == 2 and past.is_graph_input() and present.is_graph_output())
    return past, inputs[1]  # type: ignore[return-value]


def _side(value: ir.Value | None) -> _Side:
    angles, interleaved = None, 0
    assert value is not None
    if (node := value.producer()) is not None and node.op_type == "RotaryEmbedding":
        # all channels are rotated, cos is [B, S, d / 2]
        _require(len(node.inputs) == 3 and "rotary_embedding_dim" not in node.attributes)
        angles, interleaved = (
            (node.inputs[1], node.inputs[2]),
            node.attributes["interleaved"].as_int(),
        )
        value = node.inputs[0]
    side = _split(_source(value, "Transpose", perm=[0, 2, 1, 3]))
    side.angles, side.interleaved = angles, interleaved  # type: ignore[assignment]
    return side


def _split(value: ir.Value) -> _Side:
    """[B, S, heads, width], normed or not, back to rows [B, S, heads width]."""
    norm, eps, node = None, 0.0, value.producer()
    if node is not None and node.op_type == "RMSNormalization":
        value, norm = node.inputs[0], node.inputs[1]  # type: ignore[assignment]
        eps = node.attributes["epsilon"].as_float()
        _require(
            node.attributes["axis"].as_int() == -1 and norm is not None and len(_sizes(norm)) == 1
        )
    sizes, rows = _sizes(value), _source(value, "Reshape")
    _require(len(sizes) == 4 and None not in sizes[2:])
    heads, width = sizes[2:]
    assert heads is not None and width is not None
    _require(_sizes(rows)[2:] == [heads * width])
    return _Side(rows, heads, width, norm, eps)


# ---------------------------------------------------------------- what the node means


def function(name: str) -> ir.Function:
    """The body of the op of this name."""
    normed, rotated = "Norm" in name, "Rope" in name
    names = [
        "rows",
        "past_key",
        "past_value",
        "mask",
        *(_NORM if normed else ()),
        *(_ROPE if rotated else ()),
    ]
    values = {n: ir.Value(name=n) for n in names}
    op = Ops()

    def given(attribute: str, of: str = "value_ints") -> ir.Attr:
        return ir.RefAttr(of, attribute, _ATTRIBUTES[attribute])

    def heads(rows: ir.Value, attribute: str, norm: str | None) -> ir.Value:
        x = op.Reshape(rows, op.Constant(value_ints=given(attribute)))
        if norm is not None and normed:
            x = op.RMSNormalization(x, values[norm], epsilon=given("eps", "epsilon"))
        x = op.Transpose(x, perm=[0, 2, 1, 3])
        if norm is not None and rotated:
            x = op.RotaryEmbedding(
                x, values["cos"], values["sin"], interleaved=given("interleaved", "interleaved")
            )
        return x

    q, k, v = op.several(
        "Split", 3, values["rows"], op.Constant(value_ints=given("parts")), axis=-1
    )
    queries = heads(q, "queries", "q_norm")
    present_key = op.Concat(values["past_key"], heads(k, "keys", "k_norm"), axis=-2)
    present_value = op.Concat(values["past_value"], heads(v, "values", None), axis=-2)
    y = op.Attention(
        queries, present_key, present_value, values["mask"], scale=given("scale", "scale")
    )
    y = op.Reshape(op.Transpose(y, perm=[0, 2, 1, 3]), op.ints(0, 0, -1))
    graph = ir.Graph(
        list(values.values()),
        [y, present_key, present_value],
        nodes=op.tape.nodes,
        opset_imports={"": _OPSET},
    )
    return ir.Function(
        DOMAIN,
        name,
        graph=graph,
        attributes=[ir.Attr(k, ir.AttributeType.UNDEFINED, None) for k in _ATTRIBUTES],
    )
