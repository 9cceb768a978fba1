"""The grouped product where experts have many tokens, for sm_90 alone: `moecc.backends.triton.grouped` with HALF, in Gluon.

Triton lets decoding and products take turns there, since a product whose left operand is in registers is waited for at once. Here

  - four warps bring x to shared memory, 64 columns at a time into one of STAGES buffers, by cp.async; `full` is told by the copies
    themselves when a buffer holds them, `empty` by who multiplies when it may be written again;
  - eight warps multiply 64 * HEIGHT rows with TOKENS slots. One product of 64 columns runs while the next 64 are decoded;
  - a program lasts as long as the card has tiles for it: x of the next tile is read while the sums of the last one are stored.

A table entry is four bfloat16, so that a lookup is all that decoding is at 2 bit. At 3 bit it is v + 1/2, which bfloat16 has
exactly, since -1 - v, what a sign makes of v, is -(v + 1/2) - 1/2: with a sign s as -1 or 1, s * (v + 1/2) - 1/2.

On an H100 (Mixtral, 4096 tokens) slower than this were: entries of four int8 by a sixth; waiting for each 64 columns of x by
themselves, and decoding before what has run is waited for, by a tenth at 3 bit; twice the rows with half the slots.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from moecc.backends.triton.chain import after_last, let_next_start
from moecc.backends.triton.gates import activation, apply_gate
from moecc.backends.triton.grouped import pairs

_barrier = getattr(gl, "barrier", None) or gl.thread_barrier
_async_load = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
WARPS = 8  # that multiply
_COLUMNS = gl.constexpr(64)  # of a buffer of x
_PIECE = gl.constexpr(64)  # slots whose sums are stored at once


@gluon.jit
def _next(stage, phase, STAGES: gl.constexpr):
    """The buffer after this one, and its barriers' phase."""
    last = stage == STAGES - 1
    return gl.where(last, 0, stage + 1), phase ^ last.to(gl.int32)


@gluon.jit
def _bytes(b0, b1, b2, b3):
    """-> [..., 2, 2], of which the last two are b."""
    return gl.join(gl.join(b0, b2), gl.join(b1, b3))


@gluon.jit
def _in_rows(v, HEIGHT: gl.constexpr):
    """[HEIGHT, w r t, i, b] as threads read it -> [64 * HEIGHT, b t], in the same registers."""
    v = gl.reshape(v, [HEIGHT, 4, 8, 4, 2, 4])
    return gl.reshape(gl.permute(v, (0, 1, 4, 2, 5, 3)), [64 * HEIGHT, 16])


@gluon.jit
def _threads(SIZE: gl.constexpr):
    """i32 [1, 128, 1]: the thread of a warpgroup, as `_read` has them."""
    layout: gl.constexpr = gl.BlockedLayout([1, 1, SIZE], [1, 32, 1], [2, 4, 1], [2, 1, 0])
    return gl.arange(0, 128, gl.SliceLayout(0, gl.SliceLayout(2, layout)))[None, :, None]


@gluon.jit
def _read(ptr, stride, down, more, HEIGHT: gl.constexpr, SIZE: gl.constexpr):
    """One column tile of HEIGHT row tiles, `stride` words apart: i32 [HEIGHT, 128, SIZE]; zeros past `down`, or if not `more`."""
    layout: gl.constexpr = gl.BlockedLayout([1, 1, SIZE], [1, 32, 1], [2, 4, 1], [2, 1, 0])
    tile = gl.arange(0, HEIGHT, gl.SliceLayout(1, gl.SliceLayout(2, layout)))[:, None, None]
    word = gl.arange(0, SIZE, gl.SliceLayout(0, gl.SliceLayout(1, layout)))[None, None, :]
    return gl.load(
        ptr + tile * stride + _threads(SIZE) * SIZE + word, mask=(tile < down) & more, other=0
    )


