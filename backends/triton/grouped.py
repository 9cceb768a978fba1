"""The grouped product: coded weights of many experts with the tokens that are routed to each, in whole numbers.

One program multiplies HEIGHT tiles of 64 packed rows (`moecc.backends.triton.pack`) of one expert with a block of TOKENS slots,
over the columns of one part (split-K, for decode, where there are too few tiles for the card):

  1. 16 bytes of codes per thread and 128 columns, straight from memory, already in the order of the product's left operand;
  2. each code is looked up in the expert's table of 256 entries of four int8: the register is four weights (`tl.gather`, which
     keeps the table in shared memory; a load per code would be pipelined through it). 3 bit: bytes are flipped where the sign
     bit is set, v ^ 0xff = -1 - v. 4 bit: two lookups of two weights;
  3. int8 x int8 -> int32 on tensor cores. A token is two columns, the high and the low byte of its 16-bit fixed point, which
     is what an eight-token block needs to fill the instruction anyway;
  4. after STEP = 128 * UNROLL columns, hi * 256 + lo (still exact: 512 * 128 * 32512 < 2^31) times the token's scale for these
     columns goes into a float32 sum.

  then y = scale * sum + bias + shared + coef_scale * (coef z); and with FUSED the gate, whose two rows a thread has.

What a program writes depends on its own slots and on nothing that other programs do, so results don't change from run to run.
"""

import triton
import triton.language as tl

from moecc.backends.triton.gates import activation, apply_gate


@triton.jit
def fixed_point(v, peak):
    """f32 -> hi, lo int8 with v = (256 hi + lo) * scale within scale/2, and scale f32, of the largest |v| that shares a scale.

    15 bits: |256 hi + lo| <= 32512. Where the peak is no number, neither is the scale (`peak_of`)."""
    peak = tl.where(peak < 1e-30, 1e-30, peak)
    q = tl.floor(v * (32512.0 / peak) + 0.5).to(tl.int32)
    hi = (q + 128) >> 8
    return hi.to(tl.int8), (q - (hi << 8)).to(tl.int8), peak / 32512.0


@triton.jit
def peak_of(v, keep_dims: tl.constexpr):
    """The largest |v| along the first axis; no number where there is an infinity or no number among them."""
    return tl.max(tl.abs(v), 0, keep_dims=keep_dims) + tl.sum(v * 0, 0, keep_dims=keep_dims)


@triton.jit
def _words(
    ptr, stride, down, across, SIZE: tl.constexpr, HEIGHT: tl.constexpr, UNROLL: tl.constexpr, TAIL: tl.constexpr
):
    """i32 [HEIGHT * UNROLL * SIZE]: SIZE words of each of HEIGHT row tiles, `stride` words apart, and UNROLL column tiles; zeros
    past the `down` and `across` tiles that there are."""
    word = tl.arange(0, SIZE * UNROLL)
    if HEIGHT == 1:
        if TAIL:
            w = tl.load(ptr + word, mask=word < across * SIZE, other=0)
        else:
            w = tl.load(ptr + word)
    else:
        tile = tl.arange(0, HEIGHT)
        mask = (tile < down)[:, None] & (word < across * SIZE)[None, :]
        w = tl.load(ptr + tile[:, None] * stride + word[None, :], mask=mask, other=0)
        w = tl.reshape(w, [HEIGHT * UNROLL * SIZE])
    return w


@triton.jit
def _lookup(w, table, HEIGHT: tl.constexpr, UNROLL: tl.constexpr):
    """Code words -> their entries i32 [64 * HEIGHT, 32 * UNROLL]: four weights each, or two."""
    c0, c1, c2, c3 = w & 0xFF, (w >> 8) & 0xFF, (w >> 16) & 0xFF, (w >> 24) & 0xFF
    code = tl.join(tl.join(c0, c2), tl.join(c1, c3))
    code = tl.reshape(code, [HEIGHT, UNROLL, 4, 8, 4, 2, 2, 4])  # row tile, column tile, w, r, t, i, h, b
    code = tl.reshape(tl.permute(code, (0, 2, 5, 3, 1, 6, 7, 4)), [2048 * HEIGHT * UNROLL])
    return tl.reshape(tl.gather(table, code, 0), [64 * HEIGHT, 32 * UNROLL])


@triton.jit
def _flips(s, HEIGHT: tl.constexpr, UNROLL: tl.constexpr):
    """Sign words -> i32 [64 * HEIGHT, 32 * UNROLL] with 0xff in the bytes of negative weights."""
    flip = ((s[:, None] >> tl.arange(0, 8)[None, :]) & 0x01010101) * 255
    flip = tl.reshape(flip, [HEIGHT, UNROLL, 4, 8, 4, 2, 8])  # row tile, column tile, w, r, t, i, c
    return tl.reshape(tl.permute(flip, (0, 2, 5, 3, 1, 6, 4)), [64 * HEIGHT, 32 * UNROLL])


