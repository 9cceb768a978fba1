"""The moecc dialect: one node per MoE layer, defined by an eager reference.

  moecc::experts       the dense experts of a layer, straight from the trace
  moecc::klt_experts   the same with what the experts share taken out (basis, mean), the remainder still dense
  moecc::vq_experts    the compressed form (`moecc.ir.vq4`)
  moecc::q_linear      group-quantized dense linear (attention, shared expert)
  moecc::expert_linear one projection per chosen expert, not combined (JetMoE's mixture of attention heads)

Each op has a schema, a fake shape, an eager reference and a backward that differentiates the reference again, so there is no
hand-written derivative to keep. The reference is the definition: passes target it, backends are tested against it. Attributes
are keyword-only without defaults, because torch.export drops arguments that equal a default.

Shapes: T tokens, k experts per token, E experts, D hidden, F intermediate, N = 2F (F without a gate), r basis rows.
  x [T, D]; topk_index i64 [T, k]; topk_weight [T, k]; gate_up [E, N, D]; down [E, D, F]; result [T, D] in x's dtype.
  post_norm [D]: weight of a root-mean-square norm on each expert's output before the sum (muse_spark); eps its epsilon.
  slope, offset [E, N]: the affine correction before it is folded: vq output * slope + offset.
An index outside 0..E-1 raises IndexError.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moecc.ir import vq4
from moecc.ir.gates import apply_gate

library = torch.library.Library("moecc", "FRAGMENT")
ATTRIBUTES = "str act, str gate, float alpha, float limit, float eps"
Operand = Tensor | None


def define(
    name: str, tensors: str, attributes: str, reference: Callable[..., Tensor], fake: Callable[..., Tensor],
    kernel: Callable[..., Tensor] | None = None,
) -> None:  # fmt: skip
    """Register `moecc::name(tensors, *, attributes) -> Tensor` with kernel, fake shape and recomputing backward.

    kernel: what computes it, if not the reference; derivatives are the reference's in any case."""
    operands = [part.split() for part in tensors.split(",")]
    keys = [part.split()[-1] for part in attributes.split(",")] if attributes else []
    star = f", *, {attributes}" if attributes else ""
    plain = f", {attributes}" if attributes else ""
    library.define(f"{name}({tensors}{star}) -> Tensor")
    library.define(
        f"{name}_backward(Tensor grad, Tensor?[] operands, bool[] wanted{plain}) -> Tensor[]"
    )

    def forward(*args: Operand, **kwargs: Any) -> Tensor:
        with torch.no_grad():
            return (kernel or reference)(*args, **kwargs)

    def backward(
        grad: Tensor, args: list[Operand], wanted: list[bool], *attrs: Any
    ) -> list[Tensor]:
        leaves = [
            None if t is None else t.detach().requires_grad_(w)
            for t, w in zip(args, wanted, strict=True)
        ]
        with torch.enable_grad():
            y = reference(*leaves, **dict(zip(keys, attrs, strict=True)))
        sources = [t for t, w in zip(leaves, wanted, strict=True) if w and t is not None]
        if not y.requires_grad:  # no token was routed anywhere
            return [torch.zeros_like(t) for t in sources]
        grads = torch.autograd.grad(y, sources, grad, allow_unused=True)
        return [
            torch.zeros_like(t) if g is None else g.contiguous()
            for g, t in zip(grads, sources, strict=True)
        ]

    def backward_fake(
        grad: Tensor, args: list[Operand], wanted: list[bool], *attrs: Any
    ) -> list[Tensor]:
        return [
            t.new_empty(t.shape) for t, w in zip(args, wanted, strict=True) if w and t is not None
        ]

    def setup_context(
        ctx: Any,
        inputs: tuple[Operand, ...],
        output: Tensor,
        keyword_only_inputs: dict[str, Any] | None = None,
    ) -> None:  # torch names its arguments, and leaves out the last where a schema has no keyword
        ctx.save_for_backward(*inputs)
        ctx.attrs = [(keyword_only_inputs or {})[k] for k in keys]

    def autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        wanted = [bool(w) for w in ctx.needs_input_grad[: len(operands)]]
        op = getattr(torch.ops.moecc, f"{name}_backward")
        grads = iter(op(grad.contiguous(), list(ctx.saved_tensors), wanted, *ctx.attrs))
        return tuple(next(grads) if w else None for w in wanted)

    torch.library.impl(f"moecc::{name}", ("CPU", "CUDA"), forward, lib=library)
    torch.library.impl(f"moecc::{name}_backward", ("CPU", "CUDA"), backward, lib=library)
    torch.library.register_fake(f"moecc::{name}", fake, lib=library)
    torch.library.register_fake(f"moecc::{name}_backward", backward_fake, lib=library)
    torch.library.register_autograd(
        f"moecc::{name}", autograd, setup_context=setup_context, lib=library
    )


