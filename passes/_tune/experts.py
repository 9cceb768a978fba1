"""Compressed experts as a function that is quick to differentiate in what tuning moves.

It computes what `moecc.ir.reference.vq_experts_reference` defines, arranged otherwise:
  1. Sort the slots (a token and one of its experts) by expert once. All experts' rows are one
     matrix, so that whatever is no product runs once for all of them.
  2. What experts share, the mean and the basis, multiplies each token once, not each slot.
  3. A coded matrix is decoded to one buffer, used and dropped. In the backward it is decoded again
     if the gradient of its input is wanted. The gradient of the matrix goes into another buffer and
     from there to the codebook and the scales (`lookup`).

Memory: the rows of all slots, and two buffers of one expert's projection.
Shapes: T tokens, k experts of each, S = T k slots, sorted by expert; E experts; [N, K] a matrix.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from moecc.ir import vq4
from moecc.ir.gates import apply_gate
from moecc.ir.ops import VQ_EXPERTS
from moecc.ir.program import Program
from moecc.ir.reference import VQ_OPERANDS, by_expert, inverse, norm_output
from moecc.ir.register import Operand
from moecc.passes._tune.divergence import OF_LOGITS
from moecc.passes._tune.function import Context, applied
from moecc.passes._tune.lookup import CodedMatrix
from moecc.pipeline.work import Scope

_COPIES = 4  # of the rows of slots, with their gradients


def graph_bytes(scope: Scope, tokens: int, *, head: bool) -> int:
    """Bytes for one layer with its graph: the weights that are read, and values of `tokens`.

    head: of their logits too.
    """
    slots = max((x.top_k * (x.hidden + x.rows) for x in scope.layers), default=0)
    logits = OF_LOGITS * scope.outputs * head
    return 4 * (tokens * (_COPIES * slots + logits) + scope.largest + 3 * scope.expert)


def tunable(program: Program) -> Program:
    """Return the program with `coded_experts` in place of the op."""
    copy = program.copy()
    for node in copy.graph.nodes:
        if node.target is VQ_EXPERTS:
            node.target = coded_experts
    return copy


def coded_experts(
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
    """What moecc::vq_experts gives, [T, D]; takes what it takes."""
    count = len(VQ_OPERANDS)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    up, down = (_Projection.of(operands[i : i + count], dtype) for i in (0, count))
    post_norm = operands[2 * count]
    slots = _Slots.of(topk_index, len(up.each.codes))
    given = x.to(dtype)
    rows = up.each.product(slots.spread(given), slots.counts)
    if up.mean is not None:
        rows = rows + slots.spread(up.mean.product(given, [len(given)]))
    if up.basis is not None:
        rows = rows + up.in_basis(slots.spread(given @ up.basis.T), slots.counts)
    hidden = apply_gate(rows, act, gate, alpha, limit)
    weight = topk_weight.reshape(-1, 1)[slots.order]

    def placed(value: Tensor) -> Tensor:
        """Rows of slots, or already those of tokens, if no norm stands in between."""
        return value if post_norm is not None else slots.summed(value * weight)

    y = placed(down.each.product(hidden, slots.counts))
    if down.mean is not None:
        summed = placed(hidden)
        y = y + down.mean.product(summed, [len(summed)])
    if down.basis is not None:
        y = y + placed(down.in_basis(hidden, slots.counts)) @ down.basis
    if post_norm is not None:
        y = slots.summed(norm_output(y, post_norm, eps) * weight)
    return y.to(x.dtype)


@dataclass(frozen=True)
class _Coded:
    """Coded matrices of E experts, or one that they share."""

    codes: Tensor  # u8 [E, N, Kp/v]
    signs: Operand  # u8 [E, N, Kp/8]
    book: Tensor  # [E or 1, 256, v]
    scale: Tensor  # [E, N]
    bias: Operand = None  # [E, N]

    def __getitem__(self, e: int) -> CodedMatrix:
        signs = None if self.signs is None else self.signs[e]
        book = self.book[e if len(self.book) > 1 else 0]
        return CodedMatrix(self.codes[e], signs, book, self.scale[e])

    def product(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        """Multiply `counts` of the rows x [S, K] by each matrix in turn; return [S, N]."""
        stored = (self.codes, self.signs, self.book, self.scale, self.bias)
        return applied(_Product, x, *stored, counts)


@dataclass(frozen=True)
class _Projection:
    """The tensors of one projection, in the type to compute in."""

    each: _Coded
    mean: _Coded | None
    basis: Operand  # [r, D]
    coef: Operand  # [E, N, r] or [E, r, K]

    @classmethod
    def of(cls, operands: Sequence[Operand], dtype: torch.dtype) -> _Projection:
        """operands: VQ_OPERANDS. Slope and offset act on the coded part."""
        whole = ("codes", "signs", "mean_codes", "mean_signs")
        p = {
            name: t if t is None or name in whole else t.to(dtype)
            for name, t in zip(VQ_OPERANDS, operands, strict=True)
        }
        scale, slope, shifts = p["scale"], p["slope"], (p["bias"], p["offset"])
        codes, signs, book, mean_scale = (p[vq4.MEAN + name] for name in vq4.CODED)
        mean = None
        if codes is not None and book is not None and mean_scale is not None:
            mean = _Coded(codes, signs, book, mean_scale)
        codes, signs, book = (p[name] for name in vq4.CODED[:3])
        assert codes is not None and book is not None and scale is not None
        shift = [t for t in shifts if t is not None]
        bias = shift[0] + shift[1] if len(shift) == 2 else next(iter(shift), None)
        each = _Coded(codes, signs, book, scale if slope is None else scale * slope, bias)
        coef, coef_scale = p["coef"], p["coef_scale"]
        if coef is not None and coef_scale is not None:
            coef = coef * coef_scale.unsqueeze(-1)
        return cls(each, mean, p["basis"], coef)

    def in_basis(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        """Multiply rows by their experts' coefficients."""
        assert self.coef is not None
        parts = zip(x.split(list(counts)), self.coef.unbind(0), strict=True)
        return torch.cat([F.linear(part, c) for part, c in parts])


