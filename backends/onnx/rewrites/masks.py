"""Which tokens attend to which, as one node: `moecc::CausalMask`.

A mask depends only on how many tokens are new and which ones count. The exporter writes some
twenty nodes for it, a tenth of the time of one token of a small model, and their form changes with
every release of transformers. So a mask is recognized by its values: its part of the graph is run,
and one node takes its place if it gives what a causal mask of some window has to be. Other masks
(attention in chunks) stay as they are.

Shapes: B batch, S new tokens, P past ones, T = P + S. input_ids i64 [B, S]; attention_mask i64
[B, T], 0 where a token does not count; y bool [B, 1, S, T]: whether new token s, at place P + s,
sees token t: t <= P + s and t > P + s - window.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import onnxruntime
from onnx_ir.passes.common import RemoveUnusedNodesPass

from moecc.backends.onnx import graph
from moecc.backends.onnx.graph import DOMAIN, Ops, producer, put_instead

NAME = "CausalMask"
NO_WINDOW = 1 << 62
_INPUTS = ("input_ids", "attention_mask")
_FAR = 1 << 20  # tokens: no window is as wide
_WIDE = 1 << 12  # tokens: with a wider window, a mask of as many new tokens takes too much memory
_BOOL = int(ir.DataType.BOOL)

# (new tokens, padding of each row, all tokens) -> the mask of them
Mask = Callable[[int, list[int], int], np.ndarray]


def simplify(model: ir.Model) -> None:
    """Turn every causal mask into one node, and read other masks as a whole."""
    inputs = [v for name in _INPUTS for v in model.graph.inputs if v.name == name]
    if len(inputs) < len(_INPUTS):
        return
    _count_by_mask(model, *inputs)
    for value in _masks(model, inputs):
        window = _window(_runnable(model, inputs, value))
        if window is None:
            continue
        op, node = Ops(), value.producer()
        assert node is not None
        [y] = op.foreign(DOMAIN, NAME, inputs, {"window": window})
        put_instead(model, node, op, y)
        made = function(model.opset_imports[""])
        model.functions[made.identifier()] = made
    RemoveUnusedNodesPass()(model)
    _read_whole(model)


def _count_by_mask(model: ir.Model, ids: ir.Value, counts: ir.Value) -> None:
    """Take the sizes batch, new and past from `_INPUTS` instead of the cache.

    A cache may have room for more tokens than the past has, and a mask must not depend on it.
    """
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
    """Return the masks, booleans [B, 1, S, T], that depend only on `_INPUTS`.

    A mask that is an input of the node of another one is left out.
    """
    known = {*inputs, *(v for v in model.graph.initializers.values() if v.const_value is not None)}
    found: list[ir.Value] = []
    for node in model.graph:
        if all(v is None or v in known for v in node.inputs):
            known.update(node.outputs)
            found += [v for v in node.outputs if _is_plane(v)]
    inner = {v for mask in found if (made := mask.producer()) for v in made.inputs}
    return [v for v in found if v not in inner]


def _is_plane(value: ir.Value) -> bool:
    return value.dtype == ir.DataType.BOOL and value.shape is not None and len(value.shape) == 4


# ---------------------------------------------------------------- a mask by its values


def _runnable(model: ir.Model, inputs: list[ir.Value], value: ir.Value) -> Mask:
    """Return the part of a graph that computes a mask, as a function that ONNX Runtime runs."""
    part = ir.convenience.extract(model.graph, inputs, [value])
    for one in (*part.inputs, *part.outputs):
        # The names of the open sizes claim more than holds for the sizes that are tried here.
        one.shape = ir.Shape([None] * len(one.shape or ()))
    stored = ir.serde.serialize_model(ir.Model(part, ir_version=10)).SerializeToString()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(stored, options, providers=["CPUExecutionProvider"])

    def run(tokens: int, padding: list[int], total: int) -> np.ndarray:
        ids = np.zeros((len(padding), tokens), np.int64)
        given = dict(zip(_INPUTS, (ids, _counting(padding, total)), strict=True))
        mask: np.ndarray = session.run(None, given)[0]
        return mask

    return run


def _window(run: Mask) -> int | None:
    """Return the window of a causal mask, None if the mask is of another kind."""
    seen = int(run(1, [0], _FAR).sum())
    window = NO_WINDOW if seen == _FAR else seen
    cases = [(3, [0, 2], 8), (1, [0], 1), (6, [1], 6), (1, [4, 0], 9)]
    if seen < _WIDE:
        cases += [(3, [0, 1], window + 4), (window + 3, [0], window + 3)]
    elif seen < _FAR:
        cases += [(3, [0], window + 4)]
    for tokens, padding, total in cases:
        mask = run(tokens, padding, total)
        wanted = _causal(tokens, _counting(padding, total), window)
        if mask.shape[2:] != wanted.shape[2:] or not (mask == wanted).all():
            return None
    return window


def _counting(padding: list[int], total: int) -> np.ndarray:
    """Return an attention_mask in which the first padding[b] tokens of row b do not count."""
    return (np.arange(total) >= np.array(padding)[:, None]).astype(np.int64)


def _causal(tokens: int, attention_mask: np.ndarray, window: int) -> np.ndarray:
    """Return what the node has to give for so many new tokens."""
    total = attention_mask.shape[1]
    place, t = np.arange(total - tokens, total)[:, None], np.arange(total)
    wanted: np.ndarray = (attention_mask != 0)[:, None, None] & (t <= place) & (t > place - window)
    return wanted


def function(opset: int) -> ir.Function:
    """Return the operator's body."""
    op, (ids, counts) = Ops(), [ir.Value(name=n) for n in _INPUTS]
    total, new = (op.Squeeze(op.size(v, 1)) for v in (counts, ids))
    place = op.Unsqueeze(op.Range(op.Sub(total, new), total, op.number(1)), op.ints(1))  # [S, 1]
    token = op.Range(op.number(0), total, op.number(1))  # [T]
    window = op.Constant(value_int=ir.RefAttr("value_int", "window", ir.AttributeType.INT))
    near = op.And(op.LessOrEqual(token, place), op.Greater(token, op.Sub(place, window)))
    y = op.And(near, op.Unsqueeze(op.Cast(counts, to=_BOOL), op.ints(1, 2)))
    return graph.function(NAME, [ids, counts], [y], op, opset, ["window"])


