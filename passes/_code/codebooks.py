"""Codebooks of 256 centroids: k-means, rounding to whole numbers, and the nearest centroid.

Shapes: E experts, N rows, K columns, v weights per code, C codebooks: E or 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moecc.ir import vq4
from moecc.passes._code.sums import sums_by_code

_SAMPLE = 1 << 14  # groups of weights that k-means looks at, at most


def argmin(x: Tensor) -> Tensor:
    """Index of the smallest along the last dimension."""
    # numpy's argmin is vectorised: on one core it is 5 to 8 times as fast as PyTorch's
    return torch.from_numpy(x.numpy().argmin(-1)) if x.device.type == "cpu" else x.argmin(-1)


@dataclass
class Book:
    """Codebooks in the format's whole numbers."""

    integers: Tensor  # [C, 256, v], as float32
    step: Tensor  # [C, 1]: the size of one unit in normalised weights


def rounded(centroids: Tensor, bits: int) -> Book:
    """Round centroids [C, 256, v] so that the largest becomes 127."""
    step = (centroids.abs().amax((-2, -1)) / 127).clamp(min=1e-12).unsqueeze(-1)
    shift = 0.5 if bits == 3 else 0.0
    return Book(clamp_codebook((centroids / step.unsqueeze(-1)) - shift, bits), step)


def clamp_codebook(values: Tensor, bits: int) -> Tensor:
    """The nearest codebook of the format: whole numbers in 0..127 at 3 bit, else -127..127."""
    return values.round().clamp(0 if bits == 3 else -127, 127)


