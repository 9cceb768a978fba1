"""The cost of a weight error D [E, N, K]: tr(S D H D^T).

H [E, K, K] are the second moments of the input, S the costs of output errors. S is block-diagonal:
[E, b, N/b, N/b]. The first of b blocks has the rows 0, b, 2b, .., the next 1, b + 1, ..: of gate_up
the gate and the up row of a hidden unit are in the same block.
"""

from __future__ import annotations

import torch
from torch import Tensor

AT_ONCE = 1 << 26  # numbers of one kind in memory if experts are worked on in turn
# Least cost of an output error in any direction, as a share of the mean: 0.1 to 0.2 was best.
OUTPUT_DAMPING = 0.2
_LEAST = 1e-30


def damped(moment: Tensor, share: float = 0.01) -> Tensor:
    """Add `share` of the mean diagonal to second moments [E, K, K], so that they can be inverted.

    Zero ones become the identity; so do those that are so small that products of them are zero.
    Blocks [E, b, B, B] of an expert are one matrix.
    """
    added = damping(moment.diagonal(dim1=-2, dim2=-1).flatten(1), share)
    added = added.view(-1, *[1] * (moment.dim() - 1))
    return moment + torch.eye(moment.shape[-1], device=moment.device) * added


def damping(diagonal: Tensor, share: float = 0.01) -> Tensor:
    """What `damped` adds to the diagonal [E, K] of second moments, [E, 1]."""
    mean = diagonal.mean(-1, keepdim=True)
    return torch.where(mean > _LEAST, share * mean, 1.0)


def weighted_error(error: Tensor, moment: Tensor, output: Tensor | None = None) -> Tensor:
    """tr(S D H D^T) per expert: [E, N, K], [E, K, K], S -> [E]. S = 1 without `output`."""
    return (weighted(error, moment, output) * error).sum((-2, -1))


def weighted(error: Tensor, moment: Tensor, output: Tensor | None) -> Tensor:
    """S D H, [E, N, K]."""
    return costly(error @ moment, output)


def costly(rows: Tensor, output: Tensor | None) -> Tensor:
    """S times rows [.., N, K]; the rows themselves if S is the identity."""
    return rows if output is None else together(output @ apart(rows, output.shape[-3]))


def apart(rows: Tensor, blocks: int) -> Tensor:
    """The rows of each block: [.., N, K] -> [.., b, N/b, K]."""
    found: Tensor = rows.unflatten(-2, (-1, blocks)).transpose(-3, -2)
    return found


def together(blocks: Tensor) -> Tensor:
    """The inverse of `apart`: [.., b, N/b, K] -> [.., N, K]."""
    return blocks.transpose(-3, -2).flatten(-3, -2)


def woven(values: Tensor) -> Tensor:
    """A number of each row, from those of the blocks: [.., b, N/b] -> [.., N]."""
    return values.mT.flatten(-2)


def diagonal(output: Tensor) -> Tensor:
    """The cost of each row, [.., N]."""
    return woven(output.diagonal(dim1=-2, dim2=-1))


def feedback_factor(metric: Tensor) -> Tensor:
    """The upper triangular U with metric^-1 = U^T U, [E, K, K].

    Its rows say how an error is carried over to later columns, and what is left of it.
    """
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(metric))
    upper: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return upper.contiguous()  # LAPACK's has its columns in a row


def pivots(metric: Tensor, share: float = 0.01) -> Tensor:
    """What is left of an error's cost if all later columns make up for it, the costly first.

    [E, K, K], damped by `share` here -> [E, K]; or blocks [E, b, B, B] -> [E, b, B].
    """
    if len(metric) > 1 and metric.stride(0) == 0:  # a view of one matrix that all experts share
        return pivots(metric[:1], share).expand(metric.shape[:-1])
    few = max(1, AT_ONCE // metric[0].numel())
    return torch.cat([_pivots(damped(part, share)) for part in metric.split(few)])


def _pivots(metric: Tensor) -> Tensor:
    order = metric.diagonal(dim1=-2, dim2=-1).argsort(dim=-1, descending=True, stable=True)
    rows = metric.gather(-2, order.unsqueeze(-1).expand_as(metric))
    permuted = rows.gather(-1, order.unsqueeze(-2).expand_as(metric))
    left = feedback_factor(permuted).diagonal(dim1=-2, dim2=-1).square().reciprocal()
    return torch.empty_like(left).scatter_(-1, order, left)
