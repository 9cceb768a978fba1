"""What one program of the grouped product does, in Triton.

`moecc.backends.triton.grouped` describes the method and calls `multiply`.
"""

import triton
import triton.language as tl

from moecc.backends.triton.chain import let_next_start
from moecc.backends.triton.decode import (
    as_bfloat16,
    as_int8,
    decode_step,
    pair_columns,
    paired,
    pairs,
    place_of,
    read_step,
)
from moecc.backends.triton.fixed import exact_sum, fixed_point, peak_of
from moecc.backends.triton.gates import activation, apply_gate


@triton.jit
def _fence(one):
    """Make what cp.async wrote to shared memory visible to wgmma (PTX ISA, fence.proxy.async).

    Triton before 3.7 leaves this fence out (its pull request 9610). one: any scalar, as the
    assembly's operand.
    """
    tl.inline_asm_elementwise(
        "fence.proxy.async.shared::cta; mov.u32 $0, $1;",
        "=r,r",
        [one],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _finished(total):
    """Return total unchanged, after the product that computes it has ended.

    Otherwise triton lets wgmma run into the next step, which may write the registers that wgmma
    still reads. PTX ISA, wgmma.wait_group, forbids that; see triton's issue 9433.
    """
    return tl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=f,f", [total], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def _low_rank(
    y,
    z_ptr,
    coef_ptr,
    coef_scale_ptr,
    e,
    token,
    held,
    pair_token,
    pair_held,
    row,
    real,
    rows,
    z_parts,
    z_tokens,
    rank,
    RANK: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    HALF: tl.constexpr,
):
    """Return y + coef_scale * (coef z), f32 [ROWS, TOKENS].

    z is f32 [z_parts, tokens, RANK], coef i8 [E, rows, rank].
    """
    r = tl.arange(0, RANK)
    at = (e * rows + row)[:, None] * rank + r[None, :]
    coef = tl.load(coef_ptr + at, mask=real[:, None] & (r < rank)[None, :], other=0)
    factor = tl.load(coef_scale_ptr + e * rows + row, mask=real, other=0.0).to(tl.float32)[:, None]
    if HALF:  # accumulates in y's own registers
        z = tl.zeros([RANK, TOKENS], tl.float32)
        for part in range(z_parts):
            z += tl.load(
                z_ptr + (part * z_tokens + token)[None, :] * RANK + r[:, None],
                mask=held[None, :],
                other=0.0,
            )
        y = tl.dot(coef.to(tl.float32) * factor, z, y, input_precision="tf32")
    else:
        z = tl.zeros([RANK, 2 * TOKENS], tl.float32)
        for part in range(z_parts):
            both = (part * z_tokens + pair_token)[None, :] * RANK + r[:, None]
            z += tl.load(z_ptr + both, mask=pair_held[None, :], other=0.0)
        hi, lo, z_scale = fixed_point(z, peak_of(z, True))
        # Each token stands twice and a column picks hi or lo: sm_90 does not allow the reshape in
        # shared memory that a join of hi and lo would need.
        pair = tl.where((tl.arange(0, 2 * TOKENS) % 2 == 0)[None, :], hi, lo)
        z_scale, _ = tl.split(tl.reshape(z_scale, [1, TOKENS, 2]))
        y += exact_sum(tl.dot(coef, pair), ROWS, TOKENS) * z_scale * factor
    return y


