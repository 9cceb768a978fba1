"""The eager references that define the ops of the moecc dialect (`moecc.ir.ops`).

Shapes: T tokens, k experts per token, E experts, D hidden, F intermediate, N = 2F (F without a
gate), r basis rows.
  x [T, D]; topk_index i64 [T, k]; topk_weight [T, k]; gate_up [E, N, D]; down [E, D, F];
  result [T, D] in x's dtype
  post_norm [D]         weight of a root-mean-square norm on each expert's output before the sum
                        (muse_spark); eps is its epsilon
  slope, offset [E, N]  the affine correction before it is folded: vq output * slope + offset
An index outside 0..E-1 raises IndexError.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from moecc.ir import vq4
from moecc.ir.gates import apply_gate, rows_per_unit
from moecc.ir.register import Operand

# the tensors of one projection of vq_experts, in the order of the operands
VQ_OPERANDS = (*vq4.TENSORS, "slope", "offset")


def by_expert(topk_index: Tensor, experts: int) -> tuple[Tensor, list[int]]:
    """Sort the slots t * k + j by expert; return them and the number of slots of each expert.

    Raise IndexError for an index outside 0..E-1.
    """
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
    """Return sum_k topk_weight[t, k] * run(topk_index[t, k], t), [T, D].

    run(e, tokens): expert e's output for these rows of x. Each chosen expert runs once.
    """
    tokens, k = topk_index.shape
    order, counts = by_expert(topk_index, experts)
    weight = topk_weight.reshape(-1)
    parts, start = [], 0
    for e, count in enumerate(counts):
        if count:
            slots = order[start : start + count]
            parts.append(run(e, slots // k) * weight[slots, None])
            start += count
    if not parts:
        return x.new_zeros(x.shape)
    return torch.cat(parts)[inverse(order)].view(tokens, k, -1).sum(1).to(x.dtype)


def repeats(index: Tensor) -> bool:
    """Return whether a token has the same expert twice: index [T, k]."""
    return bool((index.sort(-1).values.diff(dim=-1) == 0).any())


def add_slots(total: Tensor, slots: Tensor, y: Tensor, k: int, *, twice: bool) -> None:
    """Add the rows y [n, D] of an expert's slots t * k + j to those of their tokens, [T, D].

    twice: whether there may be two slots of one token. They are added one after the other, because
    a GPU adds in any order.
    """
    for part in (slots % k == j for j in range(k)) if twice else [slice(None)]:
        total.index_add_(0, slots[part] // k, y[part])


def inverse(order: Tensor) -> Tensor:
    """Return the inverse of a permutation."""
    found = torch.empty_like(order)
    found[order] = torch.arange(order.numel(), device=order.device)
    return found


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def norm_output(y: Tensor, weight: Operand, eps: float) -> Tensor:
    """Normalise an expert's output [n, D] by its root mean square, scaled by `weight`, if any."""
    if weight is None:
        return y
    wide = _wide(y)
    # muse_spark's order: scale, round, normalise
    scaled = (y.to(wide) * weight.to(wide)).to(y.dtype).to(wide)
    return (scaled * torch.rsqrt(scaled.pow(2).mean(-1, keepdim=True) + eps)).to(y.dtype)


def _of_expert(bias: Operand, e: int) -> Operand:
    return None if bias is None else bias[e]


def experts_reference(
    x: Tensor,
    topk_index: Tensor,
    topk_weight: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Operand,
    down_bias: Operand,
    post_norm: Operand,
    *,
    act: str,
    gate: str,
    alpha: float,
    limit: float,
    eps: float,
) -> Tensor:
    """moecc::experts: y_t = sum_k w_tk norm(down_e gate(gate_up_e x_t + b_e) + c_e).

    Computed in the weights' dtype.
    """

    def run(e: int, tokens: Tensor) -> Tensor:
        rows = F.linear(x[tokens].to(gate_up.dtype), gate_up[e], _of_expert(gate_up_bias, e))
        hidden = apply_gate(rows, act, gate, alpha, limit)
        y = F.linear(hidden, down[e], _of_expert(down_bias, e))
        return norm_output(y, post_norm, eps)

    return _combine(x, topk_index, topk_weight, gate_up.shape[0], run)


def klt_experts_reference(
    x: Tensor,
    topk_index: Tensor,
    topk_weight: Tensor,
    gate_up: Tensor,
    down: Tensor,
    *operands: Operand,
    act: str,
    gate: str,
    alpha: float,
    limit: float,
    eps: float,
) -> Tensor:
    """moecc::klt_experts: `experts` on weights that are a dense remainder plus the shared part.

    operands: `vq4.SHARED` of gate_up and of down, then gate_up_bias, down_bias, post_norm. Computed
    in float32.
    """
    dtype, count = _wide(x), len(vq4.SHARED)
    gate_up_bias, down_bias, post_norm = operands[2 * count :]
    shared, means = {}, {}
    for i, (name, dense) in enumerate((("gate_up", gate_up), ("down", down))):
        shared[name] = dict(zip(vq4.SHARED, operands[i * count : (i + 1) * count], strict=True))
        means[name] = vq4.mean_part(shared[name], dense.shape[-1], dtype)

    def weight(name: str, dense: Tensor, e: int) -> Tensor:
        w, mean = dense[e].to(dtype), means[name]
        basis, coef, coef_scale = (shared[name][t] for t in ("basis", "coef", "coef_scale"))
        if basis is not None and coef is not None and coef_scale is not None:
            one, input_side = slice(e, e + 1), name == "gate_up"
            low = vq4.basis_part(coef[one], coef_scale[one], basis, dtype, input_side=input_side)
            w = w + low[0]
        return w if mean is None else w + mean[0]

    def bias(operand: Operand, e: int) -> Operand:
        return None if operand is None else operand[e].to(dtype)

    def run(e: int, tokens: Tensor) -> Tensor:
        up = weight("gate_up", gate_up, e)
        hidden = apply_gate(
            F.linear(x[tokens].to(dtype), up, bias(gate_up_bias, e)), act, gate, alpha, limit
        )
        y = F.linear(hidden, weight("down", down, e), bias(down_bias, e))
        return norm_output(y, post_norm, eps)

    return _combine(x, topk_index, topk_weight, gate_up.shape[0], run)