def _by_expert(topk_index: Tensor, experts: int) -> tuple[Tensor, list[int]]:
    """The slots t * k + j in the order of their experts, and how many each expert has; IndexError outside 0..E-1."""
    flat = topk_index.reshape(-1)
    if flat.numel() and (int(flat.min()) < 0 or int(flat.max()) >= experts):
        raise IndexError(f"moecc: expert index outside 0..{experts - 1}")
    return torch.argsort(flat, stable=True), torch.bincount(flat, minlength=experts).tolist()


def _combine(
    x: Tensor,
    topk_index: Tensor,
    topk_weight: Tensor,
    experts: int,
    run: Callable[[int, Tensor], Tensor],
) -> Tensor:
    """sum_k topk_weight[t, k] * run(topk_index[t, k], x[t]): each expert that is chosen at all runs once, on its tokens."""
    tokens, k = topk_index.shape
    order, counts = _by_expert(topk_index, experts)
    weight = topk_weight.reshape(-1)
    parts, start = [], 0
    for e, count in enumerate(counts):
        if count:
            slots = order[start : start + count]
            parts.append(run(e, slots // k) * weight[slots, None])
            start += count
    if not parts:
        return x.new_zeros(x.shape)
    routed = torch.cat(parts)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel(), device=order.device)
    return routed[inverse].view(tokens, k, -1).sum(1).to(x.dtype)


def _post_norm(y: Tensor, weight: Operand, eps: float) -> Tensor:
    if weight is None:
        return y
    wide = _wide(y)
    scaled = (
        (y.to(wide) * weight.to(wide)).to(y.dtype).to(wide)
    )  # scale, round, normalise: muse_spark's order
    return (scaled * torch.rsqrt(scaled.pow(2).mean(-1, keepdim=True) + eps)).to(y.dtype)


def experts_reference(
    x: Tensor, topk_index: Tensor, topk_weight: Tensor, gate_up: Tensor, down: Tensor, gate_up_bias: Operand,
    down_bias: Operand, post_norm: Operand, *, act: str, gate: str, alpha: float, limit: float, eps: float,
) -> Tensor:  # fmt: skip
    """moecc::experts: y_t = sum_k w_tk norm(down_e gate(gate_up_e x_t + b_e) + c_e), in the weights' dtype."""

    def run(e: int, tokens: Tensor) -> Tensor:
        rows = F.linear(
            x[tokens].to(gate_up.dtype),
            gate_up[e],
            None if gate_up_bias is None else gate_up_bias[e],
        )
        hidden = apply_gate(rows, act, gate, alpha, limit)
        y = F.linear(hidden, down[e], None if down_bias is None else down_bias[e])
        return _post_norm(y, post_norm, eps)

    return _combine(x, topk_index, topk_weight, gate_up.shape[0], run)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def klt_experts_reference(
    x: Tensor, topk_index: Tensor, topk_weight: Tensor, gate_up: Tensor, down: Tensor, *operands: Operand,
    act: str, gate: str, alpha: float, limit: float, eps: float,
) -> Tensor:  # fmt: skip
    """moecc::klt_experts: `experts` whose weights are a dense remainder plus the stored shared part. Computed in float32.

    operands: `vq4.SHARED` of gate_up and of down, then gate_up_bias, down_bias, post_norm."""
    dtype, count = _wide(x), len(vq4.SHARED)
    gate_up_bias, down_bias, post_norm = operands[2 * count :]
    parts, means = {}, {}
    for i, (name, dense) in enumerate((("gate_up", gate_up), ("down", down))):
        parts[name] = dict(zip(vq4.SHARED, operands[i * count : (i + 1) * count], strict=True))
        means[name] = vq4.mean_part(parts[name], dense.shape[-1], dtype)

    def weight(name: str, dense: Tensor, e: int) -> Tensor:
        w, mean = dense[e].to(dtype), means[name]
        basis, coef, coef_scale = (parts[name][t] for t in ("basis", "coef", "coef_scale"))
        if basis is not None and coef is not None and coef_scale is not None:
            one = slice(e, e + 1)
            w = (
                w
                + vq4.basis_part(
                    coef[one], coef_scale[one], basis, dtype, input_side=name == "gate_up"
                )[0]
            )
        return w if mean is None else w + mean[0]

    def run(e: int, tokens: Tensor) -> Tensor:
        bias = None if gate_up_bias is None else gate_up_bias[e].to(dtype)
        rows = F.linear(x[tokens].to(dtype), weight("gate_up", gate_up, e), bias)
        hidden = apply_gate(rows, act, gate, alpha, limit)
        y = F.linear(
            hidden, weight("down", down, e), None if down_bias is None else down_bias[e].to(dtype)
        )
        return _post_norm(y, post_norm, eps)

    return _combine(x, topk_index, topk_weight, gate_up.shape[0], run)


_Projection = dict[str, Operand]  # by names of `vq4.TENSORS`, and slope and offset


def _project(p: _Projection, e: int, x: Tensor, mean: Tensor | None, *, input_side: bool) -> Tensor:
    """One expert's projection of x [n, K] -> [n, N], as `moecc.ir.vq4` defines it; affine operands act on the VQ part.

    mean [1, N, K]: what all experts share as it is."""
    codes, signs, codebook, scale = (p[name] for name in vq4.CODED)
    assert codes is not None and codebook is not None and scale is not None
    one = slice(e, e + 1)
    table = codebook[one] if codebook.shape[0] > 1 else codebook
    weight = vq4.decode(
        codes[one], None if signs is None else signs[one], table, x.shape[-1], x.dtype
    )[0]
    factor = scale[e].to(x.dtype)
    if (slope := p["slope"]) is not None:
        factor = factor * slope[e].to(x.dtype)
    # one product instead of two: on a CPU x is many tokens, and the sum of two matrices is cheap
    y = (
        F.linear(x, weight) * factor
        if mean is None
        else F.linear(x, weight * factor.unsqueeze(-1) + mean[0])
    )
    basis, coef, coef_scale = p["basis"], p["coef"], p["coef_scale"]
    if basis is not None and coef is not None and coef_scale is not None:
        low = coef[e].to(x.dtype) * coef_scale[e].to(x.dtype).unsqueeze(-1)
        b = basis.to(x.dtype)
        y = y + (F.linear(F.linear(x, b), low) if input_side else F.linear(x, low) @ b)
    for shift in (p["bias"], p["offset"]):
        if shift is not None:
            y = y + shift[e].to(x.dtype)
    return y


def vq_experts_reference(
    x: Tensor, topk_index: Tensor, topk_weight: Tensor, *operands: Operand,
    act: str, gate: str, alpha: float, limit: float, eps: float,
) -> Tensor:  # fmt: skip
    """moecc::vq_experts: `experts` on the tensors of `moecc.ir.vq4`. Computed in float32.

    operands: `vq4.TENSORS`, slope and offset of gate_up and of down, then post_norm."""
    count = len(_OPERANDS)
    gate_up, down = (dict(zip(_OPERANDS, operands[i : i + count], strict=True)) for i in (0, count))
    codes, down_codes, post_norm = gate_up["codes"], down["codes"], operands[2 * count]
    assert codes is not None and down_codes is not None
    dtype = _wide(x)
    rows_out = codes.shape[1]
    intermediate = rows_out if gate == "none" else rows_out // 2
    up_mean, down_mean = (
        vq4.mean_part(gate_up, x.shape[1], dtype),
        vq4.mean_part(down, intermediate, dtype),
    )

    def run(e: int, tokens: Tensor) -> Tensor:
        rows = _project(gate_up, e, x[tokens].to(dtype), up_mean, input_side=True)
        hidden = apply_gate(rows, act, gate, alpha, limit)
        return _post_norm(_project(down, e, hidden, down_mean, input_side=False), post_norm, eps)

    return _combine(x, topk_index, topk_weight, codes.shape[0], run)


def q_linear_reference(
    x: Tensor, weight: Tensor, scale: Tensor, zero: Tensor, bias: Operand, *, bits: int
) -> Tensor:
    """moecc::q_linear: F.linear(x, (q - zero) * scale) in x's dtype, rounded once after float32 accumulation.

    weight u8 [N, K*bits/8] (4 bit: even column in the low nibble); scale f16/bf16/f32 [N, K/group]; zero u8 [N, K/group].
    """
    w = dequantize_linear(weight, scale, zero, bits).to(_wide(x))
    return F.linear(x.to(w.dtype), w, None if bias is None else bias.to(w.dtype)).to(x.dtype)


def dequantize_linear(weight: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """The float32 [N, K] that a q_linear stands for (float64 where scale is)."""
    q = weight if bits == 8 else torch.stack((weight & 15, weight >> 4), -1).flatten(-2)
    groups: Tensor = q.unflatten(-1, (scale.shape[-1], -1)).to(_wide(scale))
    return (
        (groups - zero.to(groups.dtype).unsqueeze(-1)) * scale.to(groups.dtype).unsqueeze(-1)
    ).flatten(-2)


def expert_linear_reference(x: Tensor, topk_index: Tensor, weight: Tensor) -> Tensor:
    """moecc::expert_linear: y[t, k] = weight[topk_index[t, k]] x[t] (or x[t, k]). x [T, D] | [T, k, D] -> [T, k, N]."""
    tokens, k = topk_index.shape
    rows = (x.unsqueeze(1).expand(-1, k, -1) if x.dim() == 2 else x).reshape(
        tokens * k, x.shape[-1]
    )
    order, counts = _by_expert(topk_index, weight.shape[0])
    parts = [F.linear(rows[slots], w) for slots, w in zip(order.split(counts), weight, strict=True)]
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel(), device=order.device)
    return torch.cat(parts)[inverse].view(tokens, k, weight.shape[1])


def same_shape(
    x: Tensor, topk_index: Tensor, topk_weight: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    torch._check(x.dim() == 2 and topk_index.dim() == 2 and topk_weight.dim() == 2)
    torch._check(topk_index.size(0) == x.size(0))
    return x.new_empty(x.shape)


_OPERANDS = (*vq4.TENSORS, "slope", "offset")  # of one projection of vq_experts


def operands_of(projection: str, names: Sequence[str]) -> str:
    """Schema text of one projection's tensors."""
    required = {"codes", "codebook", "scale"}
    return ", ".join(f"{'Tensor' if t in required else 'Tensor?'} {projection}_{t}" for t in names)


ROUTED = "Tensor x, Tensor topk_index, Tensor topk_weight"
define("experts", f"{ROUTED}, Tensor gate_up, Tensor down, Tensor? gate_up_bias, Tensor? down_bias, Tensor? post_norm",
       ATTRIBUTES, experts_reference, same_shape)  # fmt: skip
define("klt_experts", f"{ROUTED}, Tensor gate_up, Tensor down, {operands_of('gate_up', vq4.SHARED)}, "
       f"{operands_of('down', vq4.SHARED)}, Tensor? gate_up_bias, Tensor? down_bias, Tensor? post_norm",
       ATTRIBUTES, klt_experts_reference, same_shape)  # fmt: skip
define("vq_experts", f"{ROUTED}, {operands_of('gate_up', _OPERANDS)}, {operands_of('down', _OPERANDS)}, Tensor? post_norm",
       ATTRIBUTES, vq_experts_reference, same_shape)  # fmt: skip
define("q_linear", "Tensor x, Tensor weight, Tensor scale, Tensor zero, Tensor? bias", "int bits", q_linear_reference,
       lambda x, weight, scale, zero, bias, *, bits: x.new_empty((*x.shape[:-1], weight.shape[0])))  # fmt: skip
define("expert_linear", "Tensor x, Tensor topk_index, Tensor weight", "", expert_linear_reference,
       lambda x, topk_index, weight: x.new_empty((*topk_index.shape, weight.shape[1])))  # fmt: skip

EXPERTS = torch.ops.moecc.experts.default
KLT_EXPERTS = torch.ops.moecc.klt_experts.default
VQ_EXPERTS = torch.ops.moecc.vq_experts.default
Q_LINEAR = torch.ops.moecc.q_linear.default
MOE_OPS = frozenset({EXPERTS, KLT_EXPERTS, VQ_EXPERTS})
# What to call under autograd when nobody needs the op itself: its own backward would run the reference a second time.
REFERENCE = {
    EXPERTS: experts_reference,
    KLT_EXPERTS: klt_experts_reference,
    VQ_EXPERTS: vq_experts_reference,
}
