"""Refits for fixed codes: row scales and codebooks by least squares, step 3 of `coding`."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from moecc.passes._code.codebooks import clamp_codebook
from moecc.passes._code.coded import Coded, lookup
from moecc.passes._code.coder import Coder
from moecc.passes._code.metric import costly, damped, diagonal, weighted, woven
from moecc.passes._code.sums import sums_by_code

_TURNS = 12  # of conjugate gradients, at most
_GAIN = 1e-3  # share of the error that a turn has to take away for another to follow


def refit_scale(coder: Coder, state: Coded) -> Coded:
    """The best row scales under S and H.

    A row keeps its scale if it codes to zero, or if the new scale would not be positive.
    """
    q = state.unscaled()
    qh = q @ coder.moment
    top = (coder.costly * q).sum(-1)
    if coder.output is None:
        bottom = (qh * q).sum(-1)
        scale = torch.where(bottom > 0, top / bottom.clamp(min=1e-20), state.scale)
    else:
        shared = coder.output * (coder.apart(qh) @ coder.apart(q).mT)
        right = coder.apart(top.unsqueeze(-1))
        scale = woven(torch.linalg.solve(damped(shared, 1e-6), right).squeeze(-1))
    found = replace(state, scale=torch.where(scale > 0, scale, state.scale))
    coder.left(found, qh)
    return found


def refit_codebook(coder: Coder, state: Coded) -> Coded:
    """The best codebook for fixed codes and scales, rounded to the format's whole numbers."""
    return rescaled(state, best_codebook(coder, state), coder.bits)


def best_codebook(coder: Coder, state: Coded, turns: int = _TURNS, gain: float = _GAIN) -> Tensor:
    """The least-squares codebook under S and H, not rounded, [C, 256, v].

    A weight is linear in its centroid, q = sign * c - [negative]. So preconditioned conjugate
    gradients need only lookups and products with H and S.
    """
    books = state.codebook.shape[0]
    sign = None if state.negative is None else torch.where(state.negative, -1.0, 1.0)
    scale, sums = state.scale.unsqueeze(-1), sums_by_code(state.codes, books)

    def gather(w: Tensor) -> Tensor:
        return sums(w.unflatten(-1, (-1, coder.v)))

    def weights_of(c: Tensor) -> Tensor:
        w = lookup(state.codes, None, c)
        return (w if sign is None else w * sign) * scale

    def back(w: Tensor) -> Tensor:
        return gather((w if sign is None else w * sign) * scale)

    c = state.codebook.clone()
    each = coder.moment.diagonal(dim1=-2, dim2=-1).unsqueeze(1) * scale.square()
    if coder.output is not None:
        each = each * diagonal(coder.output).unsqueeze(-1)
    precondition = 1 / gather(each).clamp(min=1e-12)
    residual = back(costly(coder.left(state), coder.output))
    z = precondition * residual
    direction, rz = z, (residual * z).sum((-2, -1), keepdim=True)
    error = coder.error(state)
    error = (error if books > 1 else error.sum(0, keepdim=True)).view(-1, 1, 1)
    active = torch.ones_like(error)
    for _ in range(turns):
        image = back(weighted(weights_of(direction), coder.moment, coder.output))
        alpha = active * rz / (direction * image).sum((-2, -1), keepdim=True).clamp(min=1e-20)
        c, residual = c + alpha * direction, residual - alpha * image
        error = error - alpha * rz
        # each codebook stops by itself: what is coded together changes none
        active = active * (alpha * rz > gain * error)
        if not active.any():
            break
        z = precondition * residual
        new = (residual * z).sum((-2, -1), keepdim=True)
        direction, rz = z + new / rz.clamp(min=1e-20) * direction, new
    return c


def rescaled(state: Coded, codebook: Tensor, bits: int) -> Coded:
    """`state` with `codebook` brought to the format's range of whole numbers and rounded.

    The largest centroid becomes 127 again, and the row scales take up the factor.
    """
    shift = 0.5 if bits == 3 else 0.0
    grow = 127 / (codebook + shift).abs().amax((-2, -1), keepdim=True).clamp(min=1e-12)
    scale = state.scale / grow.squeeze(-1)
    whole = clamp_codebook((codebook + shift) * grow - shift, bits)
    return replace(state, codebook=whole, scale=scale)
