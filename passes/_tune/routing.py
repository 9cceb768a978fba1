"""Losses that compare two routers token by token.  VSRAQ, arXiv 2606.05688.

Scores are the values that the top-k compares: router logits, or those with a family's bias or
groups applied. Shapes: T tokens, E experts, k chosen; s student, t teacher, both [T, E], in units
of the teacher's standard deviation.

  value     mean_e q_e (s_e - t_e)^2. The sensitivity q_e is p_e (1 - p_e) of the teacher's softmax,
            which is how much the routing weight follows the logit, plus the nearness of e to the
            boundary, exp(-|t_e - b|), b midway between ranks k and k + 1.
  order     relu(min(t_i - t_i+1, margin) - (s_i - s_i+1))^2 over the teacher's first k ranks.
  boundary  the same over all pairs of a chosen and a rejected expert.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from moecc.ir.graph import ancestors
from moecc.ir.moe import MoE

_MASKED = 1e30  # a score as large as this masks its expert
MARGIN = 0.5  # standard deviations: a gap wider than this is not defended further


def standardized(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both [T, E] divided by the teacher's standard deviation over tokens and experts.

    A masked score (infinite, or so large that it can only be meant as that) becomes a low one.
    """
    finite = teacher.abs() < _MASKED
    spread = teacher[finite].std().clamp(min=1e-6)
    low = (teacher[finite].min() - spread) / spread
    s, t = (torch.where(z.abs() < _MASKED, z / spread, low) for z in (student, teacher))
    return s, t


def value_loss(s: Tensor, t: Tensor, top_k: int) -> Tensor:
    """Sensitivity-weighted squared difference of scores."""
    p = t.softmax(-1)
    sensitivity = p * (1 - p) + boundary_nearness(t, top_k)
    sensitivity = sensitivity / sensitivity.sum(-1, keepdim=True)
    return (sensitivity * (s - t).square()).sum(-1).mean()


def boundary_nearness(t: Tensor, top_k: int, sharpness: float = 1.0) -> Tensor:
    """exp(-sharpness |t_e - b|) for every score, [T, E]."""
    ranked = t.sort(-1, descending=True).values
    boundary = ranked[:, top_k - 1 : top_k + 1].mean(-1, keepdim=True)
    return torch.exp(-sharpness * (t - boundary).abs())


def order_loss(s: Tensor, t: Tensor, top_k: int) -> Tensor:
    """Neighbours among the teacher's first k experts that came closer or changed places."""
    if top_k < 2:
        return s.new_zeros(())
    s, t = _ranked(s, t, top_k)
    gap = (t[:, : top_k - 1] - t[:, 1:top_k]).clamp(max=MARGIN)
    return (gap - (s[:, : top_k - 1] - s[:, 1:top_k])).relu().square().sum(-1).mean()


def boundary_loss(s: Tensor, t: Tensor, top_k: int) -> Tensor:
    """Pairs of a chosen and a rejected expert whose gap fell under the teacher's or the margin."""
    s, t = _ranked(s, t, t.shape[-1])
    gap = (t[:, :top_k, None] - t[:, None, top_k:]).clamp(max=MARGIN)
    return (gap - (s[:, :top_k, None] - s[:, None, top_k:])).relu().square().sum((1, 2)).mean()


def _ranked(s: Tensor, t: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Both sorted by the teacher, its first `count` experts."""
    order = t.argsort(-1, descending=True)[:, :count]
    return s.gather(1, order), t.gather(1, order)


def flips(s: Tensor, t: Tensor, top_k: int) -> Tensor:
    """Share of the teacher's chosen experts that the student does not choose."""
    chosen = [z.topk(top_k, -1).indices for z in (s, t)]
    return 1 - (chosen[0].unsqueeze(-1) == chosen[1].unsqueeze(-2)).any(-1).float().mean()


def selection_scores(moe: MoE) -> fx.Node:
    """The values that the last top-k before the experts compares.

    The logits if that is a softmax of them: it keeps their order, and logits are easier to train.
    """
    assert moe.logits is not None and isinstance(moe.node.args[1], fx.Node)
    between = ancestors([moe.node.args[1]]) - ancestors([moe.logits])
    topk = [n for n in moe.node.graph.nodes if n in between and "topk" in str(n.target)]
    if not topk:
        return moe.logits
    scores = topk[-1].args[0]
    assert isinstance(scores, fx.Node)
    return moe.logits if scores is moe.logits or _only_softmax(scores, moe.logits) else scores


def _only_softmax(node: fx.Node, logits: fx.Node) -> bool:
    steps = [str(n.target) for n in ancestors([node]) - ancestors([logits])]
    return all(
        any(word in s for word in ("softmax", "to.dtype", "_to_copy", "view", "reshape"))
        for s in steps
    )
