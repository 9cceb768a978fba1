"""A layer for many routes: a loop over the experts that some token chose.

Each expert takes its n tokens through its matrices: by tables where they are few, else decoded.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir import Value

from moecc.backends.onnx.bodies.gates import gate
from moecc.backends.onnx.bodies.layer import Layer, Projection
from moecc.backends.onnx.graph import FLOAT, INT64, Ops


def many_routes(op: Ops, layer: Layer) -> Value:
    """Return the layer's output [T, D]."""
    chosen = op.Unique(op.shaped(layer.index, -1))
    low_in, mean_in = _shared_in(op, layer)
    totals = [op.Expand(op.number(0.0), op.Shape(layer.x)), *_zeros(op, layer)]
    i, going = op.turn()
    carried = [op.value(ir.DataType.FLOAT) for _ in totals]

    def body(op: Ops) -> list[Value]:
        expert = op.Gather(chosen, i)
        return [op.Identity(going), *_turn(op, layer, expert, low_in, mean_in, carried)]

    graph = op.graph(body, [i, going, *carried], "experts")
    done = op.several("Loop", len(totals), op.Size(chosen), None, *totals, body=graph)
    y, sums = done[0], dict(zip(_sums(layer), done[1:], strict=True))
    if "low" in sums:
        assert layer.down.basis is not None
        y = op.Add(y, op.MatMul(sums["low"], layer.down.basis.vectors))
    if "hidden" in sums:
        y = layer.down.plus_mean(op, y, lambda: layer.down.through_mean(op, sums["hidden"]))
    return y


def _sums(layer: Layer) -> list[str]:
    """Name what is summed over a token's experts besides the output.

    What the experts share of down is applied once a token to the weighted sums of its inputs:
    "low" [T, r], coordinates in the basis, and "hidden" [T, F], for the mean. A norm behind each
    expert needs each whole output, so then nothing is left for later.
    """
    if layer.post_norm is not None:
        return []
    shared = {"low": layer.down.basis, "hidden": layer.down.mean}
    return [name for name, operand in shared.items() if operand is not None]


def _zeros(op: Ops, layer: Layer) -> list[Value]:
    """Return what the sums start from."""
    zero, tokens = op.number(0.0), op.size(layer.x, 0)

    def width(name: str) -> Value:
        if name == "hidden":
            return _intermediate(op, layer)
        assert layer.down.basis is not None
        return op.size(layer.down.basis.vectors, 0)

    return [op.Expand(zero, op.Concat(tokens, width(n), axis=0)) for n in _sums(layer)]


def _intermediate(op: Ops, layer: Layer) -> Value:
    """Return F, [1]."""
    rows = op.size(layer.inputs["gate_up_scale"], 1)
    return rows if layer.structure.attributes["gate"] == "none" else op.Div(rows, op.ints(2))


def _shared_in(op: Ops, layer: Layer) -> tuple[Value | None, Value | None]:
    """Return the part of gate_up that is the same for all experts.

    Coordinates in its basis [T, r] and the product with its mean [T, N], None for what it lacks.
    """
    up, low, mean = layer.up, None, None
    if up.basis is not None:
        low = op.MatMul(layer.x, op.transposed(up.basis.vectors))
    if up.mean is not None:
        mean = up.through_mean(op, layer.x)
    return low, mean


def _turn(
    op: Ops,
    layer: Layer,
    expert: Value,
    low_in: Value | None,
    mean_in: Value | None,
    carried: list[Value],
) -> list[Value]:
    """Return the totals after one expert has added its part."""
    hit = op.Equal(layer.index, expert)
    hits = op.ReduceMax(op.Cast(hit, to=INT64), op.ints(1), keepdims=0)
    tokens = op.Squeeze(op.NonZero(hits), op.ints(0))
    weight = op.ReduceSum(op.Where(hit, layer.weight, op.number(0.0)), op.ints(1), keepdims=1)
    weight = op.Gather(weight, tokens)  # [n, 1]
    rows = _projected(op, layer.up, op.Gather(layer.x, tokens), expert)
    rows = _plus_shared_in(op, layer.up, rows, expert, tokens, low_in, mean_in)
    hidden = gate(op, rows, layer.structure.attributes)
    y = _projected(op, layer.down, hidden, expert)
    low = _coordinates(op, layer.down, hidden, expert)
    if layer.post_norm is not None:
        y = _plus_shared_out(op, layer.down, y, hidden, low)
        y = layer.normed(op, y, layer.post_norm)
    own = {"low": low, "hidden": hidden}
    added = [y, *(own[name] for name in _sums(layer))]
    at = op.Unsqueeze(tokens, op.ints(1))
    return [
        op.ScatterND(total, at, op.Mul(part, weight), reduction="add")
        for total, part in zip(carried, added, strict=True)
    ]


def _projected(op: Ops, projection: Projection, x: Value, expert: Value) -> Value:
    """Return x [n, K] through one expert's matrix, with bias: [n, N]."""
    if projection.dense is not None:
        y = op.MatMul(x, op.transposed(op.Gather(projection.dense, expert)))
    else:
        coded = projection.coded
        assert coded is not None
        y = op.Mul(coded.times(op, x, expert), op.Gather(coded.scale, expert))
    return y if projection.bias is None else op.Add(y, op.Gather(projection.bias, expert))


def _plus_shared_in(
    op: Ops,
    up: Projection,
    rows: Value,
    expert: Value,
    tokens: Value,
    low_in: Value | None,
    mean_in: Value | None,
) -> Value:
    """Return rows [n, N] plus what the experts share of gate_up."""
    if up.basis is not None and low_in is not None:
        coef = op.Cast(op.Gather(up.basis.coef, expert), to=FLOAT)
        low = op.MatMul(op.Gather(low_in, tokens), op.transposed(coef))
        rows = op.Add(rows, op.Mul(low, op.Gather(up.basis.scale, expert)))
    return rows if mean_in is None else up.plus_mean(op, rows, lambda: op.Gather(mean_in, tokens))


def _plus_shared_out(
    op: Ops, down: Projection, y: Value, hidden: Value, low: Value | None
) -> Value:
    """Return y [n, D] plus what the experts share of down; `low` [n, r] is in its basis."""
    if down.basis is not None and low is not None:
        y = op.Add(y, op.MatMul(low, down.basis.vectors))
    return down.plus_mean(op, y, lambda: down.through_mean(op, hidden))


def _coordinates(op: Ops, down: Projection, hidden: Value, expert: Value) -> Value | None:
    """Return hidden [n, F] through one expert's coefficients: [n, r]. None without a basis."""
    if down.basis is None:
        return None
    own = op.Cast(op.Gather(down.basis.coef, expert), to=FLOAT)
    return op.Mul(op.MatMul(hidden, op.transposed(own)), op.Gather(down.basis.scale, expert))