@triton.jit
def multiply(
    x_ptr,
    x_scale_ptr,
    words_ptr,
    signs_ptr,
    table,
    scale_ptr,
    bias_ptr,
    shared_ptr,
    z_ptr,
    coef_ptr,
    coef_scale_ptr,
    out_ptr,
    group,
    part,
    e,
    slot,  # i32 [TOKENS]
    pair_slot,  # i32 [2 * TOKENS]: each slot twice
    rows,
    columns,
    out_width,
    row_tiles,
    column_tiles,
    steps,
    steps_per_part,
    slots,
    z_parts,
    z_tokens,
    rank,
    alpha,
    limit,
    BITS: tl.constexpr,
    GATED: tl.constexpr,
    FUSED: tl.constexpr,
    ACT: tl.constexpr,
    GATE: tl.constexpr,
    TOP_K: tl.constexpr,
    TOKENS: tl.constexpr,
    HEIGHT: tl.constexpr,
    UNROLL: tl.constexpr,
    TAIL: tl.constexpr,
    RANK: tl.constexpr,
    SHARED: tl.constexpr,
    COPIES: tl.constexpr,
    HALF: tl.constexpr,
    HOPPER: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Multiply row group `group` of expert e with TOKENS slots, as `grouped_kernel` says."""
    STEP: tl.constexpr = 128 * UNROLL
    ROWS: tl.constexpr = 64 * HEIGHT
    # the interpreter computes wrongly in bfloat16
    FLOAT: tl.constexpr = tl.float32 if UPCAST else x_ptr.dtype.element_ty
    pair = tl.arange(0, 2 * TOKENS)
    held = slot >= 0
    token = tl.where(held, slot // TOP_K, 0).to(tl.int64)
    pair_held = pair_slot >= 0
    pair_token = tl.where(pair_held, pair_slot // TOP_K, 0).to(tl.int64)
    if HALF:
        x_ptrs, x_held = x_ptr + token[None, :] * (steps * STEP), held[None, :]
    else:
        x_ptrs, x_held = (
            x_ptr + (pair_token * 2 + pair % 2)[None, :] * (steps * STEP),
            pair_held[None, :],
        )
    place = group * ROWS + tl.arange(0, ROWS)
    tile = group * HEIGHT

    if GATED:
        units = rows // 2
        unit, up = place // 16 * 8 + place % 8, place // 8 % 2
        row, real = unit + up * units, unit < units
    else:
        row, real = place, place < rows
    factor = tl.load(scale_ptr + e * rows + row, mask=real, other=0.0).to(tl.float32)

    total = tl.zeros([ROWS, TOKENS], tl.float32)
    index, down = e * row_tiles + tile, row_tiles - tile
    for step in range(part * steps_per_part, tl.minimum((part + 1) * steps_per_part, steps)):
        if BITS == 8:
            # one column tile at a time: more would gain nothing and cost registers
            hi_lo = tl.zeros([ROWS, 2 * TOKENS], tl.int32)
            for u in tl.static_range(UNROLL):
                at = step * STEP + u * 128 + tl.arange(0, 128)
                k = paired(at) if HALF else at
                inside = (place < rows)[:, None] & (k < columns)[None, :]
                w = tl.load(
                    words_ptr + (e * rows + place)[:, None] * columns + k[None, :],
                    mask=inside,
                    other=0,
                )
                x = tl.load(x_ptrs + at[:, None], mask=x_held, other=0)
                if HOPPER:
                    _fence(steps)
                if HALF:
                    total = tl.dot(w.to(FLOAT), x.to(FLOAT), total, input_precision="ieee")
                    if HOPPER:
                        total = _finished(total)
                else:
                    hi_lo = tl.dot(w, x, hi_lo, out_dtype=tl.int32)  # triton 3.6 needs out_dtype
        else:
            x = tl.load(x_ptrs + (step * STEP + tl.arange(0, STEP))[:, None], mask=x_held, other=0)
            if HOPPER:
                _fence(steps)
            words, more = read_step(
                words_ptr, signs_ptr, index, down, step, column_tiles, BITS, HEIGHT, UNROLL, TAIL
            )
            p = decode_step(words, more, table, BITS, HEIGHT, UNROLL, COPIES, HOPPER)
            if HALF:
                if HOPPER:
                    low, high = pairs(p)
                    w = as_bfloat16(low, high, ROWS, STEP)
                else:
                    w = as_int8(p, ROWS, STEP).to(FLOAT)
                total = tl.dot(
                    pair_columns(w, ROWS, STEP), x.to(FLOAT), total, input_precision="ieee"
                )
                if HOPPER:
                    total = _finished(total)
            else:
                hi_lo = tl.dot(as_int8(p, ROWS, STEP), x)
        if not HALF:
            x_scale = tl.load(x_scale_ptr + token * steps + step, mask=held, other=0.0)
            total += exact_sum(hi_lo, ROWS, TOKENS) * x_scale[None, :]

    let_next_start(HOPPER)
    y = total * factor[:, None]
    if part == 0:
        if bias_ptr is not None:
            y += tl.load(bias_ptr + e * rows + row, mask=real, other=0.0).to(tl.float32)[:, None]
        for piece in tl.static_range(SHARED):
            rows_of_all = (piece * (slots // TOP_K) + token)[None, :] * rows + row[:, None]
            y += tl.load(shared_ptr + rows_of_all, mask=real[:, None] & held[None, :], other=0.0)
        if z_ptr is not None:
            y = _low_rank(
                y,
                z_ptr,
                coef_ptr,
                coef_scale_ptr,
                e,
                token,
                held,
                pair_token,
                pair_held,
                row,
                real,
                rows,
                z_parts,
                z_tokens,
                rank,
                RANK,
                ROWS,
                TOKENS,
                HALF,
            )

    at = part.to(tl.int64) * slots + slot
    if FUSED and GATED:
        g, u = tl.split(tl.permute(tl.reshape(y, [ROWS // 16, 2, 8, TOKENS]), (0, 2, 3, 1)))
        h = tl.reshape(apply_gate(g, u, alpha, limit, ACT, GATE), [ROWS // 2, TOKENS])
        unit = tile * 32 + tl.arange(0, ROWS // 2)
        mask = (unit < rows // 2)[:, None] & held[None, :]
        unit = place_of(unit) if HALF else unit
        tl.store(
            out_ptr + at[None, :] * out_width + unit[:, None],
            h.to(out_ptr.dtype.element_ty),
            mask=mask,
        )
    else:
        mask = real[:, None] & held[None, :]
        if FUSED:
            y = activation(y, ACT)
            row = place_of(row) if HALF else row
        tl.store(
            out_ptr + at[None, :] * out_width + row[:, None],
            y.to(out_ptr.dtype.element_ty),
            mask=mask,
        )
