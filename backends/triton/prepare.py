"""Everything that precedes the first product of a layer, in one launch.

`prepare_kernel` sorts slots by expert into blocks, stores x as fixed point (or reorders it as
16-bit floats), and multiplies x by the shared basis: z = basis x. No program waits for another, and
no order of addition varies. Every shape depends on input shapes alone, so a CUDA graph can hold the
launch.
"""

import triton
import triton.language as tl

from moecc.backends.triton.chain import after_last, let_next_start
from moecc.backends.triton.decode import paired
from moecc.backends.triton.fixed import store_fixed
from moecc.backends.triton.route import GROUP, route, route_counted


@triton.jit
def _project(x_ptr, basis_ptr, z_ptr, group, part, tokens, columns, span, rank, RANK: tl.constexpr):
    """Store this part's share of z = basis x for 16 tokens, in float32.

    z is [z_parts, tokens, RANK], basis [rank, columns].
    """
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
    counts_ptr,  # i32 [segments, BINS] of count_kernel; None: each program counts for itself
    basis_ptr,  # [rank, columns] or None
    z_ptr,  # f32 [z_parts, tokens, RANK] or None
    out_ptr,  # i8 [tokens, 2, steps * STEP]; or 16-bit floats [tokens, steps * STEP]
    out_scale_ptr,  # f32 [tokens, steps]; or None
    slots_ptr,  # i32 [blocks * TOKENS]
    block_expert_ptr,  # i32 [blocks]
    tokens,
    columns,
    steps,
    slots,
    blocks,
    segments,
    span,
    z_parts,
    z_span,
    rank,
    EXPERTS: tl.constexpr,
    BINS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    TOKENS: tl.constexpr,
    CHUNK: tl.constexpr,
    STEP: tl.constexpr,
    RANK: tl.constexpr,
    HOPPER: tl.constexpr,
):
    """Grid: routes + tokens * steps programs; with a basis ceil(tokens / 16) * z_parts more.

    routes is EXPERTS, or segments * ceil(EXPERTS / GROUP) if counts are given. Each of the z_parts
    covers z_span columns.
    """
    after_last(HOPPER)
    let_next_start(HOPPER)
    program = tl.program_id(0)
    if counts_ptr is None:
        routes = EXPERTS
    else:
        routes = segments * ((EXPERTS + GROUP - 1) // GROUP)
    if program < routes:
        if counts_ptr is None:
            route(
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
            route_counted(
                program // segments,
                program % segments,
                index_ptr,
                counts_ptr,
                slots_ptr,
                block_expert_ptr,
                slots,
                blocks,
                segments,
                span,
                EXPERTS,
                BINS,
                SEGMENTS,
                TOKENS,
                CHUNK,
            )
    elif program < routes + tokens * steps:
        token, block = (program - routes) // steps, (program - routes) % steps
        place = block * STEP + tl.arange(0, STEP)
        d = place if out_scale_ptr is not None else paired(place)
        x = tl.load(x_ptr + token.to(tl.int64) * columns + d, mask=d < columns, other=0.0)
        if out_scale_ptr is not None:
            store_fixed(
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
