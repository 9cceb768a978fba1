"""Codes to bfloat16 weights on sm_90, in Gluon: the left operand of the persistent product."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def _bytes(b0, b1, b2, b3):
    """Join four tensors along two new axes, [..., 2, 2], in the order b0, b1, b2, b3."""
    return gl.join(gl.join(b0, b2), gl.join(b1, b3))


@gluon.jit
def _in_rows(v, HEIGHT: gl.constexpr):
    """Reorder [HEIGHT, w r t, i, b] to [64 * HEIGHT, b t]; values stay in their registers."""
    v = gl.reshape(v, [HEIGHT, 4, 8, 4, 2, 4])
    return gl.reshape(gl.permute(v, (0, 1, 4, 2, 5, 3)), [64 * HEIGHT, 16])


@gluon.jit
def threads(SIZE: gl.constexpr):
    """Return the thread's number in its warpgroup, i32 [1, 128, 1], laid out as by `read_tile`."""
    layout: gl.constexpr = gl.BlockedLayout([1, 1, SIZE], [1, 32, 1], [2, 4, 1], [2, 1, 0])
    return gl.arange(0, 128, gl.SliceLayout(0, gl.SliceLayout(2, layout)))[None, :, None]


@gluon.jit
def read_tile(ptr, stride, down, more, HEIGHT: gl.constexpr, SIZE: gl.constexpr):
    """Load one column tile of HEIGHT row tiles, `stride` words apart: i32 [HEIGHT, 128, SIZE].

    Zeros past `down` row tiles, and everywhere unless `more`.
    """
    layout: gl.constexpr = gl.BlockedLayout([1, 1, SIZE], [1, 32, 1], [2, 4, 1], [2, 1, 0])
    tile = gl.arange(0, HEIGHT, gl.SliceLayout(1, gl.SliceLayout(2, layout)))[:, None, None]
    word = gl.arange(0, SIZE, gl.SliceLayout(0, gl.SliceLayout(1, layout)))[None, None, :]
    return gl.load(
        ptr + tile * stride + threads(SIZE) * SIZE + word, mask=(tile < down) & more, other=0
    )


@gluon.jit
def decode_step(
    words,
    signs,
    copies,
    table,
    PART: gl.constexpr,
    BITS: gl.constexpr,
    HEIGHT: gl.constexpr,
    COPIES: gl.constexpr,
    left: gl.constexpr,
):
    """Decode half PART of a column tile to a left operand, bf16 [64 * HEIGHT, 64].

    words i32 [HEIGHT, 128, 2]: the half's code words; signs: the sign words of the column tile.
    copies, shaped as words: the offset in bytes of the table's copy that a thread uses.
    """
    SIZE: gl.constexpr = COPIES * 8
    c0, c1, c2, c3 = words & 0xFF, (words >> 8) & 0xFF, (words >> 16) & 0xFF, (words >> 24) & 0xFF
    at = _bytes(copies | c0 * SIZE, copies | c1 * SIZE, copies | c2 * SIZE, copies | c3 * SIZE)
    low, high = gl.inline_asm_elementwise(
        "{ .reg .u32 at; add.u32 at, $2, $3; ld.shared.v2.b32 {$0, $1}, [at]; }",
        "=r,=r,r,r",
        [_in_rows(at, HEIGHT), table],
        dtype=(gl.int32, gl.int32),
        is_pure=False,
        pack=1,
    )
    if BITS == 3:  # -1 - v = -(v + 1/2) - 1/2; the sign bit makes s = -1 or 1 of the bits of 1
        FIRST: gl.constexpr = 7 - 4 * PART
        first, second = gl.inline_asm_elementwise(
            "prmt.b32 $0, $2, 0, 0x1404; prmt.b32 $1, $2, 0, 0x3424;",
            "=&r,=r,r",
            [signs],
            dtype=(gl.int32, gl.int32),
            is_pure=True,
            pack=1,
        )
        a = _bytes(first << FIRST, first << (FIRST - 1), first << (FIRST - 2), first << (FIRST - 3))
        b = _bytes(
            second << FIRST, second << (FIRST - 1), second << (FIRST - 2), second << (FIRST - 3)
        )
        low, high = gl.inline_asm_elementwise(
            """{ .reg .b32 s, less; mov.b32 less, 0xbf00bf00;
            lop3.b32 s, $4, 0x80008000, 0x3f803f80, 0xea; fma.rn.bf16x2 $0, $2, s, less;
            lop3.b32 s, $5, 0x80008000, 0x3f803f80, 0xea; fma.rn.bf16x2 $1, $3, s, less; }""",
            "=&r,=r,r,r,r,r",
            [low, high, _in_rows(a, HEIGHT), _in_rows(b, HEIGHT)],
            dtype=(gl.int32, gl.int32),
            is_pure=True,
            pack=1,
        )
    w = _bytes(
        low.to(gl.int16), (low >> 16).to(gl.int16), high.to(gl.int16), (high >> 16).to(gl.int16)
    )
    # columns in the order of `moecc.backends.triton.decode.paired`
    w = gl.permute(gl.reshape(w, [64 * HEIGHT, 4, 4, 2, 2]), (0, 1, 3, 2, 4))
    w = gl.reshape(w, [64 * HEIGHT, 64]).to(gl.bfloat16, bitcast=True)
    return gl.convert_layout(w, left, assert_trivial=True)
