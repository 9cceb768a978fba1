"""Which tokens attend to which, as one node: `moecc::CausalMask`.

A mask depends on nothing but how many tokens are new and which ones count. What the exporter writes down for it takes some
twenty nodes, which for one token of a small model is a tenth of its time, and how they look changes with every release of
transformers. So a mask is known by its values: its part of the graph is run, and where it gives what a causal mask of some window
has to be, one node takes its place. Others (attention in chunks) stay as they are.

Shapes: B batch, S new tokens, P past ones, T = P + S. input_ids i64 [B, S]; attention_mask i64 [B, T], 0 where a token counts for
nothing; y bool [B, 1, S, T]: whether new token s, of place P + s, sees token t: t <= P + s and t > P + s - window.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
from onnx_ir.passes.common import RemoveUnusedNodesPass

from moecc.backends.onnx.bodies import DOMAIN, Ops, put_instead

NAME = "CausalMask"
NO_WINDOW = 1 << 62
_INPUTS = ("input_ids", "attention_mask")
_FAR = 1 << 20  # tokens: no window is as wide
_BOOL = int(ir.DataType.BOOL)


def simplify(model: ir.Model) -> None:
    """Every mask as little of a graph as it can be."""
    inputs = [v for name in _INPUTS for v in model.graph.inputs if v.name == name]
    if len(inputs) < len(_INPUTS):
        return
    _count_by_mask(model, *inputs)
    for value in _masks(model, inputs):
        window = _window(model, inputs, value)
        if window is None:
            continue
        op, node = Ops(), value.producer()
        assert node is not None
        [y] = op.tape.op_multi_out(
            NAME, inputs, {"window": window}, domain=DOMAIN, outputs=[op.value()]
        )
        put_instead(model, node, op, y)
        made = function(model.opset_imports[""])
        model.functions[made.identifier()] = made
    RemoveUnusedNodesPass()(model)
    _read_whole(model)


def _count_by_mask(model: ir.Model, ids: ir.Value, counts: ir.Value) -> None:
    """Sizes of batch, new and past from `_INPUTS`: a cache may have room for more than the past, a mask is not to depend on it."""
    others = [v for v in model.graph.inputs if v is not ids and v is not counts]
    for value, node in [(v, n) for v in others for n, _ in v.uses() if n.op_type == "Shape"]:
        op, dimensions = Ops(), (node.attributes["start"].as_int(), node.attributes["end"].as_int())
        if dimensions == (0, 1):
            put_instead(model, node, op, op.size(ids, 0))
        elif value.name == "position_ids" and dimensions == (1, 2):
            put_instead(model, node, op, op.size(ids, 1))
        elif dimensions == (2, 3):
            put_instead(model, node, op, op.Sub(op.size(counts, 1), op.size(ids, 1)))


def _masks(model: ir.Model, inputs: list[ir.Value]) -> list[ir.Value]:
    """Booleans [B, 1, S, T] that depend on nothing but `_INPUTS`, as what depends on more takes them."""
    known = {*inputs, *(v for v in model.graph.initializers.values() if v.const_value is not None)}
    found = []
    for node in model.graph:
        if all(v is None or v in known for v in node.inputs):
            known.update(node.outputs)
            found += [
                v
                for v in node.outputs
                if v.dtype == ir.DataType.BOOL and v.shape is not None and len(v.shape) == 4
            ]
    inner = {v for mask in found for v in mask.producer().inputs}  # type: ignore[union-attr]
    return [v for v in found if v not in inner]


def _window(model: ir.Model, inputs: list[ir.Value], value: ir.Value) -> int | None:
    """The window of a mask that is causal, else None."""
    graph = ir.convenience.extract(model.graph, inputs, [value])
    for one in (*graph.inputs, *graph.outputs):  # sizes have names that say too much
        one.shape = ir.Shape([None] * len(one.shape or ()))
    part = ir.serde.serialize_model(ir.Model(graph, ir_version=10))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(
        part.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )

    def gives(tokens: int, padding: list[int], total: int) -> np.ndarray:
        ids = np.zeros((len(padding), tokens), np.int64)
        given = dict(zip(_INPUTS, (ids, _counting(padding, total)), strict=True))
        mask: np.ndarray = session.run(None, given)[0]
        return mask

    seen = int(gives(1, [0], _FAR).sum())
    window = NO_WINDOW if seen == _FAR else seen
    cases = [(3, [0, 2], 8), (1, [0], 1), (6, [1], 6), (1, [4, 0], 9)]
    if seen < _FAR:
        cases += (
            [(3, [0, 1], window + 4), (window + 3, [0], window + 3)]
            if window < 1 << 12
            else [(3, [0], window + 4)]
        )
    for tokens, padding, total in cases:
        mask, wanted = (
            gives(tokens, padding, total),
            _causal(tokens, _counting(padding, total), window),
        )
        if mask.shape[2:] != wanted.shape[2:] or not (mask == wanted).all():
            return None
    return window


def _counting(padding: list[int], total: int) -> np.ndarray:
    """An attention_mask: so many tokens of each row count for nothing."""
    return (np.arange(total) >= np.array(padding)[:, None]).astype(np.int64)


def _causal(tokens: int, attention_mask: np.ndarray, window: int) -> np.ndarray:
    """What the node is to give."""
    total = attention_mask.shape[1]
    place, t = np.arange(total - tokens, total)[:, None], np.arange(total)
    wanted: np.ndarray = (attention_mask != 0)[:, None, None] & (t <= place) & (t > place - window)
    return wanted


def function(opset: int) -> ir.Function:
    """The op's body."""
    op, (ids, counts) = Ops(), (ir.Value(name=n) for n in _INPUTS)
    total, new = (op.Squeeze(op.size(v, 1)) for v in (counts, ids))
    place = op.Unsqueeze(op.Range(op.Sub(total, new), total, op.number(1)), op.ints(1))  # [S, 1]
    token = op.Range(op.number(0), total, op.number(1))  # [T]
    window = op.Constant(value_int=ir.RefAttr("value_int", "window", ir.AttributeType.INT))
    near = op.And(op.LessOrEqual(token, place), op.Greater(token, op.Sub(place, window)))
    y = op.And(near, op.Unsqueeze(op.Cast(counts, to=_BOOL), op.ints(1, 2)))
    graph = ir.Graph([ids, counts], [y], nodes=op.tape.nodes, opset_imports={"": opset})
    return ir.Function(
        DOMAIN, NAME, graph=graph, attributes=[ir.Attr("window", ir.AttributeType.UNDEFINED, None)]
    )


