"""Group-quantizes the linears that every token goes through, at 8 or 4 bit.

  1. Find the linears of attention and of shared experts in each layer: all `aten.linear` nodes on a
     plain weight whose module is an nn.Linear (`_tune.linears`).
  2. Leave in float, each with its reason in the audit: routers, gates, weights that something else
     reads too, and linears whose input size no group divides.
  3. Round each row's groups of `group` neighbouring weights to `bits` bits, between their least and
     greatest value.

Cost in bits per weight: bits + 24 / group (16 for the scale, 8 for the zero point).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from moecc.ir.ops import Q_LINEAR, dequantize_linear
from moecc.ir.program import Program
from moecc.ir.relative import relative
from moecc.options import option
from moecc.passes._code.half import compact
from moecc.passes._tune.linears import FEWEST_OUTPUTS, linears
from moecc.pipeline.estimate import Estimate
from moecc.pipeline.fate import Fate
from moecc.pipeline.passes import Context, Layer, LayerPass
from moecc.pipeline.work import Scope, Work


@dataclass(frozen=True, kw_only=True)
class QuantizeDense(LayerPass):
    name: ClassVar[str] = "dense"
    after: ClassVar[frozenset[str]] = frozenset({"lora", "merged", "absorbed"})
    provides: ClassVar[frozenset[str]] = frozenset({"dense"})
    bits: int = option(8, help="bits per weight", choices=(4, 8))
    group: int = option(
        64, help="neighbouring weights that share a scale", choices=(16, 32, 64, 128)
    )

    def estimate(self, found: Estimate) -> None:
        for m in found.others.values():
            taken = m.role in ("attention", "shared expert") and len(m.shape) == 2
            if taken and m.shape[1] % self.group == 0 and m.shape[0] >= FEWEST_OUTPUTS:
                m.bits = m.weights * (self.bits + 24 / self.group)

    def work(self, scope: Scope) -> Work:
        return Work()  # next to nothing

    def run_layer(self, layer: Layer, ctx: Context) -> bool:
        program, changed = layer.program, False
        for node, name, reason in linears(program, layer.index):
            inputs = node.args[1].meta["val"].shape[1]  # type: ignore[union-attr]
            if not reason and inputs % self.group:
                reason = f"groups of {self.group} do not divide {inputs} inputs"
            if reason:
                ctx.record(name, fallback=f"float: {reason}")
                continue
            self.lower(program, node, name, ctx)
            changed = True
        return changed

    def lower(self, program: Program, node: fx.Node, name: str, ctx: Context) -> None:
        """Step 3: replace the linear on the weight `name`."""
        weight = program.read(name).float()
        packed, scale, zero = quantize(weight, self.bits, self.group)
        error = dequantize_linear(packed, scale, zero, self.bits) - weight
        ctx.record(
            name,
            fate=Fate("grouped", bits=self.bits, group=self.group),
            error=float(relative(error.square().sum(), weight.square().sum())),
        )
        path = name.removesuffix(".weight")
        operands = [program.add(f"{path}.{k}", t) for k, t in (("scale", scale), ("zero", zero))]
        bias = node.args[2] if len(node.args) > 2 else None
        x = node.args[0]
        code = program.add(f"{path}.codes", packed)
        program.replace(node, Q_LINEAR, (x, code, *operands, bias), {"bits": self.bits})


def quantize(weight: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize [N, K] for `moecc::q_linear`.

    Returns packed u8 [N, K*bits/8], scale f16 or bf16 [N, K/group] and zero u8 [N, K/group].
    """
    groups = weight.unflatten(-1, (-1, group))
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scale = compact(((high - low) / (2**bits - 1)).clamp(min=1e-7))
    step = scale.float()
    zero = (-low / step).round().clamp(0, 2**bits - 1)
    q = (groups / step.unsqueeze(-1)).round() + zero.unsqueeze(-1)
    q = q.clamp(0, 2**bits - 1).to(torch.uint8).flatten(-2)
    packed = q if bits == 8 else q[:, 0::2] | (q[:, 1::2] << 4)
    return packed.contiguous(), scale, zero.to(torch.uint8)