def kmeans(target: Tensor, importance: Tensor, *, bits: int, seed: int, turns: int) -> Tensor:
    """Weighted k-means over groups of v weights; over their magnitudes at 3 bit.

    target [E, N, K], importance [E, K] -> centroids [1, 256, v], one codebook for the layer: rows
    are normalised, so experts differ little here, and refits make the codebook an expert's own.
    """
    generator = torch.Generator().manual_seed(seed)
    places = drawn(target.numel() // vq4.group_size(bits), generator)
    return clustered(*groups(target, importance, bits, places), turns, generator)


def drawn(count: int, generator: torch.Generator) -> Tensor:
    """Which of so many groups k-means looks at; numbers are drawn on the CPU."""
    if count <= _SAMPLE:
        return torch.arange(count)
    return torch.randint(count, (_SAMPLE,), generator=generator)


def groups(target: Tensor, importance: Tensor, bits: int, places: Tensor) -> tuple[Tensor, Tensor]:
    """Groups of weights for k-means and the costs of their errors, both [n, v].

    target [E, N, K], importance [E, K], places [n] among all groups.
    """
    v = vq4.group_size(bits)
    points, cost = (x.unflatten(-1, (-1, v)) for x in (target, importance))
    rows, count = points.shape[1:3]
    places = places.to(target.device)
    found = points.reshape(-1, v)[places]
    return found.abs() if bits == 3 else found, cost[places // (rows * count), places % count]


def clustered(points: Tensor, cost: Tensor, turns: int, generator: torch.Generator) -> Tensor:
    """Centroids [1, 256, v] of points [n, v] under the costs [n, v] of their components."""
    size = vq4.CODEBOOK_SIZE
    chance = ((cost * points.square()).sum(-1) + 1e-9).cpu()
    start = torch.multinomial(chance, size, replacement=len(points) < size, generator=generator)
    centroids = points[start.to(points.device)]
    parts, masses = torch.cat([cost, -2 * cost * points], 1), torch.cat([cost * points, cost], 1)
    for _ in range(turns):
        nearest = argmin(parts @ torch.cat([centroids.square(), centroids], 1).T)
        total, mass = sums_by_code(nearest.unsqueeze(0), 1)(masses)[0].chunk(2, 1)
        centroids = torch.where(mass > 0, total / mass.clamp(min=1e-20), centroids)
        empty = torch.bincount(nearest, minlength=size) == 0
        if empty.any():
            count = (int(empty.sum()),)
            again = torch.randint(len(points), count, generator=generator).to(points.device)
            centroids[empty] = points[again]
    return centroids.unsqueeze(0)


def signs_of(v: int, like: Tensor) -> Tensor:
    """The signs that the bits of a number stand for, 1 for a 0: [2^v, v], of the type of `like`."""
    patterns = torch.arange(2**v, device=like.device).unsqueeze(-1)
    return 1.0 - 2.0 * ((patterns >> torch.arange(v, device=like.device)) & 1).to(like.dtype)


class Nearest:
    """Finds the nearest entry of a codebook under a metric.

    argmin_c |(t - c) metric|^2 for t [E, n, v], codebook [C, 256, v], metric [E, v, v]. At 3 bit
    it looks only at the c that have the signs of t + 1/2; under a diagonal metric these are enough.
    Everything that depends on codebook and metric alone is computed once, not per row.
    """

    def __init__(self, codebook: Tensor, metric: Tensor, bits: int):
        # 3 bit decodes symmetrically about -1/2: match |t + 1/2| against p + 1/2.
        self.table = (codebook + 0.5 if bits == 3 else codebook).expand(len(metric), -1, -1)
        self.metric, self.signed = metric, bits == 3
        if not self.signed:
            image = self.table @ metric
            self.image, self.norms = image.mT, image.square().sum(-1).unsqueeze(1)
            return
        # With signs s and G = M M^T, |(t - s*p) M|^2 = const - 2 (s * (t G)) . p + p^T G_s p, where
        # G_s is G with signed rows and columns. The last term depends on the sign pattern alone:
        # tabulate it for each of the 2^v patterns.
        v = metric.shape[-1]
        self.gram = metric @ metric.mT
        self.powers = torch.arange(v, device=metric.device)
        signs = signs_of(v, metric)
        signed = self.table.unsqueeze(1) * signs.unsqueeze(1)  # [E, 2^v, 256, v]
        self.norms = ((signed @ self.gram.unsqueeze(1)) * signed).sum(-1)  # [E, 2^v, 256]

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """Codes [E, n], signs [E, n, v] at 3 bit (True: negative), chosen vectors [E, n, v]."""
        if not self.signed:
            code = argmin(torch.baddbmm(self.norms, t @ self.metric, self.image, alpha=-2))
            return code, None, self._entries(code)
        t = t + 0.5
        negative = t < 0
        pattern = (negative.long() << self.powers).sum(-1)
        linear = t @ self.gram
        linear = torch.where(negative, -linear, linear)
        index = pattern.unsqueeze(-1).expand(-1, -1, self.table.shape[1])
        own = torch.gather(self.norms, 1, index)
        code = argmin(torch.baddbmm(own, linear, self.table.mT, alpha=-2))
        q = self._entries(code)
        return code, negative, torch.where(negative, -q, q) - 0.5

    def _entries(self, code: Tensor) -> Tensor:
        return torch.gather(self.table, 1, code.unsqueeze(-1).expand(-1, -1, self.table.shape[2]))


@dataclass(frozen=True)
class Tables:
    """What a compiled search needs of every group: `Nearest` of all groups at once."""

    inner: Tensor  # [E, G, v, v]
    metric: Tensor  # [E, G, v, v]
    image: Tensor  # [E, G or 1, v, 256]
    base: Tensor  # [E, G, 1 or 2^v, 256]
    table: Tensor  # [E, 256, v]

    @classmethod
    def of(cls, codebook: Tensor, metric: Tensor, bits: int) -> Tables:
        """Tables of a codebook [C, 256, v] under metrics [E, G, v, v]."""
        experts, groups, v, _ = metric.shape
        table = (codebook + 0.5 if bits == 3 else codebook).expand(experts, -1, -1).contiguous()
        metric = metric.contiguous()
        if bits != 3:
            image = table.unsqueeze(1) @ metric  # [E, G, 256, v]
            base = image.square().sum(-1).unsqueeze(2)
            return cls(metric, metric, image.mT.contiguous(), base, table)
        gram = metric @ metric.mT
        signs = signs_of(v, metric)
        base = metric.new_empty(experts, groups, 2**v, vq4.CODEBOOK_SIZE)
        for pattern in range(2**v):
            signed = table * signs[pattern]
            base[:, :, pattern] = ((signed.unsqueeze(1) @ gram) * signed.unsqueeze(1)).sum(-1)
        return cls(gram, metric, table.mT.unsqueeze(1).contiguous(), base, table)
