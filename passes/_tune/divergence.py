"""KL(teacher || student) of the next token, on logits as wide as a vocabulary.

Autograd would keep half a dozen matrices of that width. Here the gradient is taken along with the
value, some tokens at a time, so that only both logits and the gradient are in memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moecc.passes._tune.function import Context, applied

OF_LOGITS = 4  # copies of a batch's logits: both models', and two gradients
_AT_ONCE = 1 << 18  # logits that are worked on together


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over tokens, in nats; logits [T, V] of both. Differentiable in the student's."""
    return applied(_Divergence, student, teacher)


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, student: Tensor, teacher: Tensor) -> Tensor:
        tokens, width = student.shape
        grad = torch.empty_like(student) if ctx.needs_input_grad[0] else None
        parts = []
        for start in range(0, tokens, max(1, _AT_ONCE // width)):
            some = slice(start, start + max(1, _AT_ONCE // width))
            s, t = student[some].log_softmax(-1), teacher[some].log_softmax(-1)
            p = t.exp()
            parts.append((p * t.sub_(s)).sum())
            if grad is not None:
                torch.sub(s.exp_(), p, out=grad[some])
        if grad is not None:
            ctx.save_for_backward(grad.div_(tokens))
        return torch.stack(parts).sum() / tokens

    @staticmethod
    def backward(ctx: Context, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = ctx.saved_tensors
        return grad * grads[0], None