def vq_experts_reference(
    x: Tensor,
    topk_index: Tensor,
    topk_weight: Tensor,
    *operands: Operand,
    act: str,
    gate: str,
    alpha: float,
    limit: float,
    eps: float,
) -> Tensor:
    """moecc::vq_experts: `experts` on the tensors of `moecc.ir.vq4`, computed in float32.

    operands: VQ_OPERANDS of gate_up and of down, then post_norm.
    """
    count = len(VQ_OPERANDS)
    gate_up, down = (
        dict(zip(VQ_OPERANDS, operands[i : i + count], strict=True)) for i in (0, count)
    )
    codes, post_norm = gate_up["codes"], operands[2 * count]
    assert codes is not None
    experts, rows_out = codes.shape[:2]
    dtype = _wide(x)
    up_mean = vq4.mean_part(gate_up, x.shape[1], dtype)
    down_mean = vq4.mean_part(down, rows_out // rows_per_unit(gate), dtype)

    def run(e: int, tokens: Tensor) -> Tensor:
        rows = _project(gate_up, e, x[tokens].to(dtype), up_mean, input_side=True)
        hidden = apply_gate(rows, act, gate, alpha, limit)
        return norm_output(_project(down, e, hidden, down_mean, input_side=False), post_norm, eps)

    return _combine(x, topk_index, topk_weight, experts, run)


def _project(
    p: dict[str, Operand], e: int, x: Tensor, mean: Tensor | None, *, input_side: bool
) -> Tensor:
    """Return one expert's projection of x [n, K], [n, N], as `moecc.ir.vq4` defines it.

    p: by names of VQ_OPERANDS; slope and offset act on the VQ part. mean: the [1, N, K] that all
    experts share.
    """
    codes, signs, codebook, scale = (p[name] for name in vq4.CODED)
    assert codes is not None and codebook is not None and scale is not None
    one = slice(e, e + 1)
    table = codebook[one] if codebook.shape[0] > 1 else codebook
    own_signs = None if signs is None else signs[one]
    weight = vq4.decode(codes[one], own_signs, table, x.shape[-1], x.dtype)[0]
    factor = scale[e].to(x.dtype)
    if (slope := p["slope"]) is not None:
        factor = factor * slope[e].to(x.dtype)
    if mean is None:
        y = F.linear(x, weight) * factor
    else:  # one product, not two: on a CPU x is many tokens, and adding two matrices is cheap
        y = F.linear(x, weight * factor.unsqueeze(-1) + mean[0])
    basis, coef, coef_scale = p["basis"], p["coef"], p["coef_scale"]
    if basis is not None and coef is not None and coef_scale is not None:
        low = coef[e].to(x.dtype) * coef_scale[e].to(x.dtype).unsqueeze(-1)
        b = basis.to(x.dtype)
        y = y + (F.linear(F.linear(x, b), low) if input_side else F.linear(x, low) @ b)
    for shift in (p["bias"], p["offset"]):
        if shift is not None:
            y = y + shift[e].to(x.dtype)
    return y


def q_linear_reference(
    x: Tensor, weight: Tensor, scale: Tensor, zero: Tensor, bias: Operand, *, bits: int
) -> Tensor:
    """moecc::q_linear: F.linear(x, (q - zero) * scale), in x's dtype.

    Accumulated in float32 and rounded once. weight: u8 [N, K*bits/8] (at 4 bits the even column is
    in the low nibble). scale: f16/bf16/f32 [N, K/group]. zero: u8 [N, K/group].
    """
    w = dequantize_linear(weight, scale, zero, bits).to(_wide(x))
    return F.linear(x.to(w.dtype), w, None if bias is None else bias.to(w.dtype)).to(x.dtype)


def dequantize_linear(weight: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Return the dense [N, K] of a q_linear, in float32 (float64 if scale is)."""
    q = weight if bits == 8 else torch.stack((weight & 15, weight >> 4), -1).flatten(-2)
    groups: Tensor = q.unflatten(-1, (scale.shape[-1], -1)).to(_wide(scale))
    shifted = groups - zero.to(groups.dtype).unsqueeze(-1)
    return (shifted * scale.to(groups.dtype).unsqueeze(-1)).flatten(-2)


def expert_linear_reference(x: Tensor, topk_index: Tensor, weight: Tensor) -> Tensor:
    """moecc::expert_linear: y[t, k] = weight[topk_index[t, k]] x[t] (or x[t, k]).

    x: [T, D] or [T, k, D]. weight: [E, N, D]. Result: [T, k, N].
    """
    tokens, k = topk_index.shape
    each = x.unsqueeze(1).expand(-1, k, -1) if x.dim() == 2 else x
    rows = each.reshape(tokens * k, x.shape[-1])
    order, counts = by_expert(topk_index, weight.shape[0])
    parts = [F.linear(rows[slots], w) for slots, w in zip(order.split(counts), weight, strict=True)]
    return torch.cat(parts)[inverse(order)].view(tokens, k, weight.shape[1])
