"""16-bit fixed point in a kernel: v = (256 hi + lo) * scale, hi and lo int8, scale float32."""

import triton
import triton.language as tl


@triton.jit
def fixed_point(v, peak):
    """Split v f32 into hi and lo int8 and a scale f32: v = (256 hi + lo) * scale within scale / 2.

    peak is the largest |v| that shares the scale. 15 bits are used: |256 hi + lo| <= 32512. A peak
    of NaN (`peak_of`) makes the scale NaN.
    """
    peak = tl.where(peak < 1e-30, 1e-30, peak)
    q = tl.floor(v * (32512.0 / peak) + 0.5).to(tl.int32)
    hi = (q + 128) >> 8
    return hi.to(tl.int8), (q - (hi << 8)).to(tl.int8), peak / 32512.0


@triton.jit
def peak_of(v, keep_dims: tl.constexpr):
    """Return the largest |v| along the first axis, NaN if an infinity or a NaN is among them."""
    return tl.max(tl.abs(v), 0, keep_dims=keep_dims) + tl.sum(v * 0, 0, keep_dims=keep_dims)


@triton.jit
def exact_sum(hi_lo, ROWS: tl.constexpr, TOKENS: tl.constexpr):
    """Add sums of high and low bytes, i32 [ROWS, 2 * TOKENS]; round once to f32 [ROWS, TOKENS]."""
    hi, lo = tl.split(tl.reshape(hi_lo, [ROWS, TOKENS, 2]))
    return (hi * 256 + lo).to(tl.float32)


@triton.jit
def store_fixed(values, out_ptr, out_scale_ptr, row, block, steps, STEP: tl.constexpr):
    """Store one block f32 [STEP] of a row into i8 [rows, 2, steps * STEP] and f32 [rows, steps]."""
    hi, lo, scale = fixed_point(values, peak_of(values, False))
    out = out_ptr + row * (2 * steps * STEP) + block * STEP + tl.arange(0, STEP)
    tl.store(out, hi)
    tl.store(out + steps * STEP, lo)
    tl.store(out_scale_ptr + row * steps + block, scale)