@gluon.jit
def _weights(
    words, signs, copies, table, PART: gl.constexpr, BITS: gl.constexpr, HEIGHT: gl.constexpr, COPIES: gl.constexpr,
    left: gl.constexpr,
):  # fmt: skip
    """Code words i32 [HEIGHT, 128, 2] and sign words of a column tile's half PART -> bf16 [64 * HEIGHT, 64], a left operand.

    copies, like words: in which copy of the table a thread looks, in bytes."""
    SIZE: gl.constexpr = COPIES * 8
    c0, c1, c2, c3 = words & 0xFF, (words >> 8) & 0xFF, (words >> 16) & 0xFF, (words >> 24) & 0xFF
    at = _bytes(copies | c0 * SIZE, copies | c1 * SIZE, copies | c2 * SIZE, copies | c3 * SIZE)
    low, high = gl.inline_asm_elementwise(
        "{ .reg .u32 at; add.u32 at, $2, $3; ld.shared.v2.b32 {$0, $1}, [at]; }", "=r,=r,r,r", [_in_rows(at, HEIGHT), table],
        dtype=(gl.int32, gl.int32), is_pure=False, pack=1,
    )  # fmt: skip
    if BITS == 3:  # -1 - v = -(v + 1/2) - 1/2: a sign is the highest bit of -1 and 1
        FIRST: gl.constexpr = 7 - 4 * PART
        first, second = gl.inline_asm_elementwise(
            "prmt.b32 $0, $2, 0, 0x1404; prmt.b32 $1, $2, 0, 0x3424;", "=&r,=r,r", [signs], dtype=(gl.int32, gl.int32),
            is_pure=True, pack=1,
        )  # fmt: skip
        a = _bytes(first << FIRST, first << (FIRST - 1), first << (FIRST - 2), first << (FIRST - 3))
        b = _bytes(
            second << FIRST, second << (FIRST - 1), second << (FIRST - 2), second << (FIRST - 3)
        )
        low, high = gl.inline_asm_elementwise(
            """{ .reg .b32 s, less; mov.b32 less, 0xbf00bf00;
            lop3.b32 s, $4, 0x80008000, 0x3f803f80, 0xea; fma.rn.bf16x2 $0, $2, s, less;
            lop3.b32 s, $5, 0x80008000, 0x3f803f80, 0xea; fma.rn.bf16x2 $1, $3, s, less; }""",
            "=&r,=r,r,r,r,r", [low, high, _in_rows(a, HEIGHT), _in_rows(b, HEIGHT)], dtype=(gl.int32, gl.int32), is_pure=True,
            pack=1,
        )  # fmt: skip
    w = _bytes(
        low.to(gl.int16), (low >> 16).to(gl.int16), high.to(gl.int16), (high >> 16).to(gl.int16)
    )
    w = gl.permute(gl.reshape(w, [64 * HEIGHT, 4, 4, 2, 2]), (0, 1, 3, 2, 4))  # `grouped.paired`
    w = gl.reshape(w, [64 * HEIGHT, 64]).to(gl.bfloat16, bitcast=True)
    return gl.convert_layout(w, left, assert_trivial=True)


