"""The linears of a decoder layer that every token goes through, and why some are left alone.

Left alone are:
  routers   all that feeds the chosen indices and weights but not the experts' input
  gates     a linear whose result goes into a sigmoid, or with fewer than 32 outputs
  others    a weight that something else reads too; a linear that is not the forward of an nn.Linear
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from moecc.ir.graph import ancestors
from moecc.ir.program import Program, stage_nodes

FEWEST_OUTPUTS = 32
# ops between a linear and a sigmoid that change no values
_PASS_THROUGH = (
    "view",
    "reshape",
    "to.dtype",
    "_to_copy",
    "unsqueeze",
    "squeeze",
    "transpose",
    "chunk",
    "getitem",
    "split",
)


def linears(program: Program, stage: int) -> Iterator[tuple[fx.Node, str, str]]:
    """Every `aten.linear` on a weight in a decoder layer's stage.

    Yields the node, the name of its weight, and why it is left alone ("" if it is not).
    """
    if not 0 < stage < program.layers - 1:
        return
    routers = router_nodes(program)
    for node in stage_nodes(program, stage):
        if node.target is torch.ops.aten.linear.default and isinstance(node.args[1], fx.Node):
            weight = program.weights.get(node.args[1].name)
            if weight is not None:
                yield node, weight.name, "router" if node in routers else _why_left(node)


def router_nodes(program: Program) -> set[fx.Node]:
    """Every node that helps to choose experts or their weights, but not to make their input."""
    found: set[fx.Node] = set()
    for moe in program.moe_layers():
        x, index, weight = moe.node.args[:3]
        found |= ancestors([index, weight]) - ancestors([x])  # type: ignore[list-item]
        if moe.logits is not None:
            # llama4's scores multiply the experts' input, so its router helps to make that too
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
    few = weight.meta["val"].shape[0] < FEWEST_OUTPUTS
    return f"fewer than {FEWEST_OUTPUTS} outputs" if few else ""


def _into_sigmoid(node: fx.Node) -> bool:
    for user in node.users:
        name = str(user.target)
        if "sigmoid" in name:
            return True
        if any(word in name for word in _PASS_THROUGH) and _into_sigmoid(user):
            return True
    return False
