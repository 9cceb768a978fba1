"""The cost of a weight error D [E, N, K]: tr(S D H D^T), H the second moments of the input, S the costs of output errors."""

from __future__ import annotations

import torch
from torch import Tensor

AT_ONCE = 1 << 26  # numbers of one kind in memory where experts are worked on in turn
OUTPUT_DAMPING = 0.2  # share of the mean cost of an output error that every direction has at least: 0.1 to 0.2 was best


def damped(moment: Tensor, share: float = 0.01) -> Tensor:
    """Second moments [E, K, K] with `share` of their mean diagonal added, so that they can be inverted; zero ones become 1."""
    mean = moment.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    return moment + torch.eye(moment.shape[-1], device=moment.device) * torch.where(
        mean > 0, share * mean, 1.0
    )


def weighted_error(error: Tensor, moment: Tensor, output: Tensor | None = None) -> Tensor:
    """tr(S D H D^T) per expert, S all alike where `output` is None: [E, N, K], [E, K, K], [E, N, N] -> [E]."""
    return (weighted(error, moment, output) * error).sum((-2, -1))


def weighted(error: Tensor, moment: Tensor, output: Tensor | None) -> Tensor:
    right = error @ moment
    return right if output is None else output @ right


def feedback_factor(metric: Tensor) -> Tensor:
    """U with metric^-1 = U^T U: what is left of an error, and how it is carried over, read off its rows."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(metric))
    upper: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return upper


def pivots(metric: Tensor, share: float = 0.01) -> Tensor:
    """What is left of an error's cost where all later ones make up for it, the costly first: [E, K, K], damped -> [E, K]."""
    if len(metric) > 1 and metric.stride(0) == 0:  # one for all
        return pivots(metric[:1], share).expand(len(metric), -1)
    few = max(1, AT_ONCE // metric[0].numel())
    return torch.cat([_pivots(damped(part, share)) for part in metric.split(few)])


def _pivots(metric: Tensor) -> Tensor:
    order = metric.diagonal(dim1=-2, dim2=-1).argsort(dim=-1, descending=True, stable=True)
    rows = metric.gather(1, order.unsqueeze(-1).expand_as(metric))
    permuted = rows.gather(2, order.unsqueeze(1).expand_as(metric))
    left = feedback_factor(permuted).diagonal(dim1=-2, dim2=-1).square().reciprocal()
    return torch.empty_like(left).scatter_(1, order, left)
