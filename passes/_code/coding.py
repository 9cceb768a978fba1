"""Coding a projection as `vq4`: k-means, error feedback, joint refits of codebook and codes.

  1. Divide each row by its root mean square. Cluster the groups of v neighbouring weights along K
     into 256 centroids, by k-means weighted with the diagonal of the second moments H: the cost of
     an error in each column (`codebooks`).
  2. Choose codes group by group, the most costly group of columns first. Carry the error of each
     over to the columns that are not coded yet, through the Cholesky factor U of H^-1 (GPTQ,
     arXiv 2210.17323, v columns at a time): with M = U_gg^-1, code = argmin_c |(t - c) M|^2, then
     R_rest -= (t - c) M U_g,rest (`feedback`).
  3. For fixed codes, the codebook that minimises sum_n s_n^2 |..|_H is a linear least-squares
     problem; conjugate gradients solve it. For a fixed codebook, each row's scale is a ratio of
     two products with H (`refit`).
  4. Choose each code again with all others fixed: coordinate descent under H (`sweep`). Repeat
     steps 2 to 4 and keep the best state seen; only the first repetition does step 2 again.
  5. If output errors have a cost S of their own (`sensitivity`), the error is tr(S D H D^T) instead
     of tr(D H D^T), where D is the weight error. Rows then depend on each other, as far as they are
     in one block of S (`metric`). Code some of each block at a time, the most costly first, and
     carry their error over to its rows that are not coded yet, through the Cholesky factor of S^-1
     (YAQA does so on both sides, arXiv 2505.22988). A sweep takes the same steps, each with all
     other rows fixed, and the scales of a block's rows are one linear system.

Shapes: E experts, N rows, K columns (a multiple of 8: padded before), G = K/v groups, C = E
codebooks or 1. All arithmetic is in float32; a fixed seed gives the same codes.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from moecc.passes._code.codebooks import Book, groups, kmeans, rounded
from moecc.passes._code.coded import Coded
from moecc.passes._code.coder import Coder
from moecc.passes._code.feedback import choose
from moecc.passes._code.metric import OUTPUT_DAMPING, apart, damped, together
from moecc.passes._code.refit import refit_codebook, refit_scale
from moecc.passes._code.sweep import sweep

TURNS = 15  # of k-means, at most


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
    turns: int = TURNS,
    book: Book | None = None,
) -> Coded:
    """Code weight [E, N, K] under second moments [E, K, K] of its input.

    output: the costs of output errors, [E, b, B, B]; None if all channels count alike. shared: one
    codebook for all experts. rounds: of refits. feedback: False leaves out steps 2 to 5 (plain
    k-means, for ablation). turns: of k-means. book: to start with instead of one by k-means; one
    that all experts share is used as it is.
    """
    moment = damped(moment)
    importance = moment.diagonal(dim1=-2, dim2=-1)
    importance = importance / importance.mean(-1, keepdim=True)
    size = _size(weight)
    target, order = weight / size, None
    output = output if feedback else None
    if output is not None:
        output, order = _costly_first(output, size)
        target = target.take_along_dim(order, 1)
    fixed = shared and book is not None
    book = book or rounded(kmeans(target, importance, bits=bits, seed=seed, turns=turns), bits)
    table = book.integers if shared else book.integers.expand(len(weight), -1, -1)
    coder = Coder(target, moment, importance, bits, feedback, output)
    start = choose(coder, table, book.step.expand(weight.shape[:2]))
    found = _refined(coder, start, rounds, shared=shared, fixed_book=fixed)
    if order is not None:
        found = found.rows(order.argsort(dim=1))
    # a row of zeros stays exactly that
    return replace(found, scale=found.scale * size.squeeze(-1) * weight.any(-1))


def start_groups(
    weight: Tensor, importance: Tensor, bits: int, places: Tensor
) -> tuple[Tensor, Tensor]:
    """Those groups of weight [E, N, K] that a codebook by k-means starts from; see `groups`.

    importance: of columns, [E, K].
    """
    importance = importance / importance.mean(-1, keepdim=True)
    return groups(weight / _size(weight), importance, bits, places)


def fitted_book(coded: Coded, weight: Tensor) -> Book:
    """The shared codebook of coded rows of weight [E, N, K], to be used for others as it is."""
    steps = (coded.scale / _size(weight).squeeze(-1)).flatten().sort().values
    return Book(coded.codebook, steps[(len(steps) - 1) // 2].view(1, 1))


def _size(weight: Tensor) -> Tensor:
    """Root mean square of each row: [E, N, K] -> [E, N, 1]."""
    return weight.pow(2).mean(-1, keepdim=True).sqrt().clamp(min=1e-12)


def _costly_first(output: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """Costs [E, b, B, B] of errors of rows divided by `size`, sorted; and the order [E, N, 1].

    The most costly row of each block comes first. The costs are damped and have the mean 1.
    """
    blocks = output.shape[1]
    size = apart(size, blocks)
    output = damped(size * output * size.mT, OUTPUT_DAMPING)
    mean = output.diagonal(dim1=-2, dim2=-1).flatten(1).mean(-1)
    output = output / mean[:, None, None, None]
    costs = output.diagonal(dim1=-2, dim2=-1)
    order = costs.argsort(dim=-1, descending=True, stable=True).unsqueeze(-1)
    sorted_ = output.take_along_dim(order, -2).take_along_dim(order.mT, -1)
    first = torch.arange(blocks, device=order.device).view(-1, 1, 1)
    return sorted_, together(order * blocks + first)


def _refined(coder: Coder, state: Coded, rounds: int, *, shared: bool, fixed_book: bool) -> Coded:
    """Steps 2 to 4: refit and sweep from the first codes on; return the best state seen."""
    best, least = None, coder.target.new_full((len(coder.target),), torch.inf)
    for turn in range(rounds if coder.feedback else 1):
        if turn:
            state = state if fixed_book else refit_codebook(coder, state)
            state = choose(coder, state.codebook, state.scale) if turn == 1 else state
        if coder.feedback:
            state = sweep(coder, state)
        state = refit_scale(coder, state)
        best, least = _better(best, least, state, coder.error(state), shared)
    assert best is not None
    return best


def _better(
    best: Coded | None, least: Tensor, state: Coded, error: Tensor, shared: bool
) -> tuple[Coded, Tensor]:
    """The better of two states and its error [E]: expert by expert, or the layer as a whole."""
    if best is None:
        return state, error
    if shared:  # experts share a codebook, so a mixture of both states is none
        return (state, error) if error.sum() < least.sum() else (best, least)
    win = (error < least).view(-1, 1, 1)
    negative = None
    if state.negative is not None and best.negative is not None:
        negative = torch.where(win, state.negative, best.negative)
    merged = Coded(
        torch.where(win, state.codes, best.codes),
        negative,
        torch.where(win, state.codebook, best.codebook),
        torch.where(win[..., 0], state.scale, best.scale),
    )
    return merged, torch.minimum(error, least)