@triton.jit
def _weights(
    words_ptr, signs_ptr, table_ptr, index, down, step, column_tiles, BITS: tl.constexpr, HEIGHT: tl.constexpr,
    UNROLL: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """int8 [64 * HEIGHT, 128 * UNROLL] of one step, from row tile `index`; what is past the last column tile meets zeros in x."""
    first, across = step * UNROLL, column_tiles - step * UNROLL
    if BITS == 4:
        table = tl.load(table_ptr + tl.arange(0, 256)).to(tl.int32) & 0xFFFF
        even, stride = words_ptr + (2 * index * column_tiles + first) * 512, 1024 * column_tiles
        odd = even + column_tiles * 512
        p = _lookup(_words(even, stride, down, across, 512, HEIGHT, UNROLL, TAIL), table, HEIGHT, UNROLL)
        p = p | (_lookup(_words(odd, stride, down, across, 512, HEIGHT, UNROLL, TAIL), table, HEIGHT, UNROLL) << 16)
    else:
        table = tl.load(table_ptr + tl.arange(0, 256))
        words, stride = words_ptr + (index * column_tiles + first) * 512, 512 * column_tiles
        p = _lookup(_words(words, stride, down, across, 512, HEIGHT, UNROLL, TAIL), table, HEIGHT, UNROLL)
        if BITS == 3:
            signs, stride = signs_ptr + (index * column_tiles + first) * 256, 256 * column_tiles
            p = p ^ _flips(_words(signs, stride, down, across, 256, HEIGHT, UNROLL, TAIL), HEIGHT, UNROLL)
    b0, b1, b2, b3 = p.to(tl.int8), (p >> 8).to(tl.int8), (p >> 16).to(tl.int8), (p >> 24).to(tl.int8)
    return tl.reshape(tl.join(tl.join(b0, b2), tl.join(b1, b3)), [64 * HEIGHT, 128 * UNROLL])


@triton.jit
def _exact(hi_lo, ROWS: tl.constexpr, TOKENS: tl.constexpr):
    """int32 [ROWS, 2 * TOKENS] of high and low bytes -> their exact sum, rounded once to f32 [ROWS, TOKENS]."""
    hi, lo = tl.split(tl.reshape(hi_lo, [ROWS, TOKENS, 2]))
    return (hi * 256 + lo).to(tl.float32)


@triton.jit
def _low_rank(
    z_ptr, coef_ptr, coef_scale_ptr, e, pair_token, pair_held, row, real, rows, z_parts, z_tokens, rank, RANK: tl.constexpr,
    ROWS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """coef_scale * (coef z) [ROWS, TOKENS]: z f32 [z_parts, tokens, RANK] as fixed point, coef i8 [E, rows, rank]."""
    r = tl.arange(0, RANK)
    z = tl.zeros([RANK, 2 * TOKENS], tl.float32)
    for part in range(z_parts):
        z += tl.load(
            z_ptr + (part * z_tokens + pair_token)[None, :] * RANK + r[:, None], mask=pair_held[None, :], other=0.0
        )
    hi, lo, z_scale = fixed_point(z, peak_of(z, True))
    # every token twice, then chosen by column: a join of hi and lo would be reshaped in shared memory, which can't be for sm_90
    pair = tl.where((tl.arange(0, 2 * TOKENS) % 2 == 0)[None, :], hi, lo)
    z_scale, _ = tl.split(tl.reshape(z_scale, [1, TOKENS, 2]))
    at = (e * rows + row)[:, None] * rank + r[None, :]
    coef = tl.load(coef_ptr + at, mask=real[:, None] & (r < rank)[None, :], other=0)
    factor = tl.load(coef_scale_ptr + e * rows + row, mask=real, other=0.0).to(tl.float32)
    return _exact(tl.dot(coef, pair), ROWS, TOKENS) * z_scale * factor[:, None]


@triton.jit
def grouped_kernel(
    x_ptr,  # i8 [R, 2, steps * STEP]: high and low bytes of row slot // TOP_K
    x_scale_ptr,  # f32 [R, steps]
    words_ptr, signs_ptr, table_ptr,  # moecc.backends.triton.pack; BITS 8: i8 [E, rows, columns], None, None
    scale_ptr, bias_ptr,  # [E, rows] of any float type; bias or None
    shared_ptr,  # f32 [R, rows] or None: the part of all experts, of row slot // TOP_K
    z_ptr, coef_ptr, coef_scale_ptr,  # f32 [z_parts, R, RANK], i8 [E, rows, rank], [E, rows], or None
    out_ptr,  # [parts, slots, rows], with FUSED [slots, units]
    slots_ptr,  # i32 [blocks * TOKENS], -1 where a block isn't full; None: slot i is row i, and all are of expert 0
    block_expert_ptr,  # i32 [blocks], -1 for blocks that aren't needed
    rows, columns, row_tiles, column_tiles, table_stride, steps, steps_per_part, slots, z_parts, z_tokens, rank, alpha, limit,
    BITS: tl.constexpr, GATED: tl.constexpr, FUSED: tl.constexpr, ACT: tl.constexpr, GATE: tl.constexpr, TOP_K: tl.constexpr,
    TOKENS: tl.constexpr, HEIGHT: tl.constexpr, UNROLL: tl.constexpr, TAIL: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """Grid (ceil(row tiles / HEIGHT), blocks, parts)."""
    group, block, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    STEP: tl.constexpr = 128 * UNROLL
    ROWS: tl.constexpr = 64 * HEIGHT
    lane, pair = tl.arange(0, TOKENS), tl.arange(0, 2 * TOKENS)
    if block_expert_ptr is not None:
        e = tl.load(block_expert_ptr + block).to(tl.int64)
        if e < 0:
            return
        slot = tl.load(slots_ptr + block * TOKENS + lane)
        pair_slot = tl.load(slots_ptr + block * TOKENS + pair // 2)
    else:
        e = tl.full([], 0, tl.int64)
        slot = tl.where(block * TOKENS + lane < slots, block * TOKENS + lane, -1)
        pair_slot = tl.where(block * TOKENS + pair // 2 < slots, block * TOKENS + pair // 2, -1)
    held = slot >= 0
    token = tl.where(held, slot // TOP_K, 0).to(tl.int64)
    pair_held = pair_slot >= 0
    pair_token = tl.where(pair_held, pair_slot // TOP_K, 0).to(tl.int64)
    x_ptrs = x_ptr + (pair_token * 2 + pair % 2)[None, :] * (steps * STEP)
    place = group * ROWS + tl.arange(0, ROWS)
    tile = group * HEIGHT

    total = tl.zeros([ROWS, TOKENS], tl.float32)
    for step in range(part * steps_per_part, tl.minimum((part + 1) * steps_per_part, steps)):
        if BITS == 8:  # a column tile at a time, because nothing is gained by more and registers are lost
            hi_lo = tl.zeros([ROWS, 2 * TOKENS], tl.int32)
            for u in tl.static_range(UNROLL):
                k = step * STEP + u * 128 + tl.arange(0, 128)
                inside = (place < rows)[:, None] & (k < columns)[None, :]
                w = tl.load(words_ptr + (e * rows + place)[:, None] * columns + k[None, :], mask=inside, other=0)
                x = tl.load(
                    x_ptrs + (step * STEP + u * 128 + tl.arange(0, 128))[:, None], mask=pair_held[None, :], other=0
                )
                hi_lo = tl.dot(w, x, hi_lo, out_dtype=tl.int32)  # triton 3.6 wants it said
        else:
            index, down, table = e * row_tiles + tile, row_tiles - tile, table_ptr + e * table_stride
            w = _weights(words_ptr, signs_ptr, table, index, down, step, column_tiles, BITS, HEIGHT, UNROLL, TAIL)
            x = tl.load(x_ptrs + (step * STEP + tl.arange(0, STEP))[:, None], mask=pair_held[None, :], other=0)
            hi_lo = tl.dot(w, x)
        x_scale = tl.load(x_scale_ptr + token * steps + step, mask=held, other=0.0)
        total += _exact(hi_lo, ROWS, TOKENS) * x_scale[None, :]

    if GATED:
        units = rows // 2
        unit, up = place // 16 * 8 + place % 8, place // 8 % 2
        row, real = unit + up * units, unit < units
    else:
        row, real = place, place < rows
    factor = tl.load(scale_ptr + e * rows + row, mask=real, other=0.0).to(tl.float32)
    y = total * factor[:, None]
    if part == 0:
        if bias_ptr is not None:
            y += tl.load(bias_ptr + e * rows + row, mask=real, other=0.0).to(tl.float32)[:, None]
        if shared_ptr is not None:
            both = real[:, None] & held[None, :]
            y += tl.load(shared_ptr + token[None, :] * rows + row[:, None], mask=both, other=0.0)
        if z_ptr is not None:
            y += _low_rank(
                z_ptr, coef_ptr, coef_scale_ptr, e, pair_token, pair_held, row, real, rows, z_parts, z_tokens, rank, RANK, ROWS,
                TOKENS,
            )  # fmt: skip

    at = part.to(tl.int64) * slots + slot
    if FUSED and GATED:
        g, u = tl.split(tl.permute(tl.reshape(y, [ROWS // 16, 2, 8, TOKENS]), (0, 2, 3, 1)))
        h = tl.reshape(apply_gate(g, u, alpha, limit, ACT, GATE), [ROWS // 2, TOKENS])
        unit = tile * 32 + tl.arange(0, ROWS // 2)
        mask = (unit < rows // 2)[:, None] & held[None, :]
        tl.store(out_ptr + at[None, :] * (rows // 2) + unit[:, None], h.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        if FUSED:
            y = activation(y, ACT)
        mask = real[:, None] & held[None, :]
        tl.store(out_ptr + at[None, :] * rows + row[:, None], y.to(out_ptr.dtype.element_ty), mask=mask)
