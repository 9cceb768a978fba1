"""The linears of a decoder layer that every token goes through: which there are, and which are left as they are and why.

Left alone: routers (whatever feeds the chosen indices and weights but not the experts' input), gates (a linear whose result goes
into a sigmoid, or with fewer than 32 outputs), and weights that something else reads too.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from moecc.ir.graph import ancestors
from moecc.ir.program import Program, stage_nodes

FEWEST_OUTPUTS = 32
_PASS_THROUGH = (
    "view", "reshape", "to.dtype", "_to_copy", "unsqueeze", "squeeze", "transpose", "chunk", "getitem", "split",
)  # fmt: skip


def linears(program: Program, stage: int) -> Iterator[tuple[fx.Node, str, str]]:
    """(node, weight name, why it is left alone or "") of every `aten.linear` on a weight in a decoder layer's stage."""
    if not 0 < stage < program.layers - 1:
        return
    routers = router_nodes(program)
    for node in stage_nodes(program, stage):
        if node.target is torch.ops.aten.linear.default and isinstance(node.args[1], fx.Node):
            weight = program.weights.get(node.args[1].name)
            if weight is not None:
                yield node, weight.name, "router" if node in routers else _why_left(node)


def router_nodes(program: Program) -> set[fx.Node]:
    """Every node that helps to choose experts or their weights and is not on the way to their input."""
    found: set[fx.Node] = set()
    for moe in program.moe_layers():
        x, index, weight = moe.node.args[:3]
        found |= ancestors([index, weight]) - ancestors([x])  # type: ignore[list-item]
        if (
            moe.logits is not None
        ):  # llama4's scores multiply the experts' input, so its router is on the way there
            found.add(moe.logits)
    return found


def _why_left(node: fx.Node) -> str:
    weight = node.args[1]
    assert isinstance(weight, fx.Node)
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    if not stack or not str(stack[-1][1]).endswith("linear.Linear"):
        return "not the forward of an nn.Linear"
    if len(weight.users) > 1:
        return "its weight is read more than once"
    if _into_sigmoid(node):
        return "gate"
    return (
        f"fewer than {FEWEST_OUTPUTS} outputs"
        if weight.meta["val"].shape[0] < FEWEST_OUTPUTS
        else ""
    )


def _into_sigmoid(node: fx.Node) -> bool:
    for user in node.users:
        name = str(user.target)
        if "sigmoid" in name:
            return True
        if any(word in name for word in _PASS_THROUGH) and _into_sigmoid(user):
            return True
    return False
