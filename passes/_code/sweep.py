"""Choosing each group's code again with all others fixed: step 4 of `coding`.

For one group g of a row the cost is |(t - c) R|^2, R the Cholesky factor of H_gg and
t = q_g + ((w - q) H)_g H_gg^-1 the best value that the group could have.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moecc.passes._code.codebooks import Nearest
from moecc.passes._code.coded import Coded
from moecc.passes._code.coder import Coder


def sweep(coder: Coder, state: Coded) -> Coded:
    """Go once through all groups of all rows, one block of rows after the other."""
    codes = state.codes.clone()
    negative = None if state.negative is None else state.negative.clone()
    dense, scale = state.unscaled(), state.scale.unsqueeze(-1)
    # (w - q) H, kept up to date between blocks
    carried = (coder.target - dense * scale) @ coder.moment
    groups = range(coder.roots.shape[1])
    finders = [Nearest(state.codebook, coder.roots[:, g], coder.bits) for g in groups]
    for rows in coder.blocks:
        own = carried[:, rows] if coder.output is None else _coupled(coder, carried, rows)
        signs = None if negative is None else negative[:, rows]
        part = Coded(codes[:, rows], signs, state.codebook, state.scale)
        _sweep_rows(coder, part, dense[:, rows], own / scale[:, rows], finders)
        if coder.output is not None:
            error = coder.target[:, rows] - dense[:, rows] * scale[:, rows]
            carried[:, rows] = error @ coder.moment
    return Coded(codes, negative, state.codebook, state.scale)


def _coupled(coder: Coder, carried: Tensor, rows: slice) -> Tensor:
    """The pull on each row of a block if all rows outside it stay: [E, N, K] -> [E, n, K]."""
    assert coder.output is not None
    inner = coder.output[:, rows, rows]
    own = inner.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
    # All rows of a block move at once. If they pull the same way, that overshoots: shorten it.
    largest = torch.linalg.eigvalsh(inner / (own * own.mT).sqrt())[:, -1]
    most = largest.clamp(min=2.0)[:, None, None] - 1
    pull: Tensor = coder.output[:, rows] @ carried / (own * most)
    return pull


def _sweep_rows(
    coder: Coder, part: Coded, dense: Tensor, pull: Tensor, finders: list[Nearest]
) -> None:
    """Change codes, signs and values (`dense`) of some rows in place.

    pull: (w - q) H in units of the row, [E, n, K]; it follows every change.
    """
    v = coder.v
    for g, find in enumerate(finders):
        cols = slice(g * v, g * v + v)
        old = dense[:, :, cols]
        t = old + pull[:, :, cols] @ coder.inverses[:, g]
        code, sign, q = find(t)
        if part.negative is not None and sign is not None:
            # `find` takes the signs of t only, so the code so far, of other signs, may be better.
            new_cost, old_cost = (((t - x) @ find.metric).square().sum(-1) for x in (q, old))
            better = new_cost < old_cost
            code = torch.where(better, code, part.codes[:, :, g])
            q = torch.where(better.unsqueeze(-1), q, old)
            signs = torch.where(better.unsqueeze(-1), sign, part.negative[:, :, cols])
            part.negative[:, :, cols] = signs
        part.codes[:, :, g] = code
        pull -= (q - old) @ coder.moment[:, cols, :]
        dense[:, :, cols] = q
