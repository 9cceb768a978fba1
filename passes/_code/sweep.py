"""Choosing each group's code again with all others fixed: step 4 of `coding`.

For one group g of a row the cost is |(t - c) R|^2, R the Cholesky factor of H_gg and
t = q_g + ((w - q) H)_g H_gg^-1 the best value that the group could have.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from moecc.passes._code import native, triton_coder
from moecc.passes._code.codebooks import Nearest, Tables
from moecc.passes._code.coded import Coded
from moecc.passes._code.coder import Coder
from moecc.passes._code.metric import diagonal, together

_Search: TypeAlias = Callable[[Coded, Tensor, Tensor], None]
_BLOCK = 128  # columns whose changes are carried over to all later ones at once
_TILE = 1024  # rows of all experts that go through the columns together


def sweep(coder: Coder, state: Coded) -> Coded:
    """Go once through all groups of all rows, one step of rows after the other."""
    codes = state.codes.clone()
    negative = None if state.negative is None else state.negative.clone()
    dense, scale = state.unscaled(), state.scale.unsqueeze(-1)
    carried = coder.left(state).clone()  # kept up to date between steps
    search = _searching(coder, state.codebook)
    for number, step in enumerate(coder.steps):
        rows = coder.rows(step)
        own = carried[:, rows] if coder.output is None else _coupled(coder, carried, number)
        signs = None if negative is None else negative[:, rows]
        part = Coded(codes[:, rows], signs, state.codebook, state.scale)
        search(part, dense[:, rows], own / scale[:, rows])
        if coder.output is not None:
            error = coder.target[:, rows] - dense[:, rows] * scale[:, rows]
            carried[:, rows] = error @ coder.moment
    return Coded(codes, negative, state.codebook, state.scale)


def _searching(coder: Coder, codebook: Tensor) -> _Search:
    """What goes through all columns of some rows, as `_sweep_rows` does."""
    for loops, serves in ((_native, native.serves), (_triton, triton_coder.serves)):
        if serves(coder.target):
            return partial(loops, coder, Tables.of(codebook, coder.roots, coder.bits))
    groups = range(coder.roots.shape[1])
    return partial(
        _sweep_rows, coder, [Nearest(codebook, coder.roots[:, g], coder.bits) for g in groups]
    )


def _coupled(coder: Coder, carried: Tensor, number: int) -> Tensor:
    """The pull on each row of a step if all rows outside it stay: [E, N, K] -> [E, n, K]."""
    assert coder.output is not None
    step = coder.steps[number]
    own = diagonal(coder.output[..., step, step]).unsqueeze(-1)
    pull = together(coder.output[..., step, :] @ coder.apart(carried))
    return pull / (own * coder.shortened[number])


def _native(coder: Coder, tables: Tables, part: Coded, dense: Tensor, pull: Tensor) -> None:
    """Do what `_sweep_rows` does with the compiled loops."""
    rows, wide = pull.shape[1:]
    for e in range(len(pull)):
        moment, negative = coder.moment[e], None if part.negative is None else part.negative[e]
        for cols in _blocks(wide):
            moved = pull.new_empty(rows, cols.stop - cols.start)
            out = native.Out(part.codes[e], negative, moved)
            native.sweep(tables, e, cols, pull[e], dense[e], moment, coder.inverses[e], out)
            if cols.stop < wide:
                pull[e, :, cols.stop :].addmm_(moved, moment[cols, cols.stop :], alpha=-1)


def _triton(coder: Coder, tables: Tables, part: Coded, dense: Tensor, pull: Tensor) -> None:
    """Do what `_sweep_rows` does on a GPU."""
    moved = torch.empty_like(pull)
    for cols in _blocks(pull.shape[2]):
        triton_coder.sweep(tables, cols, pull, dense, coder.moment, coder.inverses, part, moved)
    dense += moved


def _blocks(wide: int) -> list[slice]:
    return [slice(i, min(i + _BLOCK, wide)) for i in range(0, wide, _BLOCK)]


def _sweep_rows(
    coder: Coder, finders: list[Nearest], part: Coded, dense: Tensor, pull: Tensor
) -> None:
    """Change codes, signs and values (`dense`) of some rows in place.

    pull: (w - q) H in units of the row, [E, n, K]; used up. Rows go in tiles and columns in blocks,
    so that what changes often stays in the cache: inside a block every change is carried over at
    once, behind it the changes of all its columns with one product. Columns before are done.
    """
    count, wide = pull.shape[1:]
    step = max(1, _TILE // len(pull))
    for first in range(0, count, step):
        rows = slice(first, min(first + step, count))
        for cols in _blocks(wide):
            own, old = pull[:, rows, cols].contiguous(), dense[:, rows, cols].contiguous()
            new = _sweep_block(coder, part, old, own, finders, rows, cols.start)
            dense[:, rows, cols] = new
            if cols.stop < wide:
                behind = coder.moment[:, cols, cols.stop :]
                pull[:, rows, cols.stop :].baddbmm_(new - old, behind, alpha=-1)


def _sweep_block(
    coder: Coder,
    part: Coded,
    dense: Tensor,
    pull: Tensor,
    finders: list[Nearest],
    rows: slice,
    start: int,
) -> Tensor:
    """Choose the codes of `rows` in the columns from `start` on; return their values, [E, n, b].

    dense, pull: of these rows and columns.
    """
    v, made = coder.v, torch.empty_like(dense)
    for j in range(0, dense.shape[-1], v):
        g, cols = (start + j) // v, slice(j, j + v)
        find, old = finders[g], dense[:, :, cols]
        t = torch.baddbmm(old, pull[:, :, cols], coder.inverses[:, g])
        code, sign, q = find(t)
        if part.negative is not None and sign is not None:
            there = slice(start + j, start + j + v)
            # `find` takes the signs of t only, so the code so far, of other signs, may be better.
            new_cost, old_cost = (((t - x) @ find.metric).square().sum(-1) for x in (q, old))
            better = new_cost < old_cost
            code = torch.where(better, code, part.codes[:, rows, g])
            q = torch.where(better.unsqueeze(-1), q, old)
            signs = torch.where(better.unsqueeze(-1), sign, part.negative[:, rows, there])
            part.negative[:, rows, there] = signs
        part.codes[:, rows, g] = code
        made[:, :, cols] = q
        later = slice(start + j + v, start + dense.shape[-1])
        inner = coder.moment[:, start + j : start + j + v, later]
        pull[:, :, j + v :].baddbmm_(q - old, inner, alpha=-1)
    return made
