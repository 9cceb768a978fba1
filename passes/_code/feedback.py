"""Choosing codes with error feedback: step 2 of `coding`, and its rows in step 5.

With M = U_gg^-1 of a group g: code = argmin_c |(t - c) M|^2, then R_rest -= (t - c) M U_g,rest
(GPTQ, arXiv 2210.17323, v columns at a time).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from moecc.passes._code import native, triton_coder
from moecc.passes._code.codebooks import Nearest, Tables
from moecc.passes._code.coded import Coded, joined
from moecc.passes._code.coder import Coder
from moecc.passes._code.metric import together

Search: TypeAlias = Callable[[slice, Tensor, Coded], None]


def choose(coder: Coder, codebook: Tensor, scale: Tensor) -> Coded:
    """Codes for a codebook [C, 256, v] and row scales [E, N]."""
    find = finders(coder, codebook)
    if coder.output is None:
        return choose_rows(coder, coder.target, codebook, scale, find)
    rest, parts = coder.target.clone(), []
    for step in coder.steps:
        rows = coder.rows(step)
        part = choose_rows(coder, rest[:, rows], codebook, scale[:, rows], find)
        parts.append(part)
        upper = coder.row_upper[..., step, :]
        error = coder.apart(rest[:, rows] - part.dense())
        carried = torch.linalg.solve_triangular(upper[..., step].mT, error, upper=False)
        rest[:, rows.stop :] -= together(upper[..., step.stop :].mT @ carried)
    return joined(parts, 1, codebook)


def finders(coder: Coder, codebook: Tensor) -> Search:
    """What codes one block of columns, in the order of coding, as `_choose_block` does."""
    if coder.feedback:
        for loops, serves in (
            (_compiled_block, native.serves),
            (_triton_block, triton_coder.serves),
        ):
            if serves(coder.target):
                return partial(loops, coder, Tables.of(codebook, coder.metrics, coder.bits))
    groups = range(coder.metrics.shape[1])
    nearest = [Nearest(codebook, coder.metrics[:, g], coder.bits) for g in groups]
    return partial(_choose_block, coder, nearest)


def choose_rows(
    coder: Coder,
    target: Tensor,
    codebook: Tensor,
    scale: Tensor,
    search: Search,
    block: int = 128,
) -> Coded:
    """Codes for some rows [E, n, K] that do not depend on each other.

    search: as `finders` returns it. block: columns after which the errors so far are carried over
    to all later ones at once.
    """
    experts, rows, columns = target.shape
    index = coder.columns.unsqueeze(1).expand(-1, rows, -1)
    rest = torch.gather(target, 2, index) / scale.unsqueeze(-1)
    codes = torch.empty(experts, rows, columns // coder.v, dtype=torch.long, device=rest.device)
    negative = None
    if coder.bits == 3:
        negative = torch.zeros(experts, rows, columns, dtype=torch.bool, device=rest.device)
    found = Coded(codes, negative, codebook, scale.contiguous())
    for start in range(0, columns, block):
        cols = slice(start, min(start + block, columns))
        search(cols, rest, found)
    codes = codes.gather(2, coder.order.argsort(-1).unsqueeze(1).expand_as(codes))
    if negative is not None:
        negative = negative.gather(2, coder.columns.argsort(-1).unsqueeze(1).expand_as(negative))
    return replace(found, codes=codes, negative=negative)


def _choose_block(
    coder: Coder, nearest: list[Nearest], block: slice, rest: Tensor, found: Coded
) -> None:
    """Write the codes and signs of a block of columns, in the order of coding, into `found`."""
    v, stop = coder.v, block.stop
    errors = torch.empty_like(rest[:, :, block])
    for j in range(block.start, stop, v):
        t, find, group = rest[:, :, j : j + v], nearest[j // v], slice(j, j + v)
        code, sign, q = find(t)
        found.codes[:, :, j // v] = code
        if found.negative is not None and sign is not None:
            found.negative[:, :, group] = sign
        if coder.feedback:
            carried = (t - q) @ find.metric
            errors[:, :, j - block.start : j - block.start + v] = carried
            rest[:, :, j + v : stop] -= carried @ coder.upper[:, group, j + v : stop]
    if coder.feedback and stop < rest.shape[-1]:
        rest[:, :, stop:].baddbmm_(errors, coder.upper[:, block, stop:], alpha=-1)


def _compiled_block(coder: Coder, tables: Tables, block: slice, rest: Tensor, found: Coded) -> None:
    """Do what `_choose_block` does with the compiled loops."""
    for e, upper in enumerate(coder.upper):
        negative = None if found.negative is None else found.negative[e]
        out = native.Out(found.codes[e], negative, torch.empty_like(rest[e, :, block]))
        native.choose(tables, e, block, rest[e], upper, out)
        if block.stop < rest.shape[-1]:
            rest[e, :, block.stop :].addmm_(out.moved, upper[block, block.stop :], alpha=-1)


def _triton_block(coder: Coder, tables: Tables, block: slice, rest: Tensor, found: Coded) -> None:
    """Do what `_choose_block` does on a GPU."""
    triton_coder.choose(tables, block, rest, coder.upper, found)
