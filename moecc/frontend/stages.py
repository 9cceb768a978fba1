"""The decoder layer of each node of a trace, so that a program can be run layer by layer.

A node inside decoder layer i has stage i + 1. A node outside has stage 0 before the first layer,
the highest stage of its inputs between layers, and L + 1 after the last layer. The stage never
falls along an edge.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from torch import fx, nn


def decoder_stack(model: nn.Module, experts: Iterable[str]) -> tuple[str, int]:
    """Return path and length of the decoder's layers: the outermost ModuleList of most experts."""
    lists = {path: len(m) for path, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    outermost = [
        min((p for p in lists if e.startswith(p + ".")), key=len, default="") for e in experts
    ]
    path, _ = Counter(outermost).most_common(1)[0]
    return path, lists.get(path, 0)


def paths(node: fx.Node) -> list[str]:
    """Return the paths of the modules that the node was traced in, outermost first."""
    return [str(path) for path, _ in (node.meta.get("nn_module_stack") or {}).values()]


def _layer(node: fx.Node, prefix: str) -> int | None:
    for path in paths(node):
        if path.startswith(prefix):
            return int(path[len(prefix) :].split(".")[0])
    return None


def mark(model: nn.Module, module: fx.GraphModule, experts: Iterable[str]) -> int:
    """Set meta["layer"] and meta["path"] on every node; return the number of decoder layers L.

    experts: paths of the experts modules. They tell the decoder's layers from a vision tower's.
    """
    stack, count = decoder_stack(model, experts)
    nodes = [n for n in module.graph.nodes if n.op not in ("placeholder", "output")]
    tags = {n: _layer(n, stack + ".") for n in nodes}
    last = max((i for i, n in enumerate(nodes) if tags[n] is not None), default=-1)
    for position, node in enumerate(nodes):
        before = max(
            (n.meta["layer"] for n in node.all_input_nodes if n.op != "placeholder"), default=0
        )
        tag = tags[node]
        if tag is not None:
            stage = max(before, tag + 1)
        else:
            stage = count + 1 if before and position > last else before
        node.meta["layer"] = stage
        node.meta["path"] = next(reversed(paths(node)), "")
    _mark_ends(module, count)
    return count


def _mark_ends(module: fx.GraphModule, count: int) -> None:
    """Give a placeholder the first stage that reads it, and the output the last stage."""
    for node in module.graph.nodes:
        if node.op == "placeholder":
            node.meta["layer"] = min(
                (u.meta.get("layer", count + 1) for u in node.users), default=0
            )
            node.meta["path"] = ""
        elif node.op == "output":
            node.meta["layer"], node.meta["path"] = count + 1, ""
