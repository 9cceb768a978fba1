"""torch.fx graphs in general: copy them, follow dependencies, and run nodes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, fx

from moecc.errors import MoeccError
from moecc.ir import ops
from moecc.ir.text import node_text
from moecc.types import Value

# Kernels of another device may lay out their results otherwise, and then a view takes a copy.
_ANY_STRIDES: dict[object, Callable[..., Value]] = {
    torch.ops.aten.view.default: torch.ops.aten.reshape.default
}


def copy_module(module: fx.GraphModule) -> fx.GraphModule:
    """Copy a GraphModule with its graph; node metadata is shared, no fake tensor is cloned."""
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        new = graph.node_copy(node, lambda n: mapping[n])
        new.meta = dict(node.meta)
        if new.name != node.name:
            new._rename(node.name)
        mapping[node] = new
    return fx.GraphModule(module, graph)


def ancestors(roots: Iterable[fx.Node]) -> set[fx.Node]:
    """Return the call nodes that `roots` are computed from, `roots` included."""
    seen: set[fx.Node] = set()
    stack = [r for r in roots if isinstance(r, fx.Node)]
    while stack:
        node = stack.pop()
        if node.op == "call_function" and node not in seen:
            seen.add(node)
            stack += node.all_input_nodes
    return seen


def needed_for(nodes: Iterable[fx.Node], wanted: set[str]) -> list[fx.Node]:
    """Return those of `nodes` that the values called `wanted` depend on, in the same order.

    An in-place op is needed if a needed node or the caller reads the tensor that it writes into,
    even if no one reads its own result.
    """
    needed: set[fx.Node] = set()
    order = list(nodes)
    for node in reversed(order):
        into = written(node)
        if (
            node.name in wanted
            or any(u in needed for u in node.users)
            or any(i.name in wanted or any(u in needed for u in i.users) for i in into)
        ):
            needed.add(node)
    return [n for n in order if n in needed]


def descendants(nodes: Sequence[fx.Node], roots: Iterable[fx.Node]) -> set[fx.Node]:
    """Return `roots` and the nodes that depend on them, through in-place writes too."""
    found, before = set(roots), 0
    while len(found) > before:
        before = len(found)
        for node in nodes:
            if node in found or any(i in found for i in node.all_input_nodes):
                found.update((node, *written(node)))
    return found


def written(node: fx.Node) -> list[fx.Node]:
    """Return the nodes whose storage an in-place op changes.

    Its first argument and, if that is a view, the nodes that it views.
    """
    if not isinstance(node.target, torch._ops.OpOverload) or not node.target._schema.is_mutable:
        return []
    found: list[fx.Node] = []
    into = node.args[0] if node.args else None
    while isinstance(into, fx.Node):
        found.append(into)
        into = into.args[0] if _is_view(into) else None
    return found


def _is_view(node: fx.Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    return any(r.alias_info is not None for r in node.target._schema.returns)


def run_nodes(
    nodes: Iterable[fx.Node],
    values: dict[str, Value],
    weight: Mapping[str, Value],
    keep: set[str] | None = None,
) -> Iterator[tuple[fx.Node, Value]]:
    """Evaluate `nodes` in order and yield each with its result.

    `values` (by node name) is read and extended; `weight` gives the placeholders of weights. With
    `keep`, a value is dropped after its last use among `nodes` unless its name is in `keep`. What
    nodes make of nothing is on the device of `values`, not on that of the trace. Raise MoeccError,
    with node and stage, if a node fails.
    """
    nodes = list(nodes)
    device = next((v.device for v in values.values() if isinstance(v, Tensor)), None)
    last: dict[str, fx.Node] = {}
    if keep is not None:
        for node in nodes:
            for i in node.all_input_nodes:
                last[i.name] = node

    def value(n: object) -> Value:
        if isinstance(n, torch.device):
            return device or n
        if not isinstance(n, fx.Node):
            return n
        if n.op == "get_attr":  # a constant that is no tensor: a mask function's tree
            return getattr(n.graph.owning_module, str(n.target))
        return values[n.name] if n.name in values else weight[n.name]

    for node in nodes:
        result = _call(node, value)
        values[node.name] = result
        yield node, result
        if keep is not None:
            for i in node.all_input_nodes:
                if last[i.name] is node and i.name not in keep:
                    values.pop(i.name, None)


def _call(node: fx.Node, value: Callable[[object], Value]) -> Value:
    args, kwargs = fx.node.map_aggregate((node.args, node.kwargs), value)
    target = _ANY_STRIDES.get(node.target, node.target)
    if torch.is_grad_enabled():
        target = ops.REFERENCE.get(target, target)
    assert callable(target)
    try:
        return target(*args, **kwargs)
    except (RuntimeError, IndexError, TypeError, Warning) as error:
        # a warning: the GPU has no algorithm that repeats (`moecc.pipeline.device`)
        raise failed(node, error) from error


def failed(node: fx.Node, error: Exception) -> MoeccError:
    """Return the error that names the node which failed, and its stage."""
    return MoeccError(f"{node_text(node)} in stage {node.meta['layer']} failed: {error}")
