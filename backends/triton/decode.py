"""Codes to weights in a kernel: read the words of one step, look the codes up, order the weights.

`read_step` and `decode_step` yield words of four int8 weights in the order of
`moecc.backends.triton.pack`, which is the order of the product's left operand. `as_int8` and
`as_bfloat16` turn them into operands.
"""

import triton
import triton.language as tl


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
    """Load SIZE words of each of HEIGHT row tiles and UNROLL column tiles.

    The result is i32 [HEIGHT * UNROLL * SIZE], zero past `down` row tiles or `across` column tiles.
    Row tiles are `stride` words apart.
    """
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
def spread_table(entries, one, COPIES: tl.constexpr):
    """Copy entries i32 [256] COPIES times into shared memory and return the address.

    The copies of entry c are words c * COPIES + 0..COPIES-1. With 32 copies a warp's 32 lookups
    never conflict in a bank; with one copy they take 3.3 turns. one: any scalar, as the assembly's
    operand.
    """
    WORDS: tl.constexpr = 256 * COPIES
    table = tl.inline_asm_elementwise(
        f"{{ .shared .align 128 .b32 moecc_table[{WORDS}]; mov.u32 $0, moecc_table; }}",
        "=r,r",
        [one],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
    entry = tl.arange(0, 256)
    # four words per store; entries start at different copies, so that stores don't conflict either
    for j in tl.static_range(COPIES // 4):
        at = table + entry * (COPIES * 4) + ((entry + j) % (COPIES // 4)) * 16
        tl.inline_asm_elementwise(
            "st.shared.v4.b32 [$1], {$2, $2, $2, $2}; mov.u32 $0, 0;",
            "=r,r,r",
            [at, entries],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    tl.debug_barrier()
    # the compiler cannot move a load before the barrier if it learns the address only here
    return tl.inline_asm_elementwise(
        "mov.u32 $0, $1;", "=r,r", [table], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _lookup(w, table, HEIGHT: tl.constexpr, UNROLL: tl.constexpr, COPIES: tl.constexpr):
    """Return the entries of code words, i32 [64 * HEIGHT, 32 * UNROLL], of four weights or two."""
    c0, c1, c2, c3 = w & 0xFF, (w >> 8) & 0xFF, (w >> 16) & 0xFF, (w >> 24) & 0xFF
    if COPIES > 1:  # a thread holds four words in a row, so word // 4 is its place in the warp
        copy, size = tl.arange(0, 512 * HEIGHT * UNROLL) // 4 % COPIES * 4, COPIES * 4
        c0, c1, c2, c3 = copy + c0 * size, copy + c1 * size, copy + c2 * size, copy + c3 * size
    code = tl.join(tl.join(c0, c2), tl.join(c1, c3))
    # row tile, column tile, w, r, t, i, h, b
    code = tl.reshape(code, [HEIGHT, UNROLL, 4, 8, 4, 2, 2, 4])
    code = tl.reshape(tl.permute(code, (0, 2, 5, 3, 1, 6, 7, 4)), [2048 * HEIGHT * UNROLL])
    if COPIES > 1:
        found = tl.inline_asm_elementwise(
            "{ .reg .u32 at; add.u32 at, $1, $2; ld.shared.b32 $0, [at]; }",
            "=r,r,r",
            [code, table],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    else:
        found = tl.gather(table, code, 0)
    return tl.reshape(found, [64 * HEIGHT, 32 * UNROLL])


@triton.jit
def _flips(s, HEIGHT: tl.constexpr, UNROLL: tl.constexpr, HOPPER: tl.constexpr):
    """Return i32 [64 * HEIGHT, 32 * UNROLL] with 0xff in the bytes of negative weights."""
    if HOPPER:  # prmt repeats the highest bit of each byte eight times (PTX ISA)
        high = s[:, None] << (7 - tl.arange(0, 8))[None, :]
        flip = tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $1, 0xba98;", "=r,r", [high], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        flip = ((s[:, None] >> tl.arange(0, 8)[None, :]) & 0x01010101) * 255
    # row tile, column tile, w, r, t, i, c
    flip = tl.reshape(flip, [HEIGHT, UNROLL, 4, 8, 4, 2, 8])
    return tl.reshape(tl.permute(flip, (0, 2, 5, 3, 1, 6, 4)), [64 * HEIGHT, 32 * UNROLL])


@triton.jit
def read_step(
    words_ptr,
    signs_ptr,
    index,
    down,
    step,
    column_tiles,
    BITS: tl.constexpr,
    HEIGHT: tl.constexpr,
    UNROLL: tl.constexpr,
    TAIL: tl.constexpr,
):
    """Load the words of one step, from row tile `index` on.

    Return code words and a second tensor: the odd codes at 4 bit, sign words at 3 bit, else a
    dummy.
    """
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
def decode_step(
    words,
    more,
    table,
    BITS: tl.constexpr,
    HEIGHT: tl.constexpr,
    UNROLL: tl.constexpr,
    COPIES: tl.constexpr,
    HOPPER: tl.constexpr,
):
    """Return words i32 [64 * HEIGHT, 32 * UNROLL] of four int8 weights each.

    Weights past the last column tile are arbitrary; x is zero there.
    """
    p = _lookup(words, table, HEIGHT, UNROLL, COPIES)
    if BITS == 4:
        p = p | (_lookup(more, table, HEIGHT, UNROLL, COPIES) << 16)
    elif BITS == 3:
        p = p ^ _flips(more, HEIGHT, UNROLL, HOPPER)
    return p


@triton.jit
def paired(k):
    """Return the column at place k of x as 16-bit floats.

    Of every sixteen columns, 0 1, 4 5, 8 9, 12 13 come first and the others follow: a thread holds
    columns 4t..4t+3 of a row of weights, but the instruction for 16-bit floats takes columns
    2t, 2t+1, 2t+8, 2t+9 from it.
    """
    return k // 16 * 16 + k // 2 % 4 * 4 + k // 8 % 2 * 2 + k % 2


@triton.jit
def place_of(column):
    """Return the place of a column: the inverse of `paired`."""
    return column // 16 * 16 + column // 4 % 4 * 2 + column // 2 % 2 * 8 + column % 2


@triton.jit
def as_int8(p, ROWS: tl.constexpr, STEP: tl.constexpr):
    """Unpack words of four weights to int8 [ROWS, STEP]."""
    b0, b1, b2, b3 = (
        p.to(tl.int8),
        (p >> 8).to(tl.int8),
        (p >> 16).to(tl.int8),
        (p >> 24).to(tl.int8),
    )
    return tl.reshape(tl.join(tl.join(b0, b2), tl.join(b1, b3)), [ROWS, STEP])


@triton.jit
def pairs(p):
    """Convert words of four int8 weights exactly to low and high, i32 of two bfloat16 each.

    Assembly converts two weights at a time; the compiler packs them one by one, which takes twice
    as long. The low seven bits m of a byte, put behind the bits of 128, read 128 + m; from that,
    128 is subtracted, or 256 if the eighth bit is set.
    """
    return tl.inline_asm_elementwise(
        """{ .reg .b32 w, a, b, one; mov.b32 one, 0x3f803f80;
        prmt.b32 w, $2, 0, 0x4140; lop3.b32 a, w, 0x007f007f, 0x43004300, 0xea;
        lop3.b32 b, w, 0x00800080, 0xc300c300, 0xea; fma.rn.bf16x2 $0, a, one, b;
        prmt.b32 w, $2, 0, 0x4342; lop3.b32 a, w, 0x007f007f, 0x43004300, 0xea;
        lop3.b32 b, w, 0x00800080, 0xc300c300, 0xea; fma.rn.bf16x2 $1, a, one, b; }""",
        "=&r,=r,r",
        [p],
        dtype=(tl.int32, tl.int32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def as_bfloat16(low, high, ROWS: tl.constexpr, STEP: tl.constexpr):
    """Arrange the results of `pairs` as bfloat16 [ROWS, STEP], in the order of words."""
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
def pair_columns(w, ROWS: tl.constexpr, STEP: tl.constexpr):
    """Reorder columns as `paired` does; every word stays in its thread."""
    return tl.reshape(
        tl.permute(tl.reshape(w, [ROWS, STEP // 16, 4, 2, 2]), (0, 1, 3, 2, 4)), [ROWS, STEP]
    )
