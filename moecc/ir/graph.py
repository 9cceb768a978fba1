"""torch.fx graphs, whatever they compute: what depends on what, how nodes are run and printed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from moecc.errors import MoeccError
from moecc.ir import ops

SHORT = {
    torch.float64: "f64", torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16", torch.int64: "i64",
    torch.int32: "i32", torch.int8: "i8", torch.uint8: "u8", torch.bool: "bool",
}  # fmt: skip


def copy_module(module: fx.GraphModule) -> fx.GraphModule:
    """A GraphModule with its own graph; node metadata is shared value by value (fake tensors are not cloned)."""
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
    """The call nodes that `roots` are computed from, themselves included."""
    seen: set[fx.Node] = set()
    stack = [r for r in roots if isinstance(r, fx.Node)]
    while stack:
        node = stack.pop()
        if node.op == "call_function" and node not in seen:
            seen.add(node)
            stack += node.all_input_nodes
    return seen


def needed_for(nodes: Iterable[fx.Node], wanted: set[str]) -> list[fx.Node]:
    """Those of `nodes` (in order) that the values called `wanted` depend on, in order.

    An in-place op counts where a needed node, or the caller, reads what it writes into, though nobody reads its own result.
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
    """Nodes whose values depend on `roots`, through what is written in place too."""
    found, before = set(roots), 0
    while len(found) > before:
        before = len(found)
        for node in nodes:
            if node in found or any(i in found for i in node.all_input_nodes):
                found.update((node, *written(node)))
    return found


def written(node: fx.Node) -> list[fx.Node]:
    """The nodes whose storage an in-place op changes: its first argument and what that is a view of."""
    if not isinstance(node.target, torch._ops.OpOverload) or not node.target._schema.is_mutable:
        return []
    found = [node.args[0]] if node.args and isinstance(node.args[0], fx.Node) else []
    while found and _is_view(found[-1]) and isinstance(found[-1].args[0], fx.Node):
        found.append(found[-1].args[0])
    return [f for f in found if isinstance(f, fx.Node)]


def _is_view(node: Any) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    return any(r.alias_info is not None for r in node.target._schema.returns)


def run_nodes(
    nodes: Iterable[fx.Node],
    values: dict[str, Any],
    weight: Mapping[str, Any],
    keep: set[str] | None = None,
) -> Iterator[tuple[fx.Node, Any]]:
    """Evaluate `nodes` in order; `values` (by node name) is read and extended, `weight` gives placeholders. Yields each result.

    With `keep`, a value is dropped after its last use among `nodes` unless its name is in `keep`.
    """
    nodes = list(nodes)
    last: dict[str, fx.Node] = {}
    if keep is not None:
        for node in nodes:
            for i in node.all_input_nodes:
                last[i.name] = node

    def value(n: fx.Node) -> Any:
        if (
            n.op == "get_attr"
        ):  # a constant of the graph that is no tensor, such as a mask function's tree
            return getattr(n.graph.owning_module, str(n.target))
        return values[n.name] if n.name in values else weight[n.name]

    for node in nodes:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), value)
        target: Any = node.target
        if torch.is_grad_enabled():
            target = ops.REFERENCE.get(target, target)
        try:
            result = target(*args, **kwargs)
        except (RuntimeError, IndexError, TypeError) as e:
            raise MoeccError(
                f"node %{node.name} ({target_text(node.target)}) in stage {node.meta['layer']} failed: {e}"
            ) from e
        values[node.name] = result
        yield node, result
        if keep is not None:
            for i in node.all_input_nodes:
                if last[i.name] is node and i.name not in keep:
                    values.pop(i.name, None)


def type_text(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{SHORT.get(value.dtype, str(value.dtype))}[{', '.join(map(str, value.shape))}]"
    return (
        "(" + ", ".join(map(type_text, value)) + ")"
        if isinstance(value, (list, tuple))
        else str(value)
    )


def arg_text(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(arg_text, value)) + "]"
    return f"%{value.name}" if isinstance(value, fx.Node) else str(value)


def target_text(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return str(target).removesuffix(".default")
    return getattr(target, "__name__", str(target))
