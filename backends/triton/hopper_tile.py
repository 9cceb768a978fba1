"""One tile of the persistent product on sm_90, in Gluon: multiply, finish the rows, store them.

`moecc.backends.triton.hopper` describes the method and calls `multiply_tile`.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from moecc.backends.triton.gates import activation, apply_gate
from moecc.backends.triton.hopper_decode import decode_step, read_tile, threads

_PIECE = gl.constexpr(64)  # slots per store of sums


@gluon.jit
def next_buffer(stage, phase, STAGES: gl.constexpr):
    """Return the next buffer of x and the phase of its barriers."""
    last = stage == STAGES - 1
    return gl.where(last, 0, stage + 1), phase ^ last.to(gl.int32)


@gluon.jit
def _store(y, out_ptr, width, slots_ptr, first, stop, ROWS: gl.constexpr, TOKENS: gl.constexpr):
    """Store y [ROWS, TOKENS] into rows first.. of each slot, a piece at a time by shared memory."""
    if TOKENS > _PIECE:
        HALF: gl.constexpr = TOKENS // 2
        a, b = gl.split(gl.permute(gl.reshape(y, [ROWS, 2, HALF]), (0, 2, 1)))
        _store(a, out_ptr, width, slots_ptr, first, stop, ROWS, HALF)
        _store(b, out_ptr, width, slots_ptr + HALF, first, stop, ROWS, HALF)
    else:
        layout: gl.constexpr = gl.BlockedLayout([8, 1], [8, 4], [ROWS // 64, 512 // ROWS], [0, 1])
        y = gl.convert_layout(y, layout)
        lane = gl.arange(0, TOKENS, gl.SliceLayout(0, layout))
        slot = gl.load(slots_ptr + lane)
        row = first + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
        mask = (row < stop)[:, None] & (slot >= 0)[None, :]
        gl.store(out_ptr + slot.to(gl.int64)[None, :] * width + row[:, None], y, mask=mask)


@gluon.jit
def multiply_tile(
    buffers,
    full,
    empty,
    stage,
    phase,
    table,
    words_ptr,
    signs_ptr,
    scale_ptr,
    bias_ptr,
    shared_ptr,
    out_ptr,
    slots_ptr,
    e,
    tile,
    rows,
    out_width,
    row_tiles,
    column_tiles,
    slots,
    alpha,
    limit,
    BITS: gl.constexpr,
    GATED: gl.constexpr,
    FUSED: gl.constexpr,
    ACT: gl.constexpr,
    GATE: gl.constexpr,
    TOP_K: gl.constexpr,
    TOKENS: gl.constexpr,
    HEIGHT: gl.constexpr,
    SHARED: gl.constexpr,
    COPIES: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Compute one tile: rows 64 * tile.. of expert e for TOKENS slots.

    Return the buffer and the phase that the next tile begins with.
    """
    mma: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[8, 1], instr_shape=[16, TOKENS, 16]
    )
    left: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=mma, k_width=2)
    ROWS: gl.constexpr = 64 * HEIGHT
    down, index = row_tiles - tile, e.to(gl.int64) * row_tiles + tile
    words_ptr += index * column_tiles * 512
    words = read_tile(words_ptr, column_tiles * 512, down, True, HEIGHT, 4)
    signs = words
    if BITS == 3:
        signs_ptr += index * column_tiles * 256
        signs = read_tile(signs_ptr, column_tiles * 256, down, True, HEIGHT, 2)
    copies, _ = gl.split(gl.reshape(threads(4) % COPIES * 8 + words * 0, [HEIGHT, 128, 2, 2]))
    total = hopper.warpgroup_mma_init(gl.zeros([ROWS, TOKENS], gl.float32, mma))
    before = stage
    for step in range(column_tiles):
        words0, words1 = gl.split(gl.reshape(words, [HEIGHT, 128, 2, 2]))
        w = decode_step(words0, signs, copies, table, 0, BITS, HEIGHT, COPIES, left)
        second, second_phase = next_buffer(stage, phase, STAGES)
        mbarrier.wait(full.index(stage), phase)
        mbarrier.wait(full.index(second), second_phase)
        hopper.fence_async_shared()  # makes what cp.async wrote visible to wgmma (PTX ISA)
        total = hopper.warpgroup_mma(
            w, buffers.index(stage).slice(0, TOKENS, 0).permute((1, 0)), total, is_async=True
        )
        more, signs0 = step + 1 < column_tiles, signs
        words = read_tile(words_ptr + (step + 1) * 512, column_tiles * 512, down, more, HEIGHT, 4)
        if BITS == 3:
            signs = read_tile(
                signs_ptr + (step + 1) * 256, column_tiles * 256, down, more, HEIGHT, 2
            )
        total = hopper.warpgroup_mma_init(hopper.warpgroup_mma_wait(1, deps=[total]))
        mbarrier.arrive(empty.index(before), pred=step > 0)
        w = decode_step(words1, signs0, copies, table, 1, BITS, HEIGHT, COPIES, left)
        total = hopper.warpgroup_mma(
            w, buffers.index(second).slice(0, TOKENS, 0).permute((1, 0)), total, is_async=True
        )
        total = hopper.warpgroup_mma_init(hopper.warpgroup_mma_wait(1, deps=[total]))
        mbarrier.arrive(empty.index(stage))
        before = second
        stage, phase = next_buffer(second, second_phase, STAGES)
    y = hopper.warpgroup_mma_wait(0, deps=[total])
    mbarrier.arrive(empty.index(before))

    place = tile * 64 + gl.arange(0, ROWS, gl.SliceLayout(1, mma))
    if GATED:
        unit = place // 16 * 8 + place % 8
        row, real = unit + place // 8 % 2 * (rows // 2), unit < rows // 2
    else:
        row, real = place, place < rows
    y = y * gl.load(scale_ptr + e * rows + row, mask=real, other=0.0).to(gl.float32)[:, None]
    if bias_ptr is not None:
        y += gl.load(bias_ptr + e * rows + row, mask=real, other=0.0).to(gl.float32)[:, None]
    if SHARED > 0:
        slot = gl.load(slots_ptr + gl.arange(0, TOKENS, gl.SliceLayout(0, mma)))
        token = gl.where(slot >= 0, slot // TOP_K, 0).to(gl.int64)
        for piece in gl.static_range(SHARED):
            at = (piece * (slots // TOP_K) + token)[None, :] * rows + row[:, None]
            y += gl.load(shared_ptr + at, mask=real[:, None], other=0.0)
    if FUSED:
        UNITS: gl.constexpr = ROWS // 2 if GATED else ROWS
        if GATED:
            g, u = gl.split(gl.permute(gl.reshape(y, [ROWS // 16, 2, 8, TOKENS]), (0, 2, 3, 1)))
            h = apply_gate(g, u, alpha, limit, ACT, GATE)
        else:
            h = gl.where(real[:, None], activation(y, ACT), 0.0)
        h = gl.reshape(h.to(out_ptr.dtype.element_ty), [UNITS // 16, 4, 2, 2, TOKENS])
        # units in the order of `moecc.backends.triton.decode.paired`
        h = gl.reshape(gl.permute(h, (0, 2, 1, 3, 4)), [UNITS, TOKENS])
        _store(
            h, out_ptr, out_width, slots_ptr, tile * 64 * UNITS // ROWS, out_width, UNITS, TOKENS
        )
    else:
        _store(
            y.to(out_ptr.dtype.element_ty),
            out_ptr,
            out_width,
            slots_ptr,
            tile * 64,
            rows,
            ROWS,
            TOKENS,
        )
    return stage, phase
