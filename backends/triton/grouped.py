"""The grouped product: coded weights of many experts with the tokens that are routed to each.

One program multiplies HEIGHT tiles of 64 packed rows (`moecc.backends.triton.pack`) of one expert with a block of TOKENS slots,
over the columns of one part (split-K, for decode, where there are too few tiles for the card):

  1. 16 bytes of codes per thread and 128 columns, straight from memory, already in the order of the product's left operand;
  2. each code is looked up in the expert's table of 256 entries of four int8: the register is four weights. The table is in shared
     memory, on sm_90 in as many copies as its 32 banks have use for (`_spread`), elsewhere by `tl.gather`; a load per code
     would be pipelined through it. 3 bit: bytes are flipped where the sign bit is set, v ^ 0xff = -1 - v. 4 bit: two lookups
     of two weights;
  3. int8 x int8 -> int32 on tensor cores. A token is two columns, the high and the low byte of its 16-bit fixed point, which
     is what an eight-token block needs to fill the instruction anyway;
  4. after STEP = 128 * UNROLL columns, hi * 256 + lo (still exact: 512 * 128 * 32512 < 2^31) times the token's scale for these
     columns goes into a float32 sum.

  HALF, where a weight meets many tokens in bfloat16: 3. the int8 weights as bfloat16, which they are exactly, with x as it is and
  hidden units rounded to bfloat16, into a float32 sum. 4. is not needed, and half as many registers are. For large tiles sm_90 has
  a kernel of its own, `moecc.backends.triton.hopper`.

  then y = scale * sum + bias + shared + coef_scale * (coef z); and with FUSED the gate, whose two rows a thread has.

What a program writes depends on its own slots and on nothing that other programs do, so results don't change from run to run.
"""

import triton
import triton.language as tl

