"""Group-quantizes what every token goes through: the linears of attention and of shared experts, at 8 or 4 bit.

  1. A layer's linears are all `aten.linear` nodes on a plain weight whose module is an nn.Linear.
  2. Left in float, each with its reason in the audit: routers (whatever feeds the chosen indices and weights but not the experts'
     input), gates (a linear whose result goes into a sigmoid, or with fewer than 32 outputs), linears whose input size no group
     divides, and weights that something else reads too.
  3. Each row's groups of `group` neighbouring weights are rounded to `bits` bits between their least and greatest value.

Cost in bits per weight: bits + 24 / group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from moecc.base import Context, Layer, LayerPass, option
from moecc.ir import Program, ancestors, stage_nodes
from moecc.ops import Q_LINEAR, dequantize_linear
from moecc.passes._store import compact

_FEWEST_OUTPUTS = 32
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


@dataclass(frozen=True, kw_only=True)
class QuantizeDense(LayerPass):
    name: ClassVar[str] = "dense"
    provides: ClassVar[frozenset[str]] = frozenset({"dense"})
    bits: int = option(8, help="bits per weight", choices=(4, 8))
    group: int = option(64, help="neighbouring weights that share a scale", choices=(16, 32, 64, 128))

    def run_layer(self, layer: Layer, ctx: Context) -> bool:
        program, changed = layer.program, False
        routers = router_nodes(program)
        for node in stage_nodes(program, layer.index):
            if node.target is not torch.ops.aten.linear.default or not isinstance(node.args[1], fx.Node):
                continue
            weight = program.weights.get(node.args[1].name)
            if weight is None or not _inside_a_decoder_layer(layer):
                continue
            reason = "router" if node in routers else why_float(node, self.group)
            if reason:
                ctx.record(weight.name, fallback=f"float: {reason}")
                continue
            self.lower(program, node, weight.name, ctx)
            changed = True
        return changed

    def lower(self, program: Program, node: fx.Node, name: str, ctx: Context) -> None:
        weight = program.read(name).float()
        packed, scale, zero = quantize(weight, self.bits, self.group)
        error = dequantize_linear(packed, scale, zero, self.bits) - weight
        ctx.record(
            name,
            became=f"{self.bits} bit, groups of {self.group}",
            error=float(error.square().sum() / weight.square().sum()),
        )
        path = name.removesuffix(".weight")
        operands = [program.add(f"{path}.{k}", t) for k, t in (("scale", scale), ("zero", zero))]
        bias = node.args[2] if len(node.args) > 2 else None
        x = node.args[0]
        code = program.add(f"{path}.codes", packed)
        program.replace(node, Q_LINEAR, (x, code, *operands, bias), {"bits": self.bits})


def _inside_a_decoder_layer(layer: Layer) -> bool:
    return 0 < layer.index < layer.program.layers - 1


def router_nodes(program: Program) -> set[fx.Node]:
    """Every node that helps to choose experts or their weights and is not on the way to their input."""
    found: set[fx.Node] = set()
    for moe in program.moe_layers():
        x, index, weight = moe.node.args[:3]
        found |= ancestors([index, weight]) - ancestors([x])  # type: ignore[list-item]
        if moe.logits is not None:  # llama4's scores multiply the experts' input, so its router is on the way there
            found.add(moe.logits)
    return found


def why_float(node: fx.Node, group: int) -> str:
    """Why a linear stays float, in words; empty where it need not."""
    weight = node.args[1]
    assert isinstance(weight, fx.Node)
    outputs, inputs = weight.meta["val"].shape
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    if not stack or not str(stack[-1][1]).endswith("linear.Linear"):
        return "not the forward of an nn.Linear"
    if len(weight.users) > 1:
        return "its weight is read more than once"
    if outputs < _FEWEST_OUTPUTS or _into_sigmoid(node):
        return "gate"
    return "" if inputs % group == 0 else f"groups of {group} do not divide {inputs} inputs"


def _into_sigmoid(node: fx.Node) -> bool:
    for user in node.users:
        name = str(user.target)
        if "sigmoid" in name:
            return True
        if any(word in name for word in _PASS_THROUGH) and _into_sigmoid(user):
            return True
    return False


def quantize(weight: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """[N, K] -> packed u8 [N, K*bits/8], scale [N, K/group], zero u8 [N, K/group] (`moecc::q_linear`)."""
    groups = weight.unflatten(-1, (-1, group))
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scale = compact(((high - low) / (2**bits - 1)).clamp(min=1e-7))
    step = scale.float()
    zero = (-low / step).round().clamp(0, 2**bits - 1)
    q = (groups / step.unsqueeze(-1)).round() + zero.unsqueeze(-1)
    q = q.clamp(0, 2**bits - 1).to(torch.uint8).flatten(-2)
    packed = q if bits == 8 else q[:, 0::2] | (q[:, 1::2] << 4)
    return packed.contiguous(), scale, zero.to(torch.uint8)
