"""Fold computations on weights into derived weights: experts nodes then read placeholders only."""

from __future__ import annotations

import torch
from torch import fx

from moecc.errors import MoeccError
from moecc.ir.graph import ancestors
from moecc.ir.moe import operand_names
from moecc.ir.program import Program
from moecc.ir.tensors import Weight


def fold_weight_graphs(program: Program) -> None:
    """Turn every weight-only subgraph that feeds an experts node into one derived weight.

    Raise MoeccError if such a subgraph depends on the model's inputs.
    """
    for moe in program.moe_layers():
        names, args = operand_names(moe.node), list(moe.node.args)
        for i, (name, value) in enumerate(zip(names, args, strict=False)):
            if i > 2 and isinstance(value, fx.Node) and value.op != "placeholder":
                args[i] = _derive(program, f"{moe.path}.{name}", value)
        moe.node.args = tuple(args)
    program.graph.eliminate_dead_code()
    program.drop_unused()


def _derive(program: Program, name: str, root: fx.Node) -> fx.Node:
    """Return a new placeholder `name` whose weight computes what `root` computes."""
    inside = ancestors([root])
    order = [n for n in program.graph.nodes if n in inside]
    placeholders = [n for n in program.graph.nodes if n.op == "placeholder"]
    leaves = [n for n in placeholders if any(u in inside for u in n.users)]
    if any(leaf.name not in program.weights for leaf in leaves):
        why = "computed from the model's inputs, not from weights alone"
        raise MoeccError(f"{name}: {why}; this model can't be compiled")
    recipe, mapping = fx.Graph(), {}
    for leaf in leaves:
        mapping[leaf] = recipe.placeholder(leaf.name)
        mapping[leaf].meta["val"] = leaf.meta["val"]
    for node in order:
        mapping[node] = recipe.node_copy(node, lambda n: mapping[n])
    recipe.output(mapping[root])
    with program.graph.inserting_before(program.user_inputs[0]):
        new = program.graph.placeholder("w_" + name.replace(".", "_"))
    new.meta.update(val=root.meta["val"], layer=0, path="")
    sources = tuple(program.weights[leaf.name].name for leaf in leaves)
    program.weights[new.name] = Weight(name, fx.GraphModule(torch.nn.Module(), recipe), sources)
    return new