from moecc.backends.triton.chain import after_last, let_next_start
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
    ptr,
    stride,
    down,
    across,
    SIZE: tl.constexpr,
    HEIGHT: tl.constexpr,
    UNROLL: tl.constexpr,
    TAIL: tl.constexpr,
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
def _spread(entries, one, COPIES: tl.constexpr):
    """i32 [256] -> the address in shared memory of COPIES copies side by side: entry c's are words c * COPIES + 0..COPIES-1.

    With 32 copies a warp's 32 lookups never meet in a bank of shared memory, with one copy they take 3.3 turns. one: a scalar."""
    WORDS: tl.constexpr = 256 * COPIES
    table = tl.inline_asm_elementwise(
        f"{{ .shared .align 128 .b32 moecc_table[{WORDS}]; mov.u32 $0, moecc_table; }}", "=r,r", [one], dtype=tl.int32,
        is_pure=False, pack=1,
    )  # fmt: skip
    entry = tl.arange(0, 256)
    for j in tl.static_range(
        COPIES // 4
    ):  # four at a time, each entry from others on, so that stores don't meet either
        at = table + entry * (COPIES * 4) + ((entry + j) % (COPIES // 4)) * 16
        tl.inline_asm_elementwise(
            "st.shared.v4.b32 [$1], {$2, $2, $2, $2}; mov.u32 $0, 0;", "=r,r,r", [at, entries], dtype=tl.int32,
            is_pure=False, pack=1,
        )  # fmt: skip
    tl.debug_barrier()
    # what loads from an address that is only known here isn't moved before the barrier
    return tl.inline_asm_elementwise(
        "mov.u32 $0, $1;", "=r,r", [table], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _lookup(w, table, HEIGHT: tl.constexpr, UNROLL: tl.constexpr, COPIES: tl.constexpr):
    """Code words -> their entries i32 [64 * HEIGHT, 32 * UNROLL]: four weights each, or two."""
    c0, c1, c2, c3 = w & 0xFF, (w >> 8) & 0xFF, (w >> 16) & 0xFF, (w >> 24) & 0xFF
    if COPIES > 1:  # a thread holds four words in a row, so word // 4 is its place in the warp
        copy, size = tl.arange(0, 512 * HEIGHT * UNROLL) // 4 % COPIES * 4, COPIES * 4
        c0, c1, c2, c3 = copy + c0 * size, copy + c1 * size, copy + c2 * size, copy + c3 * size
    code = tl.join(tl.join(c0, c2), tl.join(c1, c3))
    code = tl.reshape(
        code, [HEIGHT, UNROLL, 4, 8, 4, 2, 2, 4]
    )  # row tile, column tile, w, r, t, i, h, b
    code = tl.reshape(tl.permute(code, (0, 2, 5, 3, 1, 6, 7, 4)), [2048 * HEIGHT * UNROLL])
    if COPIES > 1:
        found = tl.inline_asm_elementwise(
            "{ .reg .u32 at; add.u32 at, $1, $2; ld.shared.b32 $0, [at]; }", "=r,r,r", [code, table], dtype=tl.int32,
            is_pure=True, pack=1,
        )  # fmt: skip
    else:
        found = tl.gather(table, code, 0)
    return tl.reshape(found, [64 * HEIGHT, 32 * UNROLL])


@triton.jit
def _flips(s, HEIGHT: tl.constexpr, UNROLL: tl.constexpr, HOPPER: tl.constexpr):
    """Sign words -> i32 [64 * HEIGHT, 32 * UNROLL] with 0xff in the bytes of negative weights."""
    if HOPPER:  # each byte's highest bit, eight times (PTX ISA, prmt)
        high = s[:, None] << (7 - tl.arange(0, 8))[None, :]
        flip = tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $1, 0xba98;", "=r,r", [high], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        flip = ((s[:, None] >> tl.arange(0, 8)[None, :]) & 0x01010101) * 255
    flip = tl.reshape(flip, [HEIGHT, UNROLL, 4, 8, 4, 2, 8])  # row tile, column tile, w, r, t, i, c
    return tl.reshape(tl.permute(flip, (0, 2, 5, 3, 1, 6, 4)), [64 * HEIGHT, 32 * UNROLL])


@triton.jit
def _stored(
    words_ptr, signs_ptr, index, down, step, column_tiles, BITS: tl.constexpr, HEIGHT: tl.constexpr, UNROLL: tl.constexpr,
    TAIL: tl.constexpr,
):  # fmt: skip
    """What one step reads from row tile `index` on: code words, and with them, at 4 bit, the odd codes or, at 3 bit, sign words."""
    first, across = step * UNROLL, column_tiles - step * UNROLL
    if BITS == 4:
        even, stride = words_ptr + (2 * index * column_tiles + first) * 512, 1024 * column_tiles
        words = _words(even, stride, down, across, 512, HEIGHT, UNROLL, TAIL)
        more = _words(even + column_tiles * 512, stride, down, across, 512, HEIGHT, UNROLL, TAIL)
    else:
        first += index * column_tiles
        words = _words(
            words_ptr + first * 512, 512 * column_tiles, down, across, 512, HEIGHT, UNROLL, TAIL
        )
        more = words
        if BITS == 3:
            more = _words(
                signs_ptr + first * 256, 256 * column_tiles, down, across, 256, HEIGHT, UNROLL, TAIL
            )
    return words, more


@triton.jit
def _weights(
    words, more, table, BITS: tl.constexpr, HEIGHT: tl.constexpr, UNROLL: tl.constexpr, COPIES: tl.constexpr,
    HOPPER: tl.constexpr,
):  # fmt: skip
    """-> words i32 [64 * HEIGHT, 32 * UNROLL] of four int8 weights; what is past the last column tile meets zeros in x."""
    p = _lookup(words, table, HEIGHT, UNROLL, COPIES)
    if BITS == 4:
        p = p | (_lookup(more, table, HEIGHT, UNROLL, COPIES) << 16)
    elif BITS == 3:
        p = p ^ _flips(more, HEIGHT, UNROLL, HOPPER)
    return p


@triton.jit
def paired(k):
    """The column that stands at place k of x as 16-bit floats: in sixteens, columns 0 1, 4 5, 8 9, 12 13 and then the others.

    A thread has columns 4t..4t+3 of a row of weights; the instruction for 16-bit floats wants 2t, 2t+1, 2t+8, 2t+9 of it."""
    return k // 16 * 16 + k // 2 % 4 * 4 + k // 8 % 2 * 2 + k % 2


@triton.jit
def place_of(column):
    """The inverse of `paired`."""
    return column // 16 * 16 + column // 4 % 4 * 2 + column // 2 % 2 * 8 + column % 2


@triton.jit
def _int8(p, ROWS: tl.constexpr, STEP: tl.constexpr):
    """Words of four weights -> the weights, int8 [ROWS, STEP]."""
    b0, b1, b2, b3 = (
        p.to(tl.int8),
        (p >> 8).to(tl.int8),
        (p >> 16).to(tl.int8),
        (p >> 24).to(tl.int8),
    )
    return tl.reshape(tl.join(tl.join(b0, b2), tl.join(b1, b3)), [ROWS, STEP])


@triton.jit
def pairs(p):
    """Words of four weights -> low, high: i32, two bfloat16 each, exactly. In assembly two at a time, because a compiler that packs
    them one by one takes twice as long: the low seven bits of a byte after 128 are 128 + m, and with the eighth -128 is -256."""
    return tl.inline_asm_elementwise(
        """{ .reg .b32 w, a, b, one; mov.b32 one, 0x3f803f80;
        prmt.b32 w, $2, 0, 0x4140; lop3.b32 a, w, 0x007f007f, 0x43004300, 0xea;
        lop3.b32 b, w, 0x00800080, 0xc300c300, 0xea; fma.rn.bf16x2 $0, a, one, b;
        prmt.b32 w, $2, 0, 0x4342; lop3.b32 a, w, 0x007f007f, 0x43004300, 0xea;
        lop3.b32 b, w, 0x00800080, 0xc300c300, 0xea; fma.rn.bf16x2 $1, a, one, b; }""",
        "=&r,=r,r", [p], dtype=(tl.int32, tl.int32), is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def _of_pairs(low, high, ROWS: tl.constexpr, STEP: tl.constexpr):
    """-> the weights, bfloat16 [ROWS, STEP] in the order of words."""
    h0, h1, h2, h3 = (
        low.to(tl.int16),
        (low >> 16).to(tl.int16),
        high.to(tl.int16),
        (high >> 16).to(tl.int16),
    )
    return tl.reshape(tl.join(tl.join(h0, h2), tl.join(h1, h3)), [ROWS, STEP]).to(
        tl.bfloat16, bitcast=True
    )


@triton.jit
def _paired(w, ROWS: tl.constexpr, STEP: tl.constexpr):
    """Columns in the order of `paired`, which takes no word from one thread to another."""
    return tl.reshape(
        tl.permute(tl.reshape(w, [ROWS, STEP // 16, 4, 2, 2]), (0, 1, 3, 2, 4)), [ROWS, STEP]
    )


@triton.jit
def _fence(one):
    """What cp.async has written to shared memory is seen by wgmma (PTX ISA, fence.proxy.async): triton before 3.7 leaves it out
    (its pull request 9610). one: a scalar."""
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
    """The same, for a dot that has ended. Left to itself, triton lets wgmma run into the next step, which may write the registers
    that it still reads (PTX ISA, wgmma.wait_group, forbids that; triton's issue 9433)."""
    return tl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=f,f", [total], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def _exact(hi_lo, ROWS: tl.constexpr, TOKENS: tl.constexpr):
    """int32 [ROWS, 2 * TOKENS] of high and low bytes -> their exact sum, rounded once to f32 [ROWS, TOKENS]."""
    hi, lo = tl.split(tl.reshape(hi_lo, [ROWS, TOKENS, 2]))
    return (hi * 256 + lo).to(tl.float32)


@triton.jit
def _low_rank(
    y, z_ptr, coef_ptr, coef_scale_ptr, e, token, held, pair_token, pair_held, row, real, rows, z_parts, z_tokens, rank,
    RANK: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """y + coef_scale * (coef z), f32 [ROWS, TOKENS]: z f32 [z_parts, tokens, RANK], coef i8 [E, rows, rank]."""
    r = tl.arange(0, RANK)
    at = (e * rows + row)[:, None] * rank + r[None, :]
    coef = tl.load(coef_ptr + at, mask=real[:, None] & (r < rank)[None, :], other=0)
    factor = tl.load(coef_scale_ptr + e * rows + row, mask=real, other=0.0).to(tl.float32)[:, None]
    if HALF:  # into y's own registers
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
        # every token twice, then chosen by column: a join of hi and lo would be reshaped in shared memory, which can't be for sm_90
        pair = tl.where((tl.arange(0, 2 * TOKENS) % 2 == 0)[None, :], hi, lo)
        z_scale, _ = tl.split(tl.reshape(z_scale, [1, TOKENS, 2]))
        y += _exact(tl.dot(coef, pair), ROWS, TOKENS) * z_scale * factor
    return y


@triton.jit
def _program(
    x_ptr, x_scale_ptr, words_ptr, signs_ptr, table, scale_ptr, bias_ptr, shared_ptr, z_ptr, coef_ptr, coef_scale_ptr, out_ptr,
    group, part, e, slot, pair_slot,  # i32 [TOKENS], [2 * TOKENS]: each twice
    rows, columns, out_width, row_tiles, column_tiles, steps, steps_per_part, slots, z_parts, z_tokens, rank, alpha, limit,
    BITS: tl.constexpr, GATED: tl.constexpr, FUSED: tl.constexpr, ACT: tl.constexpr, GATE: tl.constexpr, TOP_K: tl.constexpr,
    TOKENS: tl.constexpr, HEIGHT: tl.constexpr, UNROLL: tl.constexpr, TAIL: tl.constexpr, RANK: tl.constexpr,
    SHARED: tl.constexpr, COPIES: tl.constexpr, HALF: tl.constexpr, HOPPER: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """What `grouped_kernel` does for row group `group` and TOKENS slots of expert e."""
    STEP: tl.constexpr = 128 * UNROLL
    ROWS: tl.constexpr = 64 * HEIGHT
    FLOAT: tl.constexpr = (
        tl.float32 if UPCAST else x_ptr.dtype.element_ty
    )  # the interpreter's bfloat16 is wrong
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
        if (
            BITS == 8
        ):  # a column tile at a time, because nothing is gained by more and registers are lost
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
                    hi_lo = tl.dot(w, x, hi_lo, out_dtype=tl.int32)  # triton 3.6 wants it said
        else:
            x = tl.load(x_ptrs + (step * STEP + tl.arange(0, STEP))[:, None], mask=x_held, other=0)
            if HOPPER:
                _fence(steps)
            words, more = _stored(
                words_ptr, signs_ptr, index, down, step, column_tiles, BITS, HEIGHT, UNROLL, TAIL
            )
            p = _weights(words, more, table, BITS, HEIGHT, UNROLL, COPIES, HOPPER)
            if HALF:
                if HOPPER:
                    low, high = pairs(p)
                    w = _of_pairs(low, high, ROWS, STEP)
                else:
                    w = _int8(p, ROWS, STEP).to(FLOAT)
                total = tl.dot(_paired(w, ROWS, STEP), x.to(FLOAT), total, input_precision="ieee")
                if HOPPER:
                    total = _finished(total)
            else:
                hi_lo = tl.dot(_int8(p, ROWS, STEP), x)
        if not HALF:
            x_scale = tl.load(x_scale_ptr + token * steps + step, mask=held, other=0.0)
            total += _exact(hi_lo, ROWS, TOKENS) * x_scale[None, :]

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
                y, z_ptr, coef_ptr, coef_scale_ptr, e, token, held, pair_token, pair_held, row, real, rows, z_parts, z_tokens,
                rank, RANK, ROWS, TOKENS, HALF,
            )  # fmt: skip

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


@triton.jit(do_not_specialize=["slots", "z_parts", "z_tokens"])
def grouped_kernel(
    x_ptr,  # i8 [R, 2, steps * STEP]: high and low bytes of row slot // TOP_K; HALF: floats [R, steps * STEP] by `paired`
    x_scale_ptr,  # f32 [R, steps]; HALF: None
    words_ptr, signs_ptr, table_ptr,  # moecc.backends.triton.pack; BITS 8: i8 [E, rows, columns], None, None
    scale_ptr, bias_ptr,  # [E, rows] of any float type; bias or None
    shared_ptr,  # f32 [SHARED, R, rows] or None: the part of all experts, of row slot // TOP_K
    z_ptr, coef_ptr, coef_scale_ptr,  # f32 [z_parts, R, RANK], i8 [E, rows, rank], [E, rows], or None
    out_ptr,  # [parts, slots, rows], with FUSED [slots, out_width]: units, with HALF by `paired`
    slots_ptr,  # i32 [blocks * TOKENS], -1 where a block isn't full; None: slot i is row i, and all are of expert 0
    block_expert_ptr,  # i32 [blocks], -1 for blocks that aren't needed
    rows, columns, out_width, row_tiles, column_tiles, table_stride, steps, steps_per_part, slots, z_parts, z_tokens, rank,
    alpha, limit,
    BITS: tl.constexpr, GATED: tl.constexpr, FUSED: tl.constexpr, ACT: tl.constexpr, GATE: tl.constexpr, TOP_K: tl.constexpr,
    TOKENS: tl.constexpr, HEIGHT: tl.constexpr, UNROLL: tl.constexpr, TAIL: tl.constexpr, RANK: tl.constexpr,
    SHARED: tl.constexpr, COPIES: tl.constexpr, HALF: tl.constexpr, HOPPER: tl.constexpr,
    UPCAST: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """Grid (ceil(row tiles / HEIGHT), blocks, parts). NARROW: a block that is at most half full takes half the work."""
    after_last(HOPPER)
    group, block, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    lane, pair = tl.arange(0, TOKENS), tl.arange(0, 2 * TOKENS)
    if block_expert_ptr is not None:
        e = tl.load(block_expert_ptr + block).to(tl.int64)
        slot = tl.load(
            slots_ptr + block * TOKENS + lane
        )  # before the branch: they needn't wait for the expert
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
            table = _spread(table, steps, COPIES)
    full = True
    if NARROW:
        full = tl.load(slots_ptr + block * TOKENS + TOKENS // 2) >= 0
    if full:
        _program(
            x_ptr, x_scale_ptr, words_ptr, signs_ptr, table, scale_ptr, bias_ptr, shared_ptr, z_ptr, coef_ptr, coef_scale_ptr,
            out_ptr, group, part, e, slot, pair_slot, rows, columns, out_width, row_tiles, column_tiles, steps, steps_per_part,
            slots, z_parts, z_tokens, rank, alpha, limit, BITS, GATED, FUSED, ACT, GATE, TOP_K, TOKENS, HEIGHT, UNROLL, TAIL,
            RANK, SHARED, COPIES, HALF, HOPPER, UPCAST,
        )  # fmt: skip
    if NARROW and not full:
        few = tl.load(slots_ptr + block * TOKENS + tl.arange(0, TOKENS // 2))
        few_pairs = tl.load(slots_ptr + block * TOKENS + lane // 2)
        _program(
            x_ptr, x_scale_ptr, words_ptr, signs_ptr, table, scale_ptr, bias_ptr, shared_ptr, z_ptr, coef_ptr, coef_scale_ptr,
            out_ptr, group, part, e, few, few_pairs, rows, columns, out_width, row_tiles, column_tiles, steps, steps_per_part,
            slots, z_parts, z_tokens, rank, alpha, limit, BITS, GATED, FUSED, ACT, GATE, TOP_K, TOKENS // 2, HEIGHT, UNROLL,
            TAIL, RANK, SHARED, COPIES, HALF, HOPPER, UPCAST,
        )  # fmt: skip
