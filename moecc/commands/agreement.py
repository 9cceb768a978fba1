"""The sums that `moecc eval` keeps while two programs run, and how their chosen experts compare.

Shapes: B rows of S tokens, V vocabulary, T = B S tokens at an experts node, k experts per token,
D hidden. All sums are kept in float64.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from moecc.ir.relative import relative

_PROBABILITIES_AT_ONCE = 1 << 24  # log-probabilities of one program that are held together


@dataclass(frozen=True)
class LayerAgreement:
    """One MoE layer.

    agreement: share of the top-k experts that both programs chose. exact_agreement: share of tokens
    with the same set. output_error: squared error of the experts' output relative to the squared
    norm of the reference's.
    """

    path: str
    agreement: float
    exact_agreement: float
    output_error: float


@dataclass
class LayerSums:
    """Sums over the tokens of one MoE layer."""

    path: str
    slots: int = 0
    tokens: int = 0
    same: int = 0
    exact: int = 0
    error: float = 0.0
    norm: float = 0.0

    def add(self, ours: list[tuple[Tensor, Tensor]], theirs: list[tuple[Tensor, Tensor]]) -> None:
        """Add batches of (chosen experts i64 [T, k], output [T, D]) of both programs."""
        for (index, y), (reference_index, reference_y) in zip(ours, theirs, strict=True):
            same, exact = compare_sets(index, reference_index)
            self.slots, self.tokens = self.slots + index.numel(), self.tokens + len(index)
            self.same, self.exact = self.same + same, self.exact + exact
            self.error += float((y.float() - reference_y.float()).square().sum(dtype=torch.float64))
            self.norm += float(reference_y.float().square().sum(dtype=torch.float64))

    def layer(self) -> LayerAgreement:
        """Return the sums as shares."""
        error = float(relative(self.error, self.norm))
        return LayerAgreement(self.path, self.same / self.slots, self.exact / self.tokens, error)


def compare_sets(a: Tensor, b: Tensor) -> tuple[int, int]:
    """Compare chosen experts a, b i64 [T, k]; a slot of -1 chose none.

    Return the number of entries of `a` that are in the same row of `b`, and the number of rows that
    are the same set. A slot without an expert equals such a slot of the other. Sorting and
    searching cost k log k per token; comparing pairs would cost k^2.
    """
    a, b = _sorted(a), _sorted(b)
    at = torch.searchsorted(b, a).clamp(max=b.shape[1] - 1)
    return int((b.gather(1, at) == a).sum()), int((a == b).all(1).sum())


def _sorted(chosen: Tensor) -> Tensor:
    """Sort each row. Slots of -1 come first and get distinct numbers: -k, -k + 1, ..."""
    chosen, k = chosen.sort(1).values, chosen.shape[1]
    return torch.where(chosen < 0, torch.arange(-k, 0, device=chosen.device), chosen).contiguous()


def _zero() -> Tensor:
    return torch.zeros((), dtype=torch.float64)


@dataclass
class Totals:
    """Sums over predicted tokens, in nats: both negative log-likelihoods, KL(reference || ours)."""

    tokens: int = 0
    nll: Tensor = field(default_factory=_zero)
    reference_nll: Tensor = field(default_factory=_zero)
    kl: Tensor = field(default_factory=_zero)

    def add(self, logits: Tensor, reference: Tensor, ids: Tensor) -> None:
        """Add logits and reference [B, S, V] in any float dtype for the token ids i64 [B, S].

        The last token of a row predicts nothing.
        """
        step = max(1, _PROBABILITIES_AT_ONCE // logits.shape[-1])
        for row, (ours, theirs) in enumerate(zip(logits, reference, strict=True)):
            targets = ids[row, 1:].to(logits.device)
            for i in range(0, len(targets), step):
                chunk = slice(i, min(i + step, len(targets)))
                self._add(ours[chunk].float(), theirs[chunk].float(), targets[chunk])
        self.tokens += ids[:, 1:].numel()

    def _add(self, logits: Tensor, reference: Tensor, targets: Tensor) -> None:
        q, p = logits.log_softmax(-1), reference.log_softmax(-1)
        self.nll -= _total(q.gather(1, targets[:, None]))
        self.reference_nll -= _total(p.gather(1, targets[:, None]))
        # a masked token (logit -inf in both) has p = 0 and adds nothing; 0 * (inf - inf) is NaN
        kl = torch.where(p == -torch.inf, 0.0, p.exp() * (p - q))
        self.kl += _total(kl)


def _total(values: Tensor) -> Tensor:
    """Return the sum in memory, from whatever device."""
    return values.sum(dtype=torch.float64).cpu()
