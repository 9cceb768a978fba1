"""Coding a projection as `vq4`: importance-weighted k-means, error feedback, and joint refits of codebook, scales and codes.

  1. Rows are divided by their root mean square; groups of v neighbouring weights along K are clustered into 256 centroids by
     k-means weighted with the diagonal of the second moment H (what an error in a column costs).
  2. Codes are chosen group by group, the most costly group of columns first. The error of each is carried over to the columns
     not yet coded through the Cholesky factor U of H^-1 (GPTQ, arXiv 2210.17323, v columns at a time): with M = U_gg^-1,
     code = argmin_c |(t - c) M|^2, then R_rest -= (t - c) M U_g,rest.
  3. For fixed codes the codebook that minimises sum_n s_n^2 |..|_H is a linear least-squares problem, solved by conjugate
     gradients; for a fixed codebook each row's scale is a ratio of two H-products.
  4. Each code is chosen again with all others fixed (coordinate descent under H). 2 to 4 repeat; the best state seen is kept.

  5. Where an error in the output has a cost S of its own (`sensitivity`), the error is tr(S D H D^T) instead of tr(D H D^T), D the
     weight error. Then rows depend on each other: they are coded a block at a time, the most costly first, their error carried
     over to the rows not yet coded through the Cholesky factor of S^-1 (as YAQA does on both sides, arXiv 2505.22988); a sweep goes
     through the same blocks, each with all others fixed, and the scales of all rows are one linear system.

Shapes: E experts, N rows, K columns (a multiple of 8: padded before), G = K/v groups, C = E codebooks or 1. All arithmetic in
float32; a fixed seed gives the same codes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moecc.ir import vq4
from moecc.passes._code.codebooks import Book, Nearest, clamp_codebook, kmeans, rounded
from moecc.passes._code.half import compact
from moecc.passes._code.metric import (
    AT_ONCE,
    OUTPUT_DAMPING,
    damped,
    feedback_factor,
    weighted,
    weighted_error,
)

_SAMPLED_EXPERTS = 8  # that a shared codebook is fitted to where not all can be in memory
# of rows, coded one after the other under a metric that couples rows; in a block each as if the others stayed
_BLOCKS = 32
_ROWS = 16  # in a block at least


@dataclass
class Coded:
    """A coded projection before packing: codes i64 [E, N, G], negative bool [E, N, K] or None, codebook [C, 256, v] integers."""

    codes: Tensor
    negative: Tensor | None
    codebook: Tensor
    scale: Tensor  # [E, N]

    def unscaled(self) -> Tensor:
        return lookup(self.codes, self.negative, self.codebook)

    def dense(self) -> Tensor:
        return self.unscaled() * self.scale.unsqueeze(-1)

    def stored(self) -> dict[str, Tensor | None]:
        """The tensors of `vq4.CODED`."""
        signs = None if self.negative is None else vq4.pack_signs(self.negative)
        codes, codebook = self.codes.to(torch.uint8), self.codebook.to(torch.int8).contiguous()
        return dict(zip(vq4.CODED, (codes, signs, codebook, compact(self.scale)), strict=True))


def lookup(codes: Tensor, negative: Tensor | None, codebook: Tensor) -> Tensor:
    experts = codes.shape[0]
    table = codebook.expand(experts, -1, -1)
    offset = torch.arange(experts, device=codes.device).view(-1, 1, 1) * table.shape[1]
    values = table.reshape(-1, table.shape[2])[codes + offset].flatten(-2)
    return values if negative is None else torch.where(negative, -1 - values, values)


def encode(
    weight: Tensor,
    moment: Tensor,
    output: Tensor | None = None,
    *,
    bits: int,
    shared: bool,
    seed: int,
    rounds: int = 3,
    feedback: bool = True,
    turns: int = 15,  # of k-means
    book: Book | None = None,
) -> Coded:
    """Code weight [E, N, K] under second moments [E, K, K] of the input and costs [E, N, N] of output errors (None: all alike).

    `shared`: one codebook for all experts. feedback=False leaves steps 2 to 5 out (plain k-means), for ablation. `book`: a shared
    codebook that is used as it is.
    """
    moment = damped(moment)
    importance = moment.diagonal(dim1=-2, dim2=-1)
    importance = importance / importance.mean(-1, keepdim=True)
    size = _size(weight)
    target = weight / size
    if output is not None and feedback:
        output = damped(size * output * size.mT, OUTPUT_DAMPING)
        output = output / output.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
        order = (
            output.diagonal(dim1=-2, dim2=-1)
            .argsort(dim=-1, descending=True, stable=True)
            .unsqueeze(-1)
        )
        target, output = (
            target.take_along_dim(order, 1),
            output.take_along_dim(order, 1).take_along_dim(order.mT, 2),
        )
    given = book is not None
    book = book or rounded(kmeans(target, importance, bits=bits, seed=seed, turns=turns), bits)
    table = book.integers if shared else book.integers.expand(len(weight), -1, -1)
    coder = _Coder(target, moment, importance, bits, feedback, output if feedback else None)
    state = coder.choose(table, book.step.expand(weight.shape[:2]))
    best, best_error = None, torch.full((len(weight),), torch.inf)
    for turn in range(rounds if feedback else 1):
        if feedback and turn:
            state = state if given else coder.refit_codebook(state)
            state = coder.choose(state.codebook, state.scale) if turn == 1 else state
        if feedback:
            state = coder.sweep(state)
        state = coder.refit_scale(state)
        best, best_error = _better(best, best_error, state, coder.error(state), shared)
    assert best is not None
    if output is not None and feedback:
        back = order.argsort(dim=1)
        negative = None if best.negative is None else best.negative.take_along_dim(back, 1)
        best = Coded(
            best.codes.take_along_dim(back, 1),
            negative,
            best.codebook,
            best.scale.take_along_dim(back[..., 0], 1),
        )
    return Coded(best.codes, best.negative, best.codebook, best.scale * size.squeeze(-1))


def encode_in_parts(
    weight: Tensor, moment: Tensor, output: Tensor | None = None, *, shared: bool, **options: Any
) -> Coded:
    """`encode`, with its options, of as many experts together as AT_ONCE allows.

    Where these are not all, a shared codebook is fitted to every so many rows of some experts and used as it is for the rest.
    """
    coded: Callable[..., Coded] = partial(encode, shared=shared, **options)
    step = max(1, AT_ONCE // weight[0].numel())
    if len(weight) <= step:
        return coded(weight, moment, output)
    book = None
    if shared:
        some = torch.linspace(0, len(weight) - 1, min(len(weight), _SAMPLED_EXPERTS)).long()
        rows = slice(None, None, -(-len(some) * weight[0].numel() // AT_ONCE))
        sample = weight[:, rows][some]
        fitted = coded(
            sample, moment[some], None if output is None else output[:, rows, rows][some]
        )
        book = Book(fitted.codebook, (fitted.scale / _size(sample).squeeze(-1)).median().view(1, 1))
    parts = [
        coded(weight[part], moment[part], None if output is None else output[part], book=book)
        for part in (slice(i, i + step) for i in range(0, len(weight), step))
    ]
    negative = [p.negative for p in parts if p.negative is not None]
    return Coded(
        torch.cat([p.codes for p in parts]),
        torch.cat(negative) if negative else None,
        parts[0].codebook if shared else torch.cat([p.codebook for p in parts]),
        torch.cat([p.scale for p in parts]),
    )


def _size(weight: Tensor) -> Tensor:
    """Root mean square of each row: [E, N, K] -> [E, N, 1]."""
    return weight.pow(2).mean(-1, keepdim=True).sqrt().clamp(min=1e-12)


def _better(
    best: Coded | None, best_error: Tensor, state: Coded, error: Tensor, shared: bool
) -> tuple[Coded, Tensor]:
    if best is None:
        return state, error
    if shared:  # experts share a codebook, so the layer is kept or replaced whole
        return (state, error) if error.sum() < best_error.sum() else (best, best_error)
    win = (error < best_error).view(-1, 1, 1)
    negative = (
        None
        if state.negative is None or best.negative is None
        else torch.where(win, state.negative, best.negative)
    )
    merged = Coded(
        torch.where(win, state.codes, best.codes), negative, torch.where(win, state.codebook, best.codebook),
        torch.where(win[..., 0], state.scale, best.scale),
    )  # fmt: skip
    return merged, torch.minimum(error, best_error)


class _Coder:
    """Chooses codes for one projection; holds what does not change between rounds."""

    def __init__(
        self,
        target: Tensor,
        moment: Tensor,
        importance: Tensor,
        bits: int,
        feedback: bool,
        output: Tensor | None = None,
    ):
        self.target, self.moment, self.output, self.bits, self.feedback = (
            target,
            moment,
            output,
            bits,
            feedback,
        )
        self.v = v = vq4.group_size(bits)
        rows, columns = target.shape[1:]
        step = rows if output is None else max(_ROWS, rows // _BLOCKS)
        self.blocks = [slice(i, min(i + step, rows)) for i in range(0, rows, step)]
        groups = importance.unflatten(-1, (-1, v)).sum(-1)
        # costly groups first, while all others can still make up for them
        order = torch.argsort(groups, dim=-1, descending=True, stable=True)
        self.columns = (order.unsqueeze(-1) * v + torch.arange(v, device=order.device)).flatten(
            1
        )  # [E, K]
        self.order = order
        if feedback:
            permuted = torch.gather(moment, 1, self.columns.unsqueeze(-1).expand(-1, -1, columns))
            self.upper = feedback_factor(
                torch.gather(permuted, 2, self.columns.unsqueeze(1).expand(-1, columns, -1))
            )
            inner = (
                moment.unflatten(-2, (-1, v))
                .unflatten(-1, (-1, v))
                .diagonal(dim1=1, dim2=3)
                .movedim(-1, 1)
            )
            self.inverses, self.roots = (
                torch.linalg.inv(inner),
                torch.linalg.cholesky(inner),
            )  # [E, G, v, v]
        else:
            self.diagonal = torch.gather(importance, 1, self.columns)
        if output is not None:
            self.row_upper = feedback_factor(output)

    def error(self, state: Coded) -> Tensor:
        return weighted_error(state.dense() - self.target, self.moment, self.output)

    def choose(self, codebook: Tensor, scale: Tensor) -> Coded:
        """Codes for a codebook [C, 256, v] and row scales [E, N], with error feedback (or nearest by importance)."""
        finders = self._finders(codebook)
        if self.output is None:
            return self._choose(self.target, codebook, scale, finders)
        rest, parts = self.target.clone(), []
        for block in self.blocks:
            part = self._choose(rest[:, block], codebook, scale[:, block], finders)
            parts.append(part)
            later = slice(block.stop, None)
            lower = self.row_upper[:, block, block].mT
            carried = torch.linalg.solve_triangular(
                lower, rest[:, block] - part.dense(), upper=False
            )
            rest[:, later] -= self.row_upper[:, block, later].mT @ carried
        negative = [p.negative for p in parts if p.negative is not None]
        codes = torch.cat([p.codes for p in parts], 1)
        return Coded(
            codes, torch.cat(negative, 1) if negative else None, codebook, scale.contiguous()
        )

    def _finders(self, codebook: Tensor) -> list[Nearest]:
        """What finds a group's code when all groups before it are coded, in the order of coding."""
        return [
            Nearest(codebook, self._metric(j), self.bits)
            for j in range(0, self.columns.shape[-1], self.v)
        ]

    def _choose(
        self,
        target: Tensor,
        codebook: Tensor,
        scale: Tensor,
        finders: list[Nearest],
        block: int = 128,
    ) -> Coded:
        """The same for some rows, which do not depend on each other."""
        experts, rows, columns = target.shape
        v, index = self.v, self.columns.unsqueeze(1).expand(-1, rows, -1)
        rest = torch.gather(target, 2, index) / scale.unsqueeze(-1)
        codes = torch.empty(experts, rows, columns // v, dtype=torch.long, device=rest.device)
        negative = (
            torch.zeros(experts, rows, columns, dtype=torch.bool, device=rest.device)
            if self.bits == 3
            else None
        )
        for start in range(0, columns, block):
            stop = min(start + block, columns)
            errors = torch.empty(experts, rows, stop - start, device=rest.device)
            for j in range(start, stop, v):
                t = rest[:, :, j : j + v]
                find = finders[j // v]
                code, sign, q = find(t)
                codes[:, :, j // v] = code
                if negative is not None and sign is not None:
                    negative[:, :, j : j + v] = sign
                if self.feedback:
                    carried = (t - q) @ find.metric
                    errors[:, :, j - start : j - start + v] = carried
                    rest[:, :, j + v : stop] -= carried @ self.upper[:, j : j + v, j + v : stop]
            if self.feedback and stop < columns:
                rest[:, :, stop:] -= errors @ self.upper[:, start:stop, stop:]
        codes = torch.empty_like(codes).scatter_(2, self.order.unsqueeze(1).expand_as(codes), codes)
        if negative is not None:
            negative = torch.empty_like(negative).scatter_(2, index, negative)
        return Coded(codes, negative, codebook, scale.contiguous())

    def _metric(self, j: int) -> Tensor:
        if not self.feedback:
            return torch.diag_embed(self.diagonal[:, j : j + self.v].sqrt())
        metric: Tensor = torch.linalg.inv(self.upper[:, j : j + self.v, j : j + self.v])
        return metric

    def sweep(self, state: Coded) -> Coded:
        """Choose each group's code again with all the others fixed: the minimum over one group, rows of a block at a time."""
        codes, negative = (
            state.codes.clone(),
            None if state.negative is None else state.negative.clone(),
        )
        dense, scale = state.unscaled(), state.scale.unsqueeze(-1)
        carried = (
            self.target - dense * scale
        ) @ self.moment  # (w - q) H, kept up to date between blocks
        finders = [
            Nearest(state.codebook, self.roots[:, g], self.bits) for g in range(self.roots.shape[1])
        ]
        for rows in self.blocks:
            pull = (
                carried[:, rows] / scale[:, rows]
                if self.output is None
                else self._coupled(carried, rows) / scale[:, rows]
            )
            part = Coded(
                codes[:, rows],
                None if negative is None else negative[:, rows],
                state.codebook,
                state.scale,
            )
            self._sweep(part, dense[:, rows], pull, finders)
            if self.output is not None:
                carried[:, rows] = (
                    self.target[:, rows] - dense[:, rows] * scale[:, rows]
                ) @ self.moment
        return Coded(codes, negative, state.codebook, state.scale)

    def _coupled(self, carried: Tensor, rows: slice) -> Tensor:
        """What pulls at each row of a block with all other rows fixed, in units of the row: [E, rows, K]."""
        assert self.output is not None
        inner = self.output[:, rows, rows]
        own = inner.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
        # Rows of a block move at once. Where they are so much of one mind that this would overshoot, they go a shorter way.
        most = (
            torch.linalg.eigvalsh(inner / (own * own.mT).sqrt())[:, -1].clamp(min=2.0)[
                :, None, None
            ]
            - 1
        )
        pull: Tensor = self.output[:, rows] @ carried / (own * most)
        return pull

    def _sweep(self, part: Coded, dense: Tensor, pull: Tensor, finders: list[Nearest]) -> None:
        """Codes, signs and values of some rows, changed in place."""
        v = self.v
        for g, find in enumerate(finders):
            cols = slice(g * v, g * v + v)
            old = dense[:, :, cols]
            t = old + pull[:, :, cols] @ self.inverses[:, g]
            code, sign, q = find(t)
            if part.negative is not None and sign is not None:
                # What is found has the signs of t, so a code of other signs may have been better: then it stays.
                better = ((t - q) @ find.metric).square().sum(-1) < (
                    (t - old) @ find.metric
                ).square().sum(-1)
                code, q = (
                    torch.where(better, code, part.codes[:, :, g]),
                    torch.where(better.unsqueeze(-1), q, old),
                )
                part.negative[:, :, cols] = torch.where(
                    better.unsqueeze(-1), sign, part.negative[:, :, cols]
                )
            part.codes[:, :, g] = code
            pull -= (q - old) @ self.moment[:, cols, :]
            dense[:, :, cols] = q

    def refit_scale(self, state: Coded) -> Coded:
        """The rows' scales by least squares under S and H; a row that codes to zero, or would turn around, keeps its scale."""
        q = state.unscaled()
        qh = q @ self.moment
        if self.output is None:
            top, bottom = (qh * self.target).sum(-1), (qh * q).sum(-1)
            scale = torch.where(bottom > 0, top / bottom.clamp(min=1e-20), state.scale)
        else:
            top = (weighted(self.target, self.moment, self.output) * q).sum(-1)
            scale = torch.linalg.solve(damped(self.output * (qh @ q.mT), 1e-6), top)
        return Coded(
            state.codes, state.negative, state.codebook, torch.where(scale > 0, scale, state.scale)
        )

    def refit_codebook(self, state: Coded, turns: int = 12) -> Coded:
        """The codebook for fixed codes and scales: least squares under H by preconditioned conjugate gradients, then rounded.

        A weight is linear in its centroid: q = sign * c - [negative], so the normal equations need only lookups and H-products.
        """
        books = state.codebook.shape[0]
        sign = None if state.negative is None else torch.where(state.negative, -1.0, 1.0)
        scale = state.scale.unsqueeze(-1)

        def weights_of(c: Tensor) -> Tensor:
            w = lookup(state.codes, None, c)
            return (w if sign is None else w * sign) * scale

        def back(w: Tensor) -> Tensor:
            return self._gather((w if sign is None else w * sign) * scale, state.codes, books)

        fixed = state.dense() - weights_of(
            state.codebook
        )  # the -1 of negative weights at 3 bit, zero otherwise
        c = state.codebook.clone()
        diagonal = self.moment.diagonal(dim1=-2, dim2=-1).unsqueeze(1) * scale.square()
        if self.output is not None:
            diagonal = diagonal * self.output.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
        precondition = 1 / self._gather(diagonal, state.codes, books).clamp(min=1e-12)
        residual = back(weighted(self.target - fixed - weights_of(c), self.moment, self.output))
        z = precondition * residual
        direction, rz = z, (residual * z).sum((-2, -1), keepdim=True)
        for _ in range(turns):
            image = back(weighted(weights_of(direction), self.moment, self.output))
            alpha = rz / (direction * image).sum((-2, -1), keepdim=True).clamp(min=1e-20)
            c, residual = c + alpha * direction, residual - alpha * image
            z = precondition * residual
            new = (residual * z).sum((-2, -1), keepdim=True)
            direction, rz = z + new / rz.clamp(min=1e-20) * direction, new
        return self._rescaled(state, c)

    def _rescaled(self, state: Coded, c: Tensor) -> Coded:
        # The integers have a fixed range: bring the largest centroid back to 127 and let the scales take up the factor.
        shift = 0.5 if self.bits == 3 else 0.0
        grow = 127 / (c + shift).abs().amax((-2, -1), keepdim=True).clamp(min=1e-12)
        scale = state.scale / grow.squeeze(-1)
        return Coded(
            state.codes,
            state.negative,
            clamp_codebook((c + shift) * grow - shift, self.bits),
            scale,
        )

    def _gather(self, w: Tensor, codes: Tensor, books: int) -> Tensor:
        """Sum of group vectors per code: [E, N, K] -> [C, 256, v]."""
        size = vq4.CODEBOOK_SIZE
        offset = torch.arange(len(codes), device=codes.device).view(-1, 1, 1) * (
            size if books > 1 else 0
        )
        flat = w.new_zeros(books * size, self.v)
        flat.index_add_(0, (codes + offset).flatten(), w.reshape(-1, self.v))
        return flat.view(books, size, self.v)


def pad_columns(weight: Tensor, moment: Tensor) -> tuple[Tensor, Tensor]:
    """Zero columns up to a multiple of 8, and the moment with them."""
    extra = vq4.padded(weight.shape[-1]) - weight.shape[-1]
    return (
        (weight, moment)
        if extra == 0
        else (F.pad(weight, (0, extra)), F.pad(moment, (0, extra, 0, extra)))
    )