# ---------------------------------------------------------------- other masks


def _read_whole(model: ir.Model) -> None:
    """attention_mask [B, T] as [B, 1, 1, T] where the graph gathers it number by number, over ranges of all rows and tokens."""
    for node in [n for n in model.graph if n.op_type == "GatherND"]:
        data, indices = node.inputs
        assert data is not None and indices is not None
        pairs = indices.producer()
        if (
            not _is_mask(data)
            or pairs is None
            or pairs.op_type != "Concat"
            or len(pairs.inputs) != 2
        ):
            continue
        if (
            all(v is not None and _counts(v) for v in pairs.inputs)
            and len(node.outputs[0].shape or ()) == 4
        ):
            op = Ops()
            put_instead(model, node, op, op.Unsqueeze(data, op.ints(1, 2)))


def _is_mask(value: ir.Value) -> bool:
    node = value.producer()
    return value.name == "attention_mask" or (
        node is not None and node.op_type == "Cast" and _is_mask(node.inputs[0])
    )  # type: ignore[arg-type]


def _counts(value: ir.Value) -> bool:
    """Whether a value is 0, 1, 2... along one axis."""
    node = value.producer()
    while node is not None and node.op_type in ("Unsqueeze", "Expand"):
        node = node.inputs[0].producer()  # type: ignore[union-attr]
    if node is None or node.op_type != "Range":
        return False
    first, step = (v.const_value for v in (node.inputs[0], node.inputs[2]) if v is not None)
    return (
        first is not None and step is not None and (int(first.numpy()), int(step.numpy())) == (0, 1)
    )
