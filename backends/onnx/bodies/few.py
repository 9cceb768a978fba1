"""A layer for few routes: every route by lookup tables, all at once; nothing is decoded.

Rows are routes: P = T k, and route p is one of token p / k.
"""

from __future__ import annotations

from onnx_ir import Value

from moecc.backends.onnx.bodies.gates import gate
from moecc.backends.onnx.bodies.layer import Layer, Projection
from moecc.backends.onnx.graph import FLOAT, Ops


def few_routes(op: Ops, layer: Layer) -> Value:
    """Return the layer's output [T, D]."""
    routes = op.shaped(layer.index, -1)  # [P]
    k = op.size(layer.index, 1)
    token = op.Div(op.Range(op.number(0), op.Size(layer.index), op.number(1)), k)  # [P]
    rows = _looked_up(op, layer.up, op.Gather(layer.x, token), routes)
    rows = _plus_shared_in(op, layer.up, rows, layer.x, routes, token)
    hidden = gate(op, rows, layer.structure.attributes)
    y = _looked_up(op, layer.down, hidden, routes)
    weight = op.shaped(layer.weight, -1, 1)
    if layer.post_norm is not None:
        # The norm is of one expert's whole output, so the shared part is applied to every route.
        y = _plus_shared_out(op, layer.down, y, hidden, routes)
        y = layer.normed(op, y, layer.post_norm)
        return _per_token(op, layer, op.Mul(y, weight))
    y = _per_token(op, layer, op.Mul(y, weight))
    return _plus_shared_once(op, layer, y, op.Mul(hidden, weight), routes)


def _looked_up(op: Ops, projection: Projection, x: Value, routes: Value) -> Value:
    """Return x [P, K] through each route's expert, with bias: [P, N]."""
    assert projection.coded is not None
    y = projection.coded.looked_up(op, x, routes)
    return y if projection.bias is None else op.Add(y, op.Gather(projection.bias, routes))


def _per_token(op: Ops, layer: Layer, rows: Value) -> Value:
    """Return [P, n] summed over the routes of each token: [T, n]."""
    # All sizes are given: Reshape cannot infer one where there are no tokens.
    sizes = op.size(layer.index, 0), op.size(layer.index, 1), op.size(rows, 1)
    return op.ReduceSum(op.shaped(rows, *sizes), op.ints(1), keepdims=0)


def _plus_shared_in(
    op: Ops, up: Projection, y: Value, x: Value, routes: Value, token: Value
) -> Value:
    """Return y [P, N] plus what the experts share of gate_up, applied to x [T, D]."""
    if up.basis is not None:
        own = op.Cast(op.Gather(up.basis.coef, routes), to=FLOAT)  # [P, N, r]
        scale = op.Gather(up.basis.scale, routes)
        low = op.Gather(op.MatMul(x, op.transposed(up.basis.vectors)), token)
        product = op.MatMul(own, op.Unsqueeze(low, op.ints(2)))
        y = op.Add(y, op.Mul(op.Squeeze(product, op.ints(2)), scale))
    return up.plus_mean(op, y, lambda: op.Gather(up.through_mean(op, x), token))


def _plus_shared_out(op: Ops, down: Projection, y: Value, hidden: Value, routes: Value) -> Value:
    """Return y [P, D] plus what the experts share of down, applied to each route [P, F]."""
    if down.basis is not None:
        own = op.Cast(op.Gather(down.basis.coef, routes), to=FLOAT)  # [P, r, F]
        scale = op.Gather(down.basis.scale, routes)
        product = op.MatMul(own, op.Unsqueeze(hidden, op.ints(2)))
        low = op.Mul(op.Squeeze(product, op.ints(2)), scale)
        y = op.Add(y, op.MatMul(low, down.basis.vectors))
    return down.plus_mean(op, y, lambda: down.through_mean(op, hidden))


def _plus_shared_once(op: Ops, layer: Layer, y: Value, hidden: Value, routes: Value) -> Value:
    """Return y [T, D] plus what the experts share of down, applied once a token.

    hidden [P, F] is weighted by the routes.
    """
    down = layer.down
    if down.basis is not None:
        own = op.Cast(op.Gather(down.basis.coef, routes), to=FLOAT)  # [P, r, F]
        product = op.MatMul(own, op.Unsqueeze(hidden, op.ints(2)))
        low = op.Squeeze(product, op.ints(2))
        low = _per_token(op, layer, op.Mul(low, op.Gather(down.basis.scale, routes)))
        y = op.Add(y, op.MatMul(low, down.basis.vectors))
    return down.plus_mean(op, y, lambda: down.through_mean(op, _per_token(op, layer, hidden)))
