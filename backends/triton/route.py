"""Routing in a kernel: sort slots by expert into blocks of TOKENS slots.

A slot is one choice t * k + j. A choice outside 0..E-1 enters no block. Nothing reads the rows of
such a slot, and it counts as zero (the reference raises IndexError, which a kernel cannot).

The blocks are slots i32 [blocks * TOKENS], with -1 in the unused places of a block, and experts
i32 [blocks], with -1 for an unused block. `grouped_kernel` reads both.
"""

import triton
import triton.language as tl

from moecc.backends.triton.chain import after_last, let_next_start

# experts per program of `route_counted`; each of them counts in 16 of 64 bits
GROUP = tl.constexpr(4)


@triton.jit
def route(
    e,
    index_ptr,
    slots_ptr,
    block_expert_ptr,
    slots,
    blocks,
    EXPERTS: tl.constexpr,
    BINS: tl.constexpr,
    TOKENS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Write the blocks of expert e.

    Every program counts the slots of all experts, so it knows where its own blocks start. BINS, a
    power of two, exceeds EXPERTS: the last bin counts the choices that name no expert.
    """
    lane, bins = tl.arange(0, CHUNK), tl.arange(0, BINS)
    counts = tl.zeros([BINS], tl.int32)
    for start in range(0, slots, CHUNK):
        index = tl.load(index_ptr + start + lane, mask=start + lane < slots, other=EXPERTS)
        index = tl.where((index >= 0) & (index < EXPERTS), index, BINS - 1)
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
    # the last expert's program also marks the unused blocks
    last = blocks if e == EXPERTS - 1 else first + own
    for start in range(first, last, CHUNK):
        b = start + lane
        tl.store(block_expert_ptr + b, tl.where(b < first + own, e, -1), mask=b < last)


@triton.jit(do_not_specialize=["slots", "span"])
def count_kernel(
    index_ptr,  # i64 or i32 [slots]
    counts_ptr,  # i32 [segments, BINS]
    slots,
    span,
    EXPERTS: tl.constexpr,
    BINS: tl.constexpr,
    CHUNK: tl.constexpr,
    HOPPER: tl.constexpr,
):
    """Count the slots of each expert in one segment.

    Grid: segments. A segment has span slots, a multiple of CHUNK. BINS is a power of two and at
    least EXPERTS.
    """
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
def route_counted(
    group,
    segment,
    index_ptr,
    counts_ptr,
    slots_ptr,
    block_expert_ptr,
    slots,
    blocks,
    segments,
    span,
    EXPERTS: tl.constexpr,
    BINS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    TOKENS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Write one segment's slots of GROUP experts, from the counts of `count_kernel`.

    One scan ranks the slots of all GROUP experts: each expert counts in 16 bits of its own, which
    CHUNK does not overflow. SEGMENTS is a power of two and at least segments.
    """
    e, lane, bins, own = group * GROUP, tl.arange(0, CHUNK), tl.arange(0, BINS), tl.arange(0, GROUP)
    start, stop = segment * span, tl.minimum((segment + 1) * span, slots)
    # issue every load first, so that none waits for another
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
        if e + GROUP >= EXPERTS:  # the program of the last experts also marks the unused blocks
            for start in range(tl.max(first + needed), blocks, CHUNK):
                tl.store(
                    block_expert_ptr + start + lane,
                    tl.full([CHUNK], -1, tl.int32),
                    mask=start + lane < blocks,
                )
