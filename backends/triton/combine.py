"""The kernels that follow a product: the gate after gate_up, and the sum over choices after down.

  hidden_kernel    sum of parts, the gate if the product did not apply it, hidden units as fixed
                   point
  sums_kernel      sum_j w_tj h_j of 16-bit hidden units
  combine_kernel   y_t = sum_j w_tj (output of expert j) + shared terms
  norm_kernel      the same for a family that normalises each expert's output before the sum

A slot is one choice t * k + j. A choice outside 0..E-1 counts as zero; its rows are never used. No
program waits for another, and no order of addition varies.
"""

import triton
import triton.language as tl

from moecc.backends.triton.chain import after_last, let_next_start
from moecc.backends.triton.fixed import store_fixed
from moecc.backends.triton.gates import activation, apply_gate


@triton.jit
def _width(index, width, EXPERTS: tl.constexpr):
    """Return `width` if index names an expert, else 0: the columns of a slot's rows to read."""
    return tl.where((index >= 0) & (index < EXPERTS), width, 0)


@triton.jit
def _hidden(
    rows_ptr,
    index_ptr,
    slot,
    f,
    rows,
    units,
    slots,
    alpha,
    limit,
    ACT: tl.constexpr,
    GATE: tl.constexpr,
    FUSED: tl.constexpr,
    PARTS: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """Return hidden units f of one slot, f32; zeros if its choice names no expert."""
    real = f < _width(tl.load(index_ptr + slot), units, EXPERTS)
    inside = f < units  # not masked by `real`: these loads need not wait for the choice
    if FUSED:
        h = tl.load(rows_ptr + slot * units + f, mask=inside, other=0.0).to(tl.float32)
    else:
        g, u = tl.zeros(f.shape, tl.float32), tl.zeros(f.shape, tl.float32)
        for part in tl.static_range(PARTS):
            row = rows_ptr + (part * slots + slot) * rows + f
            g += tl.load(row, mask=inside, other=0.0).to(tl.float32)
            if GATE != "none":
                u += tl.load(row + rows // 2, mask=inside, other=0.0).to(tl.float32)
        if GATE == "none":
            h = activation(g, ACT)
        else:
            h = apply_gate(g, u, alpha, limit, ACT, GATE)
    return tl.where(real, h, 0.0)


@triton.jit(do_not_specialize=["slots"])
def hidden_kernel(
    rows_ptr,  # [parts, slots, rows] as grouped_kernel wrote it; FUSED: [slots, units]
    index_ptr,  # [slots]: choices
    weight_ptr,  # [slots]: routing weights
    out_ptr,  # i8 [slots (+ tokens), 2, steps * STEP]
    out_scale_ptr,  # f32 [slots (+ tokens), steps]
    rows,
    units,
    slots,
    steps,
    alpha,
    limit,
    ACT: tl.constexpr,
    GATE: tl.constexpr,
    FUSED: tl.constexpr,
    PARTS: tl.constexpr,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    STEP: tl.constexpr,
    HOPPER: tl.constexpr,
):
    """Grid: (slots, steps), or (slots + tokens, steps) if a shared mean needs sums.

    Row slots + t is then sum_j w_tj h_tj of token t.
    """
    after_last(HOPPER)
    let_next_start(HOPPER)
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    f = block * STEP + tl.arange(0, STEP)
    if row < slots:
        h = _hidden(
            rows_ptr,
            index_ptr,
            row,
            f,
            rows,
            units,
            slots,
            alpha,
            limit,
            ACT,
            GATE,
            FUSED,
            PARTS,
            EXPERTS,
        )
        store_fixed(h, out_ptr, out_scale_ptr, row, block, steps, STEP)
    else:
        total = tl.zeros([STEP], tl.float32)
        for j in range(TOP_K):
            slot = (row - slots) * TOP_K + j
            h = _hidden(
                rows_ptr,
                index_ptr,
                slot,
                f,
                rows,
                units,
                slots,
                alpha,
                limit,
                ACT,
                GATE,
                FUSED,
                PARTS,
                EXPERTS,
            )
            total += tl.load(weight_ptr + slot).to(tl.float32) * h
        store_fixed(total, out_ptr, out_scale_ptr, row, block, steps, STEP)


@triton.jit
def sums_kernel(
    h_ptr,  # 16-bit floats [slots, width]
    index_ptr,  # [slots]
    weight_ptr,  # [slots]
    out_ptr,  # 16-bit floats [tokens, width]
    width,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
    HOPPER: tl.constexpr,
):
    """Store sum_j w_tj h_tj of every token, for a shared mean.

    Grid: (tokens, ceil(width / BLOCK)).
    """
    after_last(HOPPER)
    let_next_start(HOPPER)
    token, f = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for j in range(TOP_K):
        slot = token * TOP_K + j
        real = f < _width(tl.load(index_ptr + slot), width, EXPERTS)
        weight = tl.load(weight_ptr + slot).to(tl.float32)
        total += weight * tl.load(h_ptr + slot * width + f, mask=real, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * width + f, total.to(out_ptr.dtype.element_ty), mask=f < width)


@triton.jit(do_not_specialize=["slots", "c_parts"])
def combine_kernel(
    rows_ptr,  # f32 [parts, slots, columns] as grouped_kernel wrote it; or one part of x's type
    index_ptr,  # [slots]
    weight_ptr,  # [slots]
    shared_ptr,  # f32 [SHARED, tokens, columns] or None
    c_ptr,  # f32 [c_parts, slots, rank] or None
    basis_ptr,  # [rank, columns] or None
    out_ptr,  # [tokens, columns]
    columns,
    slots,
    c_parts,
    rank,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    PARTS: tl.constexpr,
    SHARED: tl.constexpr,
    CHOICES: tl.constexpr,
    BLOCK: tl.constexpr,
    RANK: tl.constexpr,
    HOPPER: tl.constexpr,
):
    """Grid: (tokens, ceil(columns / BLOCK)). CHOICES is a power of two and at least TOP_K."""
    after_last(HOPPER)
    token, j = tl.program_id(0).to(tl.int64), tl.arange(0, CHOICES)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    slot = token * TOP_K + j
    index = tl.load(index_ptr + slot, mask=j < TOP_K, other=-1)
    chosen = (index >= 0) & (index < EXPERTS)
    weight = tl.load(weight_ptr + slot, mask=j < TOP_K, other=0.0).to(tl.float32)
    if rows_ptr.dtype.element_ty == tl.float32:
        # not masked by `chosen`: these loads need not wait for the choices
        inside = (j < TOP_K)[:, None] & (d < columns)[None, :]
        y = tl.zeros([CHOICES, BLOCK], tl.float32)
        for piece in tl.static_range(PARTS):
            y += tl.load(
                rows_ptr + (piece * slots + slot)[:, None] * columns + d[None, :],
                mask=inside,
                other=0.0,
            )
        total = tl.sum(tl.where(chosen[:, None], y, 0.0) * weight[:, None], 0)
    else:  # many tokens, rounded rows: loop over choices, so that each thread adds its own columns
        total = tl.zeros([BLOCK], tl.float32)
        for i in tl.static_range(TOP_K):
            one = token * TOP_K + i
            y = tl.load(rows_ptr + one * columns + d, mask=d < columns, other=0.0).to(tl.float32)
            width = _width(tl.load(index_ptr + one), columns, EXPERTS)
            total += tl.where(d < width, y, 0.0) * tl.load(weight_ptr + one).to(tl.float32)
    for piece in tl.static_range(SHARED):
        total += tl.load(
            shared_ptr + (piece * (slots // TOP_K) + token) * columns + d,
            mask=d < columns,
            other=0.0,
        )
    if c_ptr is not None:
        r = tl.arange(0, RANK)
        c = tl.zeros([CHOICES, RANK], tl.float32)
        for part in range(c_parts):
            row = (part * slots + slot)[:, None] * rank
            c += tl.load(
                c_ptr + row + r[None, :], mask=chosen[:, None] & (r < rank)[None, :], other=0.0
            )
        low = tl.sum(c * weight[:, None], 0)
        inside = (r < rank)[:, None] & (d < columns)[None, :]
        basis = tl.load(basis_ptr + r[:, None] * columns + d[None, :], mask=inside, other=0.0).to(
            tl.float32
        )
        total += tl.sum(low[:, None] * basis, 0)
    tl.store(out_ptr + token * columns + d, total.to(out_ptr.dtype.element_ty), mask=d < columns)


@triton.jit(do_not_specialize=["slots", "c_parts"])
def norm_kernel(
    rows_ptr,  # like combine_kernel's, as are the next two
    index_ptr,
    weight_ptr,
    shared_ptr,  # f32 [SHARED, slots, columns] or None
    c_ptr,
    basis_ptr,
    norm_ptr,  # [columns]
    out_ptr,
    columns,
    slots,
    c_parts,
    rank,
    eps,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    PARTS: tl.constexpr,
    SHARED: tl.constexpr,
    BLOCK: tl.constexpr,
    HOPPER: tl.constexpr,
):
    """Grid: tokens. BLOCK is a power of two and at least columns.

    Rows are scaled first and normalised then, as in `moecc.ir.ops._post_norm`.
    """
    after_last(HOPPER)
    token, d = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = d < columns
    norm = tl.load(norm_ptr + d, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for j in range(TOP_K):
        slot = token * TOP_K + j
        width, weight = (
            _width(tl.load(index_ptr + slot), columns, EXPERTS),
            tl.load(weight_ptr + slot).to(tl.float32),
        )
        chosen = d < width
        y = tl.zeros([BLOCK], tl.float32)
        for piece in tl.static_range(PARTS):
            y += tl.load(
                rows_ptr + (piece * slots + slot) * columns + d, mask=chosen, other=0.0
            ).to(tl.float32)
        for piece in tl.static_range(SHARED):
            y += tl.load(shared_ptr + (piece * slots + slot) * columns + d, mask=chosen, other=0.0)
        if c_ptr is not None:
            for r in range(rank):
                c = 0.0
                for part in range(c_parts):
                    c += tl.load(
                        c_ptr + (part * slots + slot) * rank + r, mask=width > 0, other=0.0
                    )
                y += c * tl.load(basis_ptr + r * columns + d, mask=inside, other=0.0).to(tl.float32)
        y = y * norm
        y = y * tl.rsqrt(tl.sum(y * y) / columns + eps)
        total += tl.where(chosen, weight * y, 0.0)
    tl.store(out_ptr + token * columns + d, total.to(out_ptr.dtype.element_ty), mask=inside)
