"""Derived weights: the value of one, and that of some of its experts without the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx

from moecc.ir.tensors import Weight

_Read = Callable[[str, Sequence[int] | None], Tensor]


@torch.no_grad()
def derive(weight: Weight, read: _Read) -> Tensor:
    """Return the value of a derived weight; `read` gives its sources, all experts or some."""
    assert weight.recipe is not None
    value: Tensor = weight.recipe(*[read(source, None) for source in weight.sources])
    return value.contiguous()


@torch.no_grad()
def derive_experts(weight: Weight, read: _Read, experts: Sequence[int]) -> Tensor:
    """Return the rows `experts` of a derived weight [E, ...].

    Where the recipe takes each expert by itself, only these are read.
    """
    assert weight.recipe is not None
    own = of_some(weight.recipe, len(experts))
    if own is None:
        return derive(weight, read)[list(experts)]
    value: Tensor = own(*[read(source, experts) for source in weight.sources])
    return value.contiguous()


def of_some(recipe: fx.GraphModule, count: int) -> fx.GraphModule | None:
    """Return the recipe for `count` experts; None if it may mix experts.

    It keeps them apart if each source and each result has them in its first dimension, and no node
    touches that.
    """
    by_number = {n: i for i, n in enumerate(recipe.graph.nodes)}
    made = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    for node in by_number:
        if node.op != "call_function":
            mapping[node] = made.node_copy(node, lambda n: mapping[n])
            continue
        args = _kept_apart(node, count)
        if args is None:
            return None
        copy = made.node_copy(node, lambda n: mapping[n])
        copy.args = fx.node.map_arg(args, lambda n: mapping[n])
        mapping[node] = copy
    return fx.GraphModule(torch.nn.Module(), made)


def _kept_apart(node: fx.Node, count: int) -> tuple[fx.node.Argument, ...] | None:
    """Return the node's arguments for `count` experts; None if it may touch their dimension."""
    aten, args = torch.ops.aten, node.args
    values = [n.meta["val"] for n in (node, *node.all_input_nodes)]
    if not all(isinstance(v, Tensor) and v.dim() for v in values):
        return None
    value, experts = values[0], values[0].shape[0]
    if any(v.shape[0] != experts for v in values):
        return None
    if node.target is aten.transpose.int:
        return args if all(isinstance(d, int) and d % value.dim() for d in args[1:]) else None
    if node.target is aten.view.default and isinstance(args[1], (list, tuple)):
        return (args[0], [count, *args[1][1:]]) if args[1][0] == experts else None
    if node.target is aten.flatten.using_ints and args[1] != 0:
        return args
    if node.target is aten.cat.default and len(args) > 1 and args[1] != 0:
        return args
    if node.target is aten.slice.Tensor and len(args) > 1 and args[1] != 0:
        return args
    return None
