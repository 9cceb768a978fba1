"""The inner loops of coding on a GPU: one block of columns, a program per tile of an expert's rows.

What is left of the rows stays in registers. A program goes through the groups of the block from
left to right, gives each the nearest of 256 centroids, and carries its error over to the later
columns of the block; `triton_coder` carries it over to the columns behind.

No sum runs over a row, and no product is rounded to fewer bits than float32 has. So a row's codes
are the same in any tile.
"""

import triton
import triton.language as tl

VERSION = triton.__version__


@triton.jit
def _column(x, v, V: tl.constexpr):
    """Return column v of x [ROWS, V] as [ROWS, 1]."""
    return tl.gather(x, tl.full([x.shape[0], 1], v, tl.int32), 1)


@triton.jit
def _times(x, matrix_ptr, V: tl.constexpr):
    """Return the product of x [ROWS, V] and a matrix [V, V]."""
    i = tl.arange(0, V)
    product = _column(x, 0, V) * tl.load(matrix_ptr + i)[None, :]
    for v in tl.static_range(1, V):
        product += _column(x, v, V) * tl.load(matrix_ptr + v * V + i)[None, :]
    return product


@triton.jit
def _cost(error, metric_ptr, V: tl.constexpr):
    """Return |error metric|^2 of each row, [ROWS]."""
    image = _times(error, metric_ptr, V)
    return tl.sum(image * image, 1)


@triton.jit
def _nearest(x, image_ptr, base_ptr, V: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr):
    """Return the first centroid of least base + x image for each row: i32 [ROWS].

    base_ptr: one for all rows, or one for each, [ROWS, 1]. STEP centroids are compared at once.
    """
    centroid = tl.arange(0, STEP)
    least = tl.full([ROWS, STEP], float("inf"), tl.float32)
    start = tl.zeros([ROWS, STEP], tl.int32)
    for c in tl.static_range(0, 256, STEP):
        cost = tl.load(base_ptr + c + centroid[None, :])
        for v in tl.static_range(V):
            cost += _column(x, v, V) * tl.load(image_ptr + v * 256 + c + centroid)[None, :]
        better = cost < least
        least = tl.where(better, cost, least)
        start = tl.where(better, c, start)
    ties = least == tl.min(least, 1, keep_dims=True)
    return tl.min(tl.where(ties, start + centroid[None, :], 255), 1)


@triton.jit(do_not_specialize=["rows", "width", "first"])
def code_kernel(
    pull_ptr,  # f32 [E, n, width]: choose: the weights that are left; sweep: (W - Q) H
    dense_ptr,  # f32 [E, n, width]: sweep: Q
    carry_ptr,  # f32 [E, width, width]: choose: of U; sweep: of H
    inverse_ptr,  # f32 [E, G, V, V]: sweep: of H's blocks
    inner_ptr,  # this and the next four: `codebooks.Tables`
    metric_ptr,
    image_ptr,
    base_ptr,
    table_ptr,
    moved_ptr,  # f32 [E, n, width]: what later columns have to follow
    codes_ptr,  # i64 [E, n, width / V]
    negative_ptr,  # u8 [E, n, width], if signs are stored apart
    pull_expert,  # elements from one expert to the next; others likewise
    pull_row,
    dense_expert,
    dense_row,
    carry_expert,
    carry_row,
    moved_expert,
    moved_row,
    codes_expert,
    codes_row,
    negative_expert,
    negative_row,
    rows,  # n
    width,  # of the block
    first,  # the block's first group
    groups,  # G
    SWEEP: tl.constexpr,
    SIGNED: tl.constexpr,
    V: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    COLUMNS: tl.constexpr,  # a power of two, at least `width`
):
    """Grid: (tiles of rows, E)."""
    expert = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column, i = tl.arange(0, COLUMNS), tl.arange(0, V)
    inside, real = row < rows, column < width
    row = row.to(tl.int64)
    pull_ptr += expert * pull_expert + row[:, None] * pull_row + column[None, :]
    moved_ptr += expert * moved_expert + row[:, None] * moved_row + i[None, :]
    codes_ptr += expert * codes_expert + row * codes_row
    if SWEEP:
        dense_ptr += expert * dense_expert + row[:, None] * dense_row + i[None, :]
    if SIGNED:
        negative_ptr += expert * negative_expert + row[:, None] * negative_row + i[None, :]
    carry_ptr += expert * carry_expert + column
    table_ptr += expert * (256 * V)
    left = tl.load(pull_ptr, mask=inside[:, None] & real[None, :], other=0.0)
    for g in range(width // V):
        at = expert * groups + first + g
        t = tl.gather(left, tl.broadcast_to(g * V + i[None, :], (ROWS, V)), 1)
        if SWEEP:
            old = tl.load(dense_ptr + g * V, mask=inside[:, None], other=0.0)
            t = old + _times(t, inverse_ptr + at * (V * V), V)
        if SIGNED:
            negative = t + 0.5 < 0
            x = _times(t + 0.5, inner_ptr + at * (V * V), V)
            x = tl.where(negative, 2 * x, -2 * x)
            pattern = tl.sum(negative.to(tl.int32) << i[None, :], 1, keep_dims=True)
            base = base_ptr + (at * (1 << V) + pattern) * 256
            image = image_ptr + expert * (256 * V)
        else:
            x = -2 * _times(t, inner_ptr + at * (V * V), V)
            base = base_ptr + at * 256
            image = image_ptr + at * (256 * V)
        code = _nearest(x, image, base, V, ROWS, STEP)
        q = tl.load(table_ptr + code[:, None] * V + i[None, :])
        if SIGNED:
            q = tl.where(negative, -q, q) - 0.5
        taken = inside
        metric = metric_ptr + at * (V * V)
        if SWEEP:
            change = q - old
            if SIGNED:
                # The search looks at the signs of t alone, so the code so far may be better.
                better = _cost(t - q, metric, V) < _cost(t - old, metric, V)
                change = tl.where(better[:, None], change, 0.0)
                taken = inside & better
        else:
            change = _times(t - q, metric, V)
        tl.store(moved_ptr + g * V, change, mask=inside[:, None])
        tl.store(codes_ptr + g, code.to(tl.int64), mask=taken)
        if SIGNED:
            tl.store(negative_ptr + g * V, negative.to(tl.uint8), mask=taken[:, None])
        for v in tl.static_range(V):
            carry = tl.load(carry_ptr + (g * V + v) * carry_row, mask=real, other=0.0)
            left -= _column(change, v, V) * carry[None, :]
