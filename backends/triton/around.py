"""What stands around the two grouped products of a layer: routing and fixed point before, the gate between, the sum after.

  count_kernel     how many slots go to each expert, where there are many slots
  prepare_kernel   slots sorted by expert into blocks; x as fixed point; z = basis x of the shared basis
  hidden_kernel    sum over parts, the gate where the product didn't apply it, hidden units as fixed point
  sums_kernel      sum_j w_tj h_j of bfloat16 hidden units
  combine_kernel   y_t = sum_j w_tj (expert j's output) + what is shared
  norm_kernel      the same where a family normalises each expert's output before the sum

A slot is one choice t * k + j. A choice outside 0..E-1 is in no block; nothing reads what its rows hold, and it counts as zero (the
reference raises IndexError, which a kernel can't). No program waits for another and no order of addition varies, and every shape
depends on the shapes of the inputs alone, so a CUDA graph can hold all of it.
"""

import triton
import triton.language as tl

from moecc.backends.triton.chain import after_last, let_next_start
from moecc.backends.triton.gates import activation, apply_gate
from moecc.backends.triton.grouped import fixed_point, paired, peak_of

GROUP = tl.constexpr(4)  # experts of one program of `_route_counted`: 16 bits each of 64


@triton.jit
def _route(
    e, index_ptr, slots_ptr, block_expert_ptr, slots, blocks, EXPERTS: tl.constexpr, BINS: tl.constexpr, TOKENS: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """Blocks of expert e. Every program counts all experts, and so knows where its own blocks start.

    slots_ptr i32 [blocks * TOKENS] and block_expert_ptr i32 [blocks], as grouped_kernel reads them."""
    lane, bins = tl.arange(0, CHUNK), tl.arange(0, BINS)
    counts = tl.zeros([BINS], tl.int32)
    for start in range(0, slots, CHUNK):
        index = tl.load(index_ptr + start + lane, mask=start + lane < slots, other=EXPERTS)
        index = tl.where((index >= 0) & (index < EXPERTS), index, BINS - 1)  # BINS > EXPERTS
        counts += tl.histogram(index.to(tl.int32), BINS)
    needed = tl.where(bins < EXPERTS, (counts + TOKENS - 1) // TOKENS, 0)
    first = tl.sum(tl.where(bins < e, needed, 0))
    count, own = tl.sum(tl.where(bins == e, counts, 0)), tl.sum(tl.where(bins == e, needed, 0))
    base = slots_ptr + first * TOKENS
    placed = 0
    for start in range(0, slots, CHUNK):
        index = tl.load(index_ptr + start + lane, mask=start + lane < slots, other=EXPERTS)
        mine = (index == e).to(tl.int32)
        rank = placed + tl.cumsum(mine, 0) - 1
        tl.store(base + rank, start + lane, mask=mine != 0)
        placed += tl.sum(mine)
    rest = count + tl.arange(0, TOKENS)
    tl.store(base + rest, tl.full([TOKENS], -1, tl.int32), mask=rest < own * TOKENS)
    last = (
        blocks if e == EXPERTS - 1 else first + own
    )  # the last expert's program marks the blocks that nobody needs
    for start in range(first, last, CHUNK):
        b = start + lane
        tl.store(block_expert_ptr + b, tl.where(b < first + own, e, -1), mask=b < last)


@triton.jit(do_not_specialize=["slots", "span"])
def count_kernel(
    index_ptr,  # i64 or i32 [slots]
    counts_ptr,  # i32 [segments, BINS]
    slots, span, EXPERTS: tl.constexpr, BINS: tl.constexpr, CHUNK: tl.constexpr, HOPPER: tl.constexpr,
):  # fmt: skip
    """Grid segments of span slots each, a multiple of CHUNK. BINS, a power of two, is at least EXPERTS."""
    after_last(HOPPER)
    let_next_start(HOPPER)
    segment, lane, bins = tl.program_id(0), tl.arange(0, CHUNK), tl.arange(0, BINS)
    counts = tl.zeros([BINS], tl.int32)
    for start in range(segment * span, tl.minimum((segment + 1) * span, slots), CHUNK):
        index = tl.load(index_ptr + start + lane, mask=start + lane < slots, other=-1)
        chosen = (index >= 0) & (index < EXPERTS)
        counts += tl.histogram(tl.where(chosen, index, 0).to(tl.int32), BINS, chosen)
    tl.store(counts_ptr + segment * BINS + bins, counts)


@triton.jit
def _route_counted(
    group, segment, index_ptr, counts_ptr, slots_ptr, block_expert_ptr, slots, blocks, segments, span, EXPERTS: tl.constexpr,
    BINS: tl.constexpr, SEGMENTS: tl.constexpr, TOKENS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One segment's slots of GROUP experts, by what count_kernel counted. SEGMENTS, a power of two, is at least segments.

    One scan ranks the slots of all of them: each expert counts in 16 bits of its own, which CHUNK doesn't overflow."""
    e, lane, bins, own = group * GROUP, tl.arange(0, CHUNK), tl.arange(0, BINS), tl.arange(0, GROUP)
    start, stop = (
        segment * span,
        tl.minimum((segment + 1) * span, slots),
    )  # all loads first, so that none waits
    index = tl.load(index_ptr + start + lane, mask=start + lane < stop, other=-1)
    part = tl.arange(0, SEGMENTS)[:, None]
    row, inside = counts_ptr + part * BINS, part < segments
    mine = tl.load(row + e + own[None, :], mask=inside, other=0)
    before = tl.load(row + bins[None, :], mask=inside & (bins < e)[None, :], other=0)
    first, count = tl.sum((tl.sum(before, 0) + TOKENS - 1) // TOKENS), tl.sum(mine, 0)
    needed = (count + TOKENS - 1) // TOKENS
    first += tl.sum(tl.where(own[:, None] < own[None, :], needed[:, None], 0), 0)
    place = first * TOKENS + tl.sum(tl.where(part < segment, mine, 0), 0)
    for here in range(start, stop, CHUNK):
        following = tl.load(
            index_ptr + here + CHUNK + lane, mask=here + CHUNK + lane < stop, other=-1
        )
        chosen = (index >= e) & (index < tl.minimum(e + GROUP, EXPERTS))
        which = tl.where(chosen, index - e, 0).to(tl.int32)
        ones = chosen.to(tl.int64) << (which * 16)
        rank = ((tl.cumsum(ones, 0) >> (which * 16)) & 0xFFFF).to(tl.int32) - 1
        tl.store(slots_ptr + tl.gather(place, which, 0) + rank, here + lane, mask=chosen)
        place += ((tl.sum(ones) >> (own * 16)) & 0xFFFF).to(tl.int32)
        index = following
    if segment == 0:
        t = tl.arange(0, TOKENS)[None, :]
        rest, room = count[:, None] + t, (needed * TOKENS)[:, None]
        tl.store(
            slots_ptr + (first * TOKENS)[:, None] + rest,
            tl.full([GROUP, TOKENS], -1, tl.int32),
            mask=rest < room,
        )
        for start in range(0, tl.max(needed), TOKENS):
            b = start + t
            tl.store(
                block_expert_ptr + first[:, None] + b,
                e + own[:, None] + 0 * t,
                mask=b < needed[:, None],
            )
        if e + GROUP >= EXPERTS:  # the last experts' program marks the blocks that nobody needs
            for start in range(tl.max(first + needed), blocks, CHUNK):
                tl.store(
                    block_expert_ptr + start + lane,
                    tl.full([CHUNK], -1, tl.int32),
                    mask=start + lane < blocks,
                )


@triton.jit
def _store_fixed(values, out_ptr, out_scale_ptr, row, block, steps, STEP: tl.constexpr):
    """One block f32 [STEP] of a row -> i8 [rows, 2, steps * STEP], f32 [rows, steps]."""
    hi, lo, scale = fixed_point(values, peak_of(values, False))
    out = out_ptr + row * (2 * steps * STEP) + block * STEP + tl.arange(0, STEP)
    tl.store(out, hi)
    tl.store(out + steps * STEP, lo)
    tl.store(out_scale_ptr + row * steps + block, scale)


@triton.jit
def _project(x_ptr, basis_ptr, z_ptr, group, part, tokens, columns, span, rank, RANK: tl.constexpr):
    """z [z_parts, tokens, RANK]: this part's share of basis x for 16 tokens, in float32. basis [rank, columns]."""
    t, r, lane = group * 16 + tl.arange(0, 16), tl.arange(0, RANK), tl.arange(0, 32)
    z = tl.zeros([16, RANK], tl.float32)
    for start in range(part * span, tl.minimum((part + 1) * span, columns), 32):
        d = start + lane
        at = t.to(tl.int64)[:, None] * columns + d[None, :]
        x = tl.load(x_ptr + at, mask=(t < tokens)[:, None] & (d < columns)[None, :], other=0.0).to(
            tl.float32
        )
        inside = (r < rank)[None, :] & (d < columns)[:, None]
        b = tl.load(basis_ptr + r[None, :] * columns + d[:, None], mask=inside, other=0.0).to(
            tl.float32
        )
        z = tl.dot(x, b, z, input_precision="ieee")
    at = (part * tokens + t).to(tl.int64)[:, None] * RANK + r[None, :]
    tl.store(z_ptr + at, z, mask=(t < tokens)[:, None])


@triton.jit(
    do_not_specialize=["tokens", "slots", "blocks", "segments", "span", "z_parts", "z_span"]
)
def prepare_kernel(
    x_ptr,  # [tokens, columns] of any float type
    index_ptr,  # i64 or i32 [slots]
    counts_ptr,  # i32 [segments, BINS] of count_kernel, or None: each program counts for itself
    basis_ptr, z_ptr,  # [rank, columns] and f32 [z_parts, tokens, RANK], or None
    out_ptr, out_scale_ptr,  # i8 [tokens, 2, steps * STEP], f32 [tokens, steps]; or 16-bit [tokens, steps * STEP], None
    slots_ptr, block_expert_ptr,  # i32 [blocks * TOKENS], i32 [blocks]
    tokens, columns, steps, slots, blocks, segments, span, z_parts, z_span, rank,
    EXPERTS: tl.constexpr, BINS: tl.constexpr, SEGMENTS: tl.constexpr, TOKENS: tl.constexpr, CHUNK: tl.constexpr,
    STEP: tl.constexpr, RANK: tl.constexpr, HOPPER: tl.constexpr,
):  # fmt: skip
    """Grid routes + tokens * steps, and ceil(tokens / 16) * z_parts more with a basis, for z_span columns each.

    routes: EXPERTS, or with counts segments * ceil(EXPERTS / GROUP)."""
    after_last(HOPPER)
    let_next_start(HOPPER)
    program = tl.program_id(0)
    if counts_ptr is None:
        routes = EXPERTS
    else:
        routes = segments * ((EXPERTS + GROUP - 1) // GROUP)
    if program < routes:
        if counts_ptr is None:
            _route(
                program,
                index_ptr,
                slots_ptr,
                block_expert_ptr,
                slots,
                blocks,
                EXPERTS,
                BINS,
                TOKENS,
                CHUNK,
            )
        else:
            _route_counted(
                program // segments, program % segments, index_ptr, counts_ptr, slots_ptr, block_expert_ptr, slots, blocks,
                segments, span, EXPERTS, BINS, SEGMENTS, TOKENS, CHUNK,
            )  # fmt: skip
    elif program < routes + tokens * steps:
        token, block = (program - routes) // steps, (program - routes) % steps
        place = block * STEP + tl.arange(0, STEP)
        d = place if out_scale_ptr is not None else paired(place)
        x = tl.load(x_ptr + token.to(tl.int64) * columns + d, mask=d < columns, other=0.0)
        if out_scale_ptr is not None:
            _store_fixed(
                x.to(tl.float32), out_ptr, out_scale_ptr, token.to(tl.int64), block, steps, STEP
            )
        else:
            tl.store(out_ptr + token.to(tl.int64) * (steps * STEP) + place, x)
    else:
        if basis_ptr is not None:
            rest = program - routes - tokens * steps
            _project(
                x_ptr,
                basis_ptr,
                z_ptr,
                rest // z_parts,
                rest % z_parts,
                tokens,
                columns,
                z_span,
                rank,
                RANK,
            )


@triton.jit
def _width(index, width, EXPERTS: tl.constexpr):
    """How many columns a slot's rows have: none where its choice is no expert."""
    return tl.where((index >= 0) & (index < EXPERTS), width, 0)


@triton.jit
def _hidden(
    rows_ptr, index_ptr, slot, f, rows, units, slots, alpha, limit, ACT: tl.constexpr, GATE: tl.constexpr, FUSED: tl.constexpr,
    PARTS: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """Hidden units f of one slot, f32; zero where its choice is no expert."""
    real = f < _width(tl.load(index_ptr + slot), units, EXPERTS)
    inside = f < units  # rows don't wait for the choice
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
    rows_ptr,  # [parts, slots, rows] as grouped_kernel wrote it, with FUSED [slots, units]
    index_ptr, weight_ptr,  # [slots]: choices and routing weights
    out_ptr, out_scale_ptr,  # i8 [slots (+ tokens), 2, steps * STEP], f32 [slots (+ tokens), steps]
    rows, units, slots, steps, alpha, limit,
    ACT: tl.constexpr, GATE: tl.constexpr, FUSED: tl.constexpr, PARTS: tl.constexpr, EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr, STEP: tl.constexpr, HOPPER: tl.constexpr,
):  # fmt: skip
    """Grid (slots, steps); with tokens more in the first, row slots + t is sum_j w_tj h_tj of token t, for a shared mean."""
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
        _store_fixed(h, out_ptr, out_scale_ptr, row, block, steps, STEP)
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
        _store_fixed(total, out_ptr, out_scale_ptr, row, block, steps, STEP)


@triton.jit
def sums_kernel(
    h_ptr,  # 16-bit [slots, width]
    index_ptr, weight_ptr,  # [slots]
    out_ptr,  # 16-bit [tokens, width]
    width, EXPERTS: tl.constexpr, TOP_K: tl.constexpr, BLOCK: tl.constexpr, HOPPER: tl.constexpr,
):  # fmt: skip
    """Grid (tokens, ceil(width / BLOCK)): sum_j w_tj h_tj of every token, for a shared mean."""
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
    rows_ptr,  # f32 [parts, slots, columns] as grouped_kernel wrote it; or of x's type, one part
    index_ptr, weight_ptr,  # [slots]
    shared_ptr,  # f32 [SHARED, tokens, columns] or None
    c_ptr, basis_ptr,  # f32 [c_parts, slots, rank] and [rank, columns], or None
    out_ptr,  # [tokens, columns]
    columns, slots, c_parts, rank,
    EXPERTS: tl.constexpr, TOP_K: tl.constexpr, PARTS: tl.constexpr, SHARED: tl.constexpr, CHOICES: tl.constexpr,
    BLOCK: tl.constexpr, RANK: tl.constexpr, HOPPER: tl.constexpr,
):  # fmt: skip
    """Grid (tokens, ceil(columns / BLOCK)). CHOICES, a power of two, is at least TOP_K."""
    after_last(HOPPER)
    token, j = tl.program_id(0).to(tl.int64), tl.arange(0, CHOICES)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    slot = token * TOP_K + j
    index = tl.load(index_ptr + slot, mask=j < TOP_K, other=-1)
    chosen = (index >= 0) & (index < EXPERTS)
    weight = tl.load(weight_ptr + slot, mask=j < TOP_K, other=0.0).to(tl.float32)
    if rows_ptr.dtype.element_ty == tl.float32:
        inside = (j < TOP_K)[:, None] & (d < columns)[None, :]  # rows don't wait for the choices
        y = tl.zeros([CHOICES, BLOCK], tl.float32)
        for piece in tl.static_range(PARTS):
            y += tl.load(
                rows_ptr + (piece * slots + slot)[:, None] * columns + d[None, :],
                mask=inside,
                other=0.0,
            )
        total = tl.sum(tl.where(chosen[:, None], y, 0.0) * weight[:, None], 0)
    else:  # many tokens, rounded: one choice after the other, so that a thread adds up columns of its own
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
    rows_ptr, index_ptr, weight_ptr,  # as combine_kernel's
    shared_ptr,  # f32 [SHARED, slots, columns] or None
    c_ptr, basis_ptr,
    norm_ptr,  # [columns]
    out_ptr,
    columns, slots, c_parts, rank, eps,
    EXPERTS: tl.constexpr, TOP_K: tl.constexpr, PARTS: tl.constexpr, SHARED: tl.constexpr, BLOCK: tl.constexpr,
    HOPPER: tl.constexpr,
):  # fmt: skip
    """Grid tokens. BLOCK, a power of two, is at least columns. Scale, then normalise: `moecc.ir.ops._post_norm`."""
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