# ---------------------------------------------------------------- other masks


def _read_whole(model: ir.Model) -> None:
    """Read attention_mask [B, T] as [B, 1, 1, T] instead of number by number.

    The exporter writes GatherND over the ranges of all rows and all tokens.
    """
    for node in [n for n in model.graph if n.op_type == "GatherND"]:
        data, indices = node.inputs
        pairs = producer(indices)
        if data is None or pairs is None or pairs.op_type != "Concat" or len(pairs.inputs) != 2:
            continue
        whole = _is_mask(data) and all(map(_counts, pairs.inputs))
        if whole and len(node.outputs[0].shape or ()) == 4:
            op = Ops()
            put_instead(model, node, op, op.Unsqueeze(data, op.ints(1, 2)))


def _is_mask(value: ir.Value | None) -> bool:
    """Say whether a value is attention_mask, cast or not."""
    node = producer(value)
    if node is not None:
        return node.op_type == "Cast" and _is_mask(node.inputs[0])
    return value is not None and value.name == "attention_mask"


def _counts(value: ir.Value | None) -> bool:
    """Say whether a value is 0, 1, 2... along one axis."""
    node = producer(value)
    while node is not None and node.op_type in ("Unsqueeze", "Expand"):
        node = producer(node.inputs[0])
    if node is None or node.op_type != "Range":
        return False
    first, step = (None if v is None else v.const_value for v in (node.inputs[0], node.inputs[2]))
    if first is None or step is None:
        return False
    return (int(first.numpy()), int(step.numpy())) == (0, 1)
