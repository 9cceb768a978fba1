"""The grouped product for many tokens per expert, on sm_90 alone, in Gluon.

It computes what `moecc.backends.triton.grouped` computes with HALF. Triton makes decoding and
products alternate there, because it waits at once for a product whose left operand lies in
registers. Here

  - four warps bring x to shared memory by cp.async, 64 columns at a time, into one of STAGES
    buffers. The copies themselves signal barrier `full` when a buffer is complete; the multiplying
    warps signal barrier `empty` when it may be overwritten;
  - eight warps multiply 64 * HEIGHT rows with TOKENS slots. The product of 64 columns runs while
    the next 64 are decoded;
  - a program is persistent: it takes one tile after another. It reads x of the next tile while it
    stores the sums of the last one.

A table entry is four bfloat16, so at 2 bit decoding is one lookup. At 3 bit an entry holds v + 1/2,
which bfloat16 represents exactly. A set sign turns v into -1 - v = -(v + 1/2) - 1/2, so a weight is
s * (v + 1/2) - 1/2 with s = -1 or 1.

Alternatives that were slower on an H100 (Mixtral, 4096 tokens): entries of four int8, by a sixth;
waiting for each 64 columns of x separately, or decoding before waiting for the running product, by
a tenth at 3 bit; twice the rows with half the slots.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from moecc.backends.triton.chain import after_last, let_next_start
from moecc.backends.triton.decode import pairs
from moecc.backends.triton.hopper_tile import multiply_tile, next_buffer

_barrier = getattr(gl, "barrier", None) or gl.thread_barrier
_async_load = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
WARPS = 8  # multiplying warps
_COLUMNS = gl.constexpr(64)  # columns per buffer of x


@gluon.jit
def _consume(
    buffers,
    full,
    empty,
    words_ptr,
    signs_ptr,
    table_ptr,
    scale_ptr,
    bias_ptr,
    shared_ptr,
    out_ptr,
    slots_ptr,
    block_expert_ptr,
    rows,
    out_width,
    row_tiles,
    column_tiles,
    table_stride,
    groups,
    tiles,
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
    """Multiply one tile after another; a new expert's table is copied into shared memory."""
    entry = gl.arange(0, 256, gl.BlockedLayout([1], [32], [8], [0]))
    WORDS: gl.constexpr = 512 * COPIES
    table = gl.inline_asm_elementwise(
        f"{{ .shared .align 128 .b32 moecc_table[{WORDS}]; mov.u32 $0, moecc_table; }}",
        "=r,r",
        [rows],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )
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
                        "=&r,=r,r,r",
                        [low, high],
                        dtype=(gl.int32, gl.int32),
                        is_pure=True,
                        pack=1,
                    )
                _barrier()
                for j in gl.static_range(COPIES // 2):
                    at = table + entry * (COPIES * 8) + ((entry + j) % (COPIES // 2)) * 16
                    gl.inline_asm_elementwise(
                        "st.shared.v4.b32 [$1], {$2, $3, $2, $3}; mov.u32 $0, 0;",
                        "=r,r,r,r",
                        [at, low, high],
                        dtype=gl.int32,
                        is_pure=False,
                        pack=1,
                    )
                _barrier()
                owner = e
            if gl.load(slots_ptr + block * TOKENS + TOKENS // 2) >= 0:
                stage, phase = multiply_tile(
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
                    slots_ptr + block * TOKENS,
                    e,
                    t % groups * HEIGHT,
                    rows,
                    out_width,
                    row_tiles,
                    column_tiles,
                    slots,
                    alpha,
                    limit,
                    BITS,
                    GATED,
                    FUSED,
                    ACT,
                    GATE,
                    TOP_K,
                    TOKENS,
                    HEIGHT,
                    SHARED,
                    COPIES,
                    STAGES,
                )
            else:
                stage, phase = multiply_tile(
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
                    slots_ptr + block * TOKENS,
                    e,
                    t % groups * HEIGHT,
                    rows,
                    out_width,
                    row_tiles,
                    column_tiles,
                    slots,
                    alpha,
                    limit,
                    BITS,
                    GATED,
                    FUSED,
                    ACT,
                    GATE,
                    TOP_K,
                    TOKENS // 2,
                    HEIGHT,
                    SHARED,
                    COPIES,
                    STAGES,
                )


@gluon.jit
def _bring(
    buffers,
    full,
    empty,
    stage,
    phase,
    x_ptr,
    slots_ptr,
    steps,
    TOP_K: gl.constexpr,
    TOKENS: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Copy x of TOKENS slots, 64 columns after another; return the next buffer and phase."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    slot = gl.load(slots_ptr + gl.arange(0, TOKENS, gl.SliceLayout(1, layout)))
    # an unused slot reads token 0; nobody stores its sums
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
        stage, phase = next_buffer(stage, phase, STAGES)
    return stage, phase


@gluon.jit
def _produce(
    buffers,
    full,
    empty,
    x_ptr,
    slots_ptr,
    block_expert_ptr,
    groups,
    tiles,
    steps,
    TOP_K: gl.constexpr,
    TOKENS: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Copy x of one tile after another, as soon as a buffer is free."""
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
    x_ptr,  # bf16 [R, 128 * column_tiles] by `decode.paired`; slot s reads row s // TOP_K
    words_ptr,  # this and all that follow up to limit as in `grouped_kernel`
    signs_ptr,
    table_ptr,
    scale_ptr,
    bias_ptr,
    shared_ptr,
    out_ptr,
    slots_ptr,
    block_expert_ptr,
    rows,
    out_width,
    row_tiles,
    column_tiles,
    table_stride,
    groups,
    tiles,
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
    HOPPER: gl.constexpr,
):
    """Grid: one program per multiprocessor. tiles = groups * blocks, groups of HEIGHT row tiles."""
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
            (
                _consume,
                (
                    buffers,
                    full,
                    empty,
                    words_ptr,
                    signs_ptr,
                    table_ptr,
                    scale_ptr,
                    bias_ptr,
                    shared_ptr,
                    out_ptr,
                    slots_ptr,
                    block_expert_ptr,
                    rows,
                    out_width,
                    row_tiles,
                    column_tiles,
                    table_stride,
                    groups,
                    tiles,
                    slots,
                    alpha,
                    limit,
                    BITS,
                    GATED,
                    FUSED,
                    ACT,
                    GATE,
                    TOP_K,
                    TOKENS,
                    HEIGHT,
                    SHARED,
                    COPIES,
                    STAGES,
                ),
            ),
            (
                _produce,
                (
                    buffers,
                    full,
                    empty,
                    x_ptr,
                    slots_ptr,
                    block_expert_ptr,
                    groups,
                    tiles,
                    2 * column_tiles,
                    TOP_K,
                    TOKENS,
                    STAGES,
                ),
            ),
        ],
        [4],
        [56],
    )
    let_next_start(HOPPER)