@gluon.jit
def _store(y, out_ptr, width, slots_ptr, first, stop, ROWS: gl.constexpr, TOKENS: gl.constexpr):
    """y [ROWS, TOKENS] into rows first.. of each slot; in pieces, since they go through shared memory."""
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
def _multiply(
    buffers, full, empty, stage, phase, table, words_ptr, signs_ptr, scale_ptr, bias_ptr, shared_ptr, out_ptr, slots_ptr, e, tile,
    rows, out_width, row_tiles, column_tiles, slots, alpha, limit, BITS: gl.constexpr, GATED: gl.constexpr, FUSED: gl.constexpr,
    ACT: gl.constexpr, GATE: gl.constexpr, TOP_K: gl.constexpr, TOKENS: gl.constexpr, HEIGHT: gl.constexpr, SHARED: gl.constexpr,
    COPIES: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One tile: rows 64 * tile.. of expert e, and TOKENS slots."""
    mma: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[8, 1], instr_shape=[16, TOKENS, 16]
    )
    left: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=mma, k_width=2)
    ROWS: gl.constexpr = 64 * HEIGHT
    down, index = row_tiles - tile, e.to(gl.int64) * row_tiles + tile
    words_ptr += index * column_tiles * 512
    words = _read(words_ptr, column_tiles * 512, down, True, HEIGHT, 4)
    signs = words
    if BITS == 3:
        signs_ptr += index * column_tiles * 256
        signs = _read(signs_ptr, column_tiles * 256, down, True, HEIGHT, 2)
    copies, _ = gl.split(gl.reshape(_threads(4) % COPIES * 8 + words * 0, [HEIGHT, 128, 2, 2]))
    total = hopper.warpgroup_mma_init(gl.zeros([ROWS, TOKENS], gl.float32, mma))
    before = stage
    for step in range(column_tiles):
        words0, words1 = gl.split(gl.reshape(words, [HEIGHT, 128, 2, 2]))
        w = _weights(words0, signs, copies, table, 0, BITS, HEIGHT, COPIES, left)
        second, second_phase = _next(stage, phase, STAGES)
        mbarrier.wait(full.index(stage), phase)
        mbarrier.wait(full.index(second), second_phase)
        hopper.fence_async_shared()  # what cp.async has written is seen by wgmma (PTX ISA)
        total = hopper.warpgroup_mma(
            w, buffers.index(stage).slice(0, TOKENS, 0).permute((1, 0)), total, is_async=True
        )
        more, signs0 = step + 1 < column_tiles, signs
        words = _read(words_ptr + (step + 1) * 512, column_tiles * 512, down, more, HEIGHT, 4)
        if BITS == 3:
            signs = _read(signs_ptr + (step + 1) * 256, column_tiles * 256, down, more, HEIGHT, 2)
        total = hopper.warpgroup_mma_init(hopper.warpgroup_mma_wait(1, deps=[total]))
        mbarrier.arrive(empty.index(before), pred=step > 0)
        w = _weights(words1, signs0, copies, table, 1, BITS, HEIGHT, COPIES, left)
        total = hopper.warpgroup_mma(
            w, buffers.index(second).slice(0, TOKENS, 0).permute((1, 0)), total, is_async=True
        )
        total = hopper.warpgroup_mma_init(hopper.warpgroup_mma_wait(1, deps=[total]))
        mbarrier.arrive(empty.index(stage))
        before = second
        stage, phase = _next(second, second_phase, STAGES)
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
        h = gl.reshape(gl.permute(h, (0, 2, 1, 3, 4)), [UNITS, TOKENS])  # `grouped.paired`
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


@gluon.jit
def _consume(
    buffers, full, empty, words_ptr, signs_ptr, table_ptr, scale_ptr, bias_ptr, shared_ptr, out_ptr, slots_ptr, block_expert_ptr,
    rows, out_width, row_tiles, column_tiles, table_stride, groups, tiles, slots, alpha, limit, BITS: gl.constexpr,
    GATED: gl.constexpr, FUSED: gl.constexpr, ACT: gl.constexpr, GATE: gl.constexpr, TOP_K: gl.constexpr, TOKENS: gl.constexpr,
    HEIGHT: gl.constexpr, SHARED: gl.constexpr, COPIES: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One tile after another, with the table of its expert."""
    entry = gl.arange(0, 256, gl.BlockedLayout([1], [32], [8], [0]))
    WORDS: gl.constexpr = 512 * COPIES
    table = gl.inline_asm_elementwise(
        f"{{ .shared .align 128 .b32 moecc_table[{WORDS}]; mov.u32 $0, moecc_table; }}", "=r,r", [rows], dtype=gl.int32,
        is_pure=False, pack=1,
    )  # fmt: skip
    stage, phase, owner = 0, 0, -1
    for t in range(gl.program_id(0), tiles, gl.num_programs(0)):
        block = t // groups
        e = gl.load(block_expert_ptr + block)
        if e >= 0:
            if e != owner:
                low, high = pairs(gl.load(table_ptr + e * table_stride + entry))
                if BITS == 3:
                    low, high = gl.inline_asm_elementwise(
                        """{ .reg .b32 one, half; mov.b32 one, 0x3f803f80; mov.b32 half, 0x3f003f00;
                        fma.rn.bf16x2 $0, $2, one, half; fma.rn.bf16x2 $1, $3, one, half; }""",
                        "=&r,=r,r,r", [low, high], dtype=(gl.int32, gl.int32), is_pure=True, pack=1,
                    )  # fmt: skip
                _barrier()
                for j in gl.static_range(COPIES // 2):
                    at = table + entry * (COPIES * 8) + ((entry + j) % (COPIES // 2)) * 16
                    gl.inline_asm_elementwise(
                        "st.shared.v4.b32 [$1], {$2, $3, $2, $3}; mov.u32 $0, 0;", "=r,r,r,r", [at, low, high], dtype=gl.int32,
                        is_pure=False, pack=1,
                    )  # fmt: skip
                _barrier()
                owner = e
            if gl.load(slots_ptr + block * TOKENS + TOKENS // 2) >= 0:
                stage, phase = _multiply(
                    buffers, full, empty, stage, phase, table, words_ptr, signs_ptr, scale_ptr, bias_ptr, shared_ptr, out_ptr,
                    slots_ptr + block * TOKENS, e, t % groups * HEIGHT, rows, out_width, row_tiles, column_tiles, slots, alpha,
                    limit, BITS, GATED, FUSED, ACT, GATE, TOP_K, TOKENS, HEIGHT, SHARED, COPIES, STAGES,
                )  # fmt: skip
            else:
                stage, phase = _multiply(
                    buffers, full, empty, stage, phase, table, words_ptr, signs_ptr, scale_ptr, bias_ptr, shared_ptr, out_ptr,
                    slots_ptr + block * TOKENS, e, t % groups * HEIGHT, rows, out_width, row_tiles, column_tiles, slots, alpha,
                    limit, BITS, GATED, FUSED, ACT, GATE, TOP_K, TOKENS // 2, HEIGHT, SHARED, COPIES, STAGES,
                )  # fmt: skip


@gluon.jit
def _bring(
    buffers, full, empty, stage, phase, x_ptr, slots_ptr, steps, TOP_K: gl.constexpr, TOKENS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """x of TOKENS slots, 64 columns after another."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    slot = gl.load(slots_ptr + gl.arange(0, TOKENS, gl.SliceLayout(1, layout)))
    # what isn't a slot has sums of its own, which nobody stores
    token = gl.where(slot >= 0, slot // TOP_K, 0).to(gl.int64)
    x_ptrs = (
        x_ptr
        + token[:, None] * (steps * _COLUMNS)
        + gl.arange(0, _COLUMNS, gl.SliceLayout(0, layout))[None, :]
    )
    for step in range(steps):
        mbarrier.wait(empty.index(stage), phase)
        _async_load(buffers.index(stage).slice(0, TOKENS, 0), x_ptrs + step * _COLUMNS)
        async_copy.mbarrier_arrive(full.index(stage), increment_count=False)
        stage, phase = _next(stage, phase, STAGES)
    return stage, phase


@gluon.jit
def _produce(
    buffers, full, empty, x_ptr, slots_ptr, block_expert_ptr, groups, tiles, steps, TOP_K: gl.constexpr, TOKENS: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """x of one tile after another, as soon as there is room."""
    stage, phase = 0, 1
    for t in range(gl.program_id(0), tiles, gl.num_programs(0)):
        block = t // groups
        own = slots_ptr + block * TOKENS
        if gl.load(block_expert_ptr + block) >= 0:
            if gl.load(own + TOKENS // 2) >= 0:
                stage, phase = _bring(
                    buffers, full, empty, stage, phase, x_ptr, own, steps, TOP_K, TOKENS, STAGES
                )
            else:
                stage, phase = _bring(
                    buffers,
                    full,
                    empty,
                    stage,
                    phase,
                    x_ptr,
                    own,
                    steps,
                    TOP_K,
                    TOKENS // 2,
                    STAGES,
                )


@gluon.jit(do_not_specialize=["tiles", "slots"])
def persistent_kernel(
    x_ptr,  # bf16 [R, 128 * column_tiles] by `grouped.paired`; of slot i row i // TOP_K
    words_ptr, signs_ptr, table_ptr, scale_ptr, bias_ptr, shared_ptr, out_ptr, slots_ptr, block_expert_ptr,  # grouped_kernel's
    rows, out_width, row_tiles, column_tiles, table_stride, groups, tiles, slots, alpha, limit,
    BITS: gl.constexpr, GATED: gl.constexpr, FUSED: gl.constexpr, ACT: gl.constexpr, GATE: gl.constexpr, TOP_K: gl.constexpr,
    TOKENS: gl.constexpr, HEIGHT: gl.constexpr, SHARED: gl.constexpr, COPIES: gl.constexpr, STAGES: gl.constexpr,
    HOPPER: gl.constexpr,
):  # fmt: skip
    """Grid: as many programs as the card has multiprocessors. groups * blocks = tiles."""
    after_last(HOPPER)
    x_layout: gl.constexpr = gl.NVMMASharedLayout(
        swizzle_byte_width=128, element_bitwidth=16, rank=2
    )
    buffers = gl.allocate_shared_memory(gl.bfloat16, [STAGES, TOKENS, _COLUMNS], x_layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=128)
        mbarrier.init(empty.index(i), count=1)
    gl.warp_specialize(
        [
            (_consume, (
                buffers, full, empty, words_ptr, signs_ptr, table_ptr, scale_ptr, bias_ptr, shared_ptr, out_ptr, slots_ptr,
                block_expert_ptr, rows, out_width, row_tiles, column_tiles, table_stride, groups, tiles, slots, alpha, limit,
                BITS, GATED, FUSED, ACT, GATE, TOP_K, TOKENS, HEIGHT, SHARED, COPIES, STAGES,
            )),
            (_produce, (
                buffers, full, empty, x_ptr, slots_ptr, block_expert_ptr, groups, tiles, 2 * column_tiles, TOP_K, TOKENS, STAGES,
            )),
        ],
        [4],
        [56],
    )  # fmt: skip
    let_next_start(HOPPER)
