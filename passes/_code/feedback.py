"""Choosing codes with error feedback: step 2 of `coding`, and its rows in step 5.

With M = U_gg^-1 of a group g: code = argmin_c |(t - c) M|^2, then R_rest -= (t - c) M U_g,rest
(GPTQ, arXiv 2210.17323, v columns at a time).
"""

from __future__ import annotations

import torch
from torch import Tensor

from moecc.passes._code.codebooks import Nearest
from moecc.passes._code.coded import Coded, joined
from moecc.passes._code.coder import Coder


def choose(coder: Coder, codebook: Tensor, scale: Tensor) -> Coded:
    """Codes for a codebook [C, 256, v] and row scales [E, N]."""
    find = finders(coder, codebook)
    if coder.output is None:
        return choose_rows(coder, coder.target, codebook, scale, find)
    rest, parts = coder.target.clone(), []
    for block in coder.blocks:
        part = choose_rows(coder, rest[:, block], codebook, scale[:, block], find)
        parts.append(part)
        later = slice(block.stop, None)
        lower = coder.row_upper[:, block, block].mT
        error = rest[:, block] - part.dense()
        carried = torch.linalg.solve_triangular(lower, error, upper=False)
        rest[:, later] -= coder.row_upper[:, block, later].mT @ carried
    return joined(parts, 1, codebook)


def finders(coder: Coder, codebook: Tensor) -> list[Nearest]:
    """One per group, in the order of coding: each finds codes once all groups before are coded."""
    starts = range(0, coder.columns.shape[-1], coder.v)
    return [Nearest(codebook, coder.metric(j), coder.bits) for j in starts]


def choose_rows(
    coder: Coder,
    target: Tensor,
    codebook: Tensor,
    scale: Tensor,
    nearest: list[Nearest],
    block: int = 128,
) -> Coded:
    """Codes for some rows [E, n, K] that do not depend on each other.

    nearest: as `finders` returns them. block: columns after which the errors so far are carried
    over to all later ones at once.
    """
    experts, rows, columns = target.shape
    v, index = coder.v, coder.columns.unsqueeze(1).expand(-1, rows, -1)
    rest = torch.gather(target, 2, index) / scale.unsqueeze(-1)
    codes = torch.empty(experts, rows, columns // v, dtype=torch.long, device=rest.device)
    negative = None
    if coder.bits == 3:
        negative = torch.zeros(experts, rows, columns, dtype=torch.bool, device=rest.device)
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        errors = torch.empty(experts, rows, stop - start, device=rest.device)
        for j in range(start, stop, v):
            t = rest[:, :, j : j + v]
            find = nearest[j // v]
            code, sign, q = find(t)
            codes[:, :, j // v] = code
            if negative is not None and sign is not None:
                negative[:, :, j : j + v] = sign
            if coder.feedback:
                carried = (t - q) @ find.metric
                errors[:, :, j - start : j - start + v] = carried
                rest[:, :, j + v : stop] -= carried @ coder.upper[:, j : j + v, j + v : stop]
        if coder.feedback and stop < columns:
            rest[:, :, stop:] -= errors @ coder.upper[:, start:stop, stop:]
    codes = torch.empty_like(codes).scatter_(2, coder.order.unsqueeze(1).expand_as(codes), codes)
    if negative is not None:
        negative = torch.empty_like(negative).scatter_(2, index, negative)
    return Coded(codes, negative, codebook, scale.contiguous())
