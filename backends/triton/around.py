"""The launches around the products of a layer: routing and fixed point before, gate and sum after.

Each function appends its launches to a call and returns the tensors that they fill.
Shapes: T tokens, k choices each, S = T k slots, D hidden, r rank.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moecc.backends.triton.call import Call, power_of_two
from moecc.backends.triton.combine import combine_kernel, hidden_kernel, norm_kernel, sums_kernel
from moecc.backends.triton.pack import COLUMNS
from moecc.backends.triton.parts import Arguments, Blocks, Rows
from moecc.backends.triton.prepare import prepare_kernel
from moecc.backends.triton.route import GROUP, count_kernel
from moecc.ir.gates import rows_per_unit

# Each routing program of prepare walks twice over up to this many slots; more are counted first.
_UNCOUNTED = 4096
_CHUNK = 2048  # slots per step of a walk, and the least number per segment
_COUNTS = 4096  # counts that each of those programs reads at most, unless one segment has more


def _count(call: Call) -> tuple[Tensor | None, int]:
    """Count the slots of every segment by expert, i32 [segments, bins].

    Return the counts and the number of slots per segment, or (None, 0) if there are few slots.
    """
    if call.slots <= _UNCOUNTED:
        return None, 0
    bins = power_of_two(call.experts, 32)
    span = _CHUNK * -(-call.slots // (_CHUNK * max(1, _COUNTS // bins)))
    counts = call.index.new_empty((-(-call.slots // span), bins), dtype=torch.int32)
    arguments: Arguments = dict(
        index_ptr=call.index,
        counts_ptr=counts,
        slots=call.slots,
        span=span,
        EXPERTS=call.experts,
        BINS=bins,
        CHUNK=_CHUNK,
    )
    call.add("count", count_kernel, (counts.shape[0],), arguments, warps=8)
    return counts, span


def _blocks(call: Call, like: Tensor) -> Blocks:
    """Allocate room for the most blocks that any routing needs.

    That is one per slot, or the full ones and one partly filled per expert that can be chosen.
    """
    tokens = call.tile.tokens
    full = (call.slots + min(call.experts, call.slots) * (tokens - 1)) // tokens
    count = min(call.slots, full)
    slots, owners = (like.new_empty(n, dtype=torch.int32) for n in (count * tokens, count))
    return Blocks(call.tile, count, slots, owners)


def prepare(
    call: Call, x: Tensor, basis: Tensor | None, column_tiles: int
) -> tuple[Rows, Blocks, Tensor | None]:
    """Return x as a right operand, the blocks, and z = basis x f32 [z_parts, T, RANK] or None."""
    tokens, columns = x.shape
    made, blocks = call.rows(x, tokens, column_tiles), _blocks(call, x)
    rank = 0 if basis is None else basis.shape[0]
    # every program that multiplies by z adds up its parts: few parts where tokens are many
    z_span = 32 * -(-columns // (32 * max(1, min(made.steps, 1024 // tokens))))
    z_parts = -(-columns // z_span)
    z, z_programs = None, 0
    if basis is not None:
        z = x.new_empty((z_parts, tokens, power_of_two(rank, 32)), dtype=torch.float32)
        z_programs = -(-tokens // 16) * z_parts
    width = made.values.shape[-1]
    step = COLUMNS * made.unroll if made.scale is not None else math.gcd(width, 1024)
    routes, routing = _routing(call, blocks)
    arguments: Arguments = dict(
        x_ptr=x,
        basis_ptr=None if basis is None else basis.contiguous(),
        z_ptr=z,
        out_ptr=made.values,
        out_scale_ptr=made.scale,
        tokens=tokens,
        columns=columns,
        steps=width // step,
        z_parts=z_parts,
        z_span=z_span,
        rank=rank,
        STEP=step,
        RANK=power_of_two(rank, 32),
    )
    programs = routes + tokens * (width // step) + z_programs
    call.add("prepare", prepare_kernel, (programs,), {**arguments, **routing}, warps=4)
    return made, blocks, z


def _routing(call: Call, blocks: Blocks) -> tuple[int, Arguments]:
    """Return the number of prepare's routing programs, and their arguments."""
    counts, span = _count(call)
    segments, bins = counts.shape if counts is not None else (0, power_of_two(call.experts + 1))
    # a scan over more slots would take registers that the programs for x need
    chunk = _CHUNK // 4 if segments else min(power_of_two(call.slots, 128), _CHUNK)
    routes = segments * -(-call.experts // GROUP.value) if segments else call.experts
    return routes, dict(
        index_ptr=call.index,
        counts_ptr=counts,
        slots_ptr=blocks.slots,
        block_expert_ptr=blocks.experts,
        slots=call.slots,
        blocks=blocks.number,
        segments=segments,
        span=span,
        EXPERTS=call.experts,
        BINS=bins,
        SEGMENTS=power_of_two(segments, 2),
        TOKENS=call.tile.tokens,
        CHUNK=chunk,
    )


def hidden(
    call: Call, first: Tensor, units: int, column_tiles: int, *, summed: bool
) -> tuple[Rows, Rows]:
    """Convert hidden units to fixed point.

    first: rows of every slot f32 [parts, S, rows]; after a fused gate, hidden units [S, units].
    Return the hidden units of the S slots, and if `summed` their sums over a token's choices with
    routing weights, else the hidden units again.
    """
    fused = first.dim() == 2
    tokens = call.index.shape[0] if summed else 0
    made = call.rows(first, call.slots + tokens, column_tiles)
    assert made.scale is not None
    arguments: Arguments = dict(
        rows_ptr=first,
        index_ptr=call.index,
        weight_ptr=call.weight,
        out_ptr=made.values,
        out_scale_ptr=made.scale,
        rows=units * rows_per_unit(call.gate),
        units=units,
        slots=call.slots,
        steps=made.steps,
        **call.gating(),
        FUSED=fused,
        PARTS=1 if fused else first.shape[0],
        EXPERTS=call.experts,
        TOP_K=call.choices,
        STEP=COLUMNS * made.unroll,
    )
    grid = (call.slots + tokens, made.steps)
    call.add("hidden", hidden_kernel, grid, arguments, warps=4)
    each, sums = (
        Rows(made.values[s], made.scale[s], made.unroll)
        for s in (slice(call.slots), slice(call.slots, None))
    )
    return each, sums if summed else each


def sums(call: Call, h: Rows) -> Rows:
    """Return sum_j w_j h_j of every token, from 16-bit hidden units."""
    tokens, width = call.index.shape[0], h.values.shape[1]
    out = h.values.new_empty((tokens, width))
    arguments: Arguments = dict(
        h_ptr=h.values,
        index_ptr=call.index,
        weight_ptr=call.weight,
        out_ptr=out,
        width=width,
        EXPERTS=call.experts,
        TOP_K=call.choices,
        BLOCK=1024,
    )
    call.add("sums", sums_kernel, (tokens, -(-width // 1024)), arguments, warps=4)
    return Rows(out, None, h.unroll)


def combine(
    call: Call,
    y: Tensor,
    shared: Tensor | None,
    c: Tensor | None,
    basis: Tensor | None,
    post_norm: Tensor | None,
    eps: float,
    out: Tensor,
) -> None:
    """Fill out [T, D] from rows y [parts, S, D], the shared mean and basis^T c."""
    tokens, columns = out.shape
    rank = 0 if c is None else c.shape[2]
    common: Arguments = dict(
        rows_ptr=y,
        index_ptr=call.index,
        weight_ptr=call.weight,
        shared_ptr=shared,
        c_ptr=c,
        basis_ptr=None if c is None or basis is None else basis.contiguous(),
        out_ptr=out,
        columns=columns,
        slots=call.slots,
        c_parts=0 if c is None else c.shape[0],
        rank=rank,
        EXPERTS=call.experts,
        TOP_K=call.choices,
        PARTS=y.shape[0],
        SHARED=0 if shared is None else shared.shape[0],
    )
    if post_norm is not None:
        common |= dict(norm_ptr=post_norm.contiguous(), eps=eps, BLOCK=power_of_two(columns))
        limit = 128 if call.card.name.startswith("sm_") else 0
        warps = min(max(power_of_two(columns) // 512, 4), 16)
        call.add("norm", norm_kernel, (tokens,), common, warps, registers=limit)
    else:
        block = 256 if y.dtype == torch.float32 or c is not None else 1024
        common |= dict(CHOICES=power_of_two(call.choices), BLOCK=block, RANK=power_of_two(rank, 16))
        grid = (tokens, -(-columns // block))
        call.add("combine", combine_kernel, grid, common, warps=4)
