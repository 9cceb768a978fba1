"""The grouped product: coded weights of many experts with the tokens routed to each of them.

One program multiplies HEIGHT tiles of 64 packed rows (`moecc.backends.triton.pack`) of one expert
with a block of TOKENS slots, over the columns of one part (split-K, for decode, which has too few
tiles to fill the card):

  1. Each thread reads 16 bytes of codes per 128 columns, straight from memory and already in the
     order of the product's left operand.
  2. Each code is looked up in the expert's table of 256 entries of four int8, which gives a
     register of four weights. The table lies in shared memory: on sm_90 in as many copies as its 32
     banks can use (`spread_table`), on other cards once, by `tl.gather`; a plain load per code
     would be pipelined through shared memory as well. At 3 bit, a set sign bit flips the bytes:
     v ^ 0xff = -1 - v. 4 bit takes two lookups of two weights.
  3. Tensor cores multiply int8 x int8 -> int32. A token is two columns, the high and the low byte
     of its 16-bit fixed point; a block of eight tokens needs two columns each to fill the
     instruction.
  4. After STEP = 128 * UNROLL columns, hi * 256 + lo (still exact: 512 * 128 * 32512 < 2^31) times
     the token's scale for these columns is added to a float32 sum.
  5. y = scale * sum + bias + shared + coef_scale * (coef z). With FUSED the program applies the
     gate too: each thread holds both rows of a unit.

HALF, for bfloat16 and many tokens per weight: step 3 multiplies the int8 weights as bfloat16, which
is exact, with x itself or with hidden units rounded to bfloat16, into a float32 sum. Step 4 falls
away, and the sums take half as many registers. Large tiles on sm_90 have a kernel of their own,
`moecc.backends.triton.hopper`.

The output of a program depends on its own slots alone, so results are the same in every run.
"""

import triton
import triton.language as tl

from moecc.backends.triton.chain import after_last
from moecc.backends.triton.decode import spread_table
from moecc.backends.triton.product import multiply


@triton.jit(do_not_specialize=["slots", "z_parts", "z_tokens"])
def grouped_kernel(
    # slot s reads row s // TOP_K of x, shared and z
    x_ptr,  # i8 [R, 2, steps * STEP]: high, low bytes; HALF: floats [R, steps * STEP] by `paired`
    x_scale_ptr,  # f32 [R, steps]; HALF: None
    words_ptr,  # as `moecc.backends.triton.pack` orders them; BITS 8: i8 [E, rows, columns]
    signs_ptr,  # likewise; None without signs
    table_ptr,  # [E or 1, 256]: codebook entries as integers; BITS 8: None
    scale_ptr,  # [E, rows] of any float type
    bias_ptr,  # [E, rows] of any float type, or None
    shared_ptr,  # f32 [SHARED, R, rows] or None: the term that all experts share
    z_ptr,  # f32 [z_parts, R, RANK] or None
    coef_ptr,  # i8 [E, rows, rank] or None
    coef_scale_ptr,  # [E, rows] or None
    out_ptr,  # [parts, slots, rows]; FUSED: units [slots, out_width], with HALF by `paired`
    slots_ptr,  # i32 [blocks * TOKENS], -1 if unused; None: slot i is row i, all of expert 0
    block_expert_ptr,  # i32 [blocks], -1 if unused
    rows,
    columns,
    out_width,
    row_tiles,
    column_tiles,
    table_stride,
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
    NARROW: tl.constexpr,
):
    """Grid: (ceil(row tiles / HEIGHT), blocks, parts).

    NARROW: a block that is at most half full takes half the work.
    """
    after_last(HOPPER)
    group, block, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    lane, pair = tl.arange(0, TOKENS), tl.arange(0, 2 * TOKENS)
    if block_expert_ptr is not None:
        e = tl.load(block_expert_ptr + block).to(tl.int64)
        # loaded before the branch, so that slots need not wait for the expert
        slot = tl.load(slots_ptr + block * TOKENS + lane)
        pair_slot = tl.load(slots_ptr + block * TOKENS + pair // 2)
        if e < 0:
            return
    else:
        e = tl.full([], 0, tl.int64)
        slot = tl.where(block * TOKENS + lane < slots, block * TOKENS + lane, -1)
        pair_slot = tl.where(block * TOKENS + pair // 2 < slots, block * TOKENS + pair // 2, -1)

    table = 0
    if BITS != 8:
        table = tl.load(table_ptr + e * table_stride + tl.arange(0, 256)).to(tl.int32)
        if BITS == 4:
            table = table & 0xFFFF
        if COPIES > 1:
            table = spread_table(table, steps, COPIES)
    full = True
    if NARROW:
        full = tl.load(slots_ptr + block * TOKENS + TOKENS // 2) >= 0
    if full:
        multiply(
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
            slot,
            pair_slot,
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
            BITS,
            GATED,
            FUSED,
            ACT,
            GATE,
            TOP_K,
            TOKENS,
            HEIGHT,
            UNROLL,
            TAIL,
            RANK,
            SHARED,
            COPIES,
            HALF,
            HOPPER,
            UPCAST,
        )
    if NARROW and not full:
        few = tl.load(slots_ptr + block * TOKENS + tl.arange(0, TOKENS // 2))
        few_pairs = tl.load(slots_ptr + block * TOKENS + lane // 2)
        multiply(
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
            few,
            few_pairs,
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
            BITS,
            GATED,
            FUSED,
            ACT,
            GATE,
            TOP_K,
            TOKENS // 2,
            HEIGHT,
            UNROLL,
            TAIL,
            RANK,
            SHARED,
            COPIES,
            HALF,
            HOPPER,
            UPCAST,
        )