@dataclass(frozen=True)
class _Slots:
    """The slots sorted by expert."""

    order: Tensor  # their places among the T k
    token: Tensor  # their tokens
    inverse: Tensor
    shape: tuple[int, int]  # T, k
    counts: list[int]  # of each expert

    @classmethod
    def of(cls, topk_index: Tensor, experts: int) -> _Slots:
        order, counts = by_expert(topk_index, experts)
        tokens, k = topk_index.shape
        return cls(order, order // k, inverse(order), (tokens, k), counts)

    def spread(self, x: Tensor) -> Tensor:
        """The rows of tokens [T, C] at their slots [S, C]."""
        return applied(_Spread, x, self)

    def summed(self, x: Tensor) -> Tensor:
        """The rows of slots [S, C], added up over each token's, [T, C]."""
        return applied(_Summed, x, self)

    def to_slots(self, x: Tensor) -> Tensor:
        return x.index_select(0, self.token)

    def to_tokens(self, x: Tensor) -> Tensor:
        each: Tensor = x.index_select(0, self.inverse).unflatten(0, self.shape)
        return each.sum(1)


class _Context(Context, Protocol):
    slots: _Slots
    counts: Sequence[int]


class _Spread(torch.autograd.Function):
    """Its gradient by PyTorch would be added element by element."""

    @staticmethod
    def forward(ctx: _Context, x: Tensor, slots: _Slots) -> Tensor:
        ctx.slots = slots
        return slots.to_slots(x)

    @staticmethod
    def backward(ctx: _Context, *grads: Tensor) -> tuple[Operand, ...]:
        return ctx.slots.to_tokens(grads[0]), None


class _Summed(torch.autograd.Function):
    """The transpose of `_Spread`."""

    @staticmethod
    def forward(ctx: _Context, x: Tensor, slots: _Slots) -> Tensor:
        ctx.slots = slots
        return slots.to_tokens(x)

    @staticmethod
    def backward(ctx: _Context, *grads: Tensor) -> tuple[Operand, ...]:
        return ctx.slots.to_slots(grads[0]), None


class _Product(torch.autograd.Function):
    """y = x W^T + bias, expert by expert; differentiable in all but codes and signs."""

    @staticmethod
    def forward(
        ctx: _Context,
        x: Tensor,
        codes: Tensor,
        signs: Operand,
        book: Tensor,
        scale: Tensor,
        bias: Operand,
        counts: Sequence[int],
    ) -> Tensor:
        ctx.save_for_backward(x, codes, signs, book, scale)
        ctx.counts = counts
        each = _Coded(codes, signs, book, scale)
        y, dense = x.new_empty(len(x), scale.shape[1]), _buffer(x, scale)
        for e, rows in _parts(counts):
            torch.mm(x[rows], each[e].decode(dense).T, out=y[rows])
            if bias is not None:
                y[rows] += bias[e]
        return y

    @staticmethod
    def backward(ctx: _Context, *grads: Tensor) -> tuple[Operand, ...]:
        x, codes, signs, book, scale = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        each = _Coded(codes, signs, book, scale)
        dy, dense, grad = grads[0].contiguous(), _buffer(x, scale), _buffer(x, scale)
        dx = torch.empty_like(x) if wanted[0] else None
        dbook, dscale = torch.zeros_like(book), torch.zeros_like(scale)
        dbias = torch.zeros_like(scale) if wanted[5] else None
        for e, rows in _parts(ctx.counts):
            if wanted[3] or wanted[4]:
                torch.mm(dy[rows].T, x[rows], out=grad)
                of_book, dscale[e] = each[e].pull(grad)
                dbook[e if len(book) > 1 else 0] += of_book
            if dx is not None:
                torch.mm(dy[rows], each[e].decode(dense), out=dx[rows])
            if dbias is not None:
                dbias[e] = dy[rows].sum(0)
        return dx, None, None, dbook, dscale, dbias, None


def _buffer(x: Tensor, scale: Tensor) -> Tensor:
    """Room for one matrix [N, K]."""
    return x.new_empty(scale.shape[1], x.shape[1])


def _parts(counts: Sequence[int]) -> Iterator[tuple[int, slice]]:
    """The experts that have rows, and which."""
    start = 0
    for e, count in enumerate(counts):
        if count:
            yield e, slice(start, start + count)
        start += count
