"""Writing to a cache in one pass: rotary embedding, Hadamard rotation, quantization, store.

One program takes one head's key or value of one token. What it writes is what ``ops.formats``
encodes, byte for byte (but for which of two equal extremes an INT4 scale takes its sign from).
"""

import triton
import triton.language as tl

from kvfold.kernels.triton.bits import rounded_to_bf16

_GROUP = tl.constexpr(32)
_HALF_GROUP = tl.constexpr(16)
_ROUNDER = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it rounds a float32 half to even


@triton.jit
def _scale_above(x):
    """The next bfloat16 at or above x >= 0, as float32."""
    bits = x.to(tl.int32, bitcast=True)
    up = ((bits + 0xFFFF) >> 16) << 16
    return up.to(tl.float32, bitcast=True)


@triton.jit
def _e4m3(y):
    """float32 within ±448 -> the bits of float8 e4m3, rounded half to even."""
    size = y.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    exponent = tl.maximum((size >> 23) - 127, -6)
    quantum = ((exponent - 3 + 127) << 23).to(tl.float32, bitcast=True)
    inverse = ((127 + 3 - exponent) << 23).to(tl.float32, bitcast=True)
    whole = (y * inverse + _ROUNDER) - _ROUNDER  # products with powers of two are exact
    # As float16 of 2^-8 times the number, e4m3's bits are the middle ones.
    half = (whole * quantum * 0.00390625).to(tl.float16).to(tl.uint16, bitcast=True)
    sign = (y.to(tl.int32, bitcast=True) < 0).to(tl.uint16)
    return (((half >> 7) & 0x7F) | (sign << 7)).to(tl.uint8)


@triton.jit
def append_kernel(
    X, x_batch, x_head, x_token,
    DATA, d_page, d_head, d_row, SCALES, s_page, s_head, groups,
    TABLE, table_row, page_size, capacity, FIRST,
    COS, SIN, c_batch, c_token, rotary_dim,
    heads, tokens, dim,
    D: tl.constexpr, GROUPS: tl.constexpr, FORMAT: tl.constexpr, ROTATION: tl.constexpr,
    ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Write rows X ``[B, H, T, dim]`` at positions ``FIRST[b] + t``.

    COS, SIN: float32 ``[B, T, rotary_dim / 2]``. Positions without a page, or beyond the
    capacity, are skipped. FORMAT: 0 plain, 1 fp8, 2 int8, 3 int4. ROTATION: size of the
    Hadamard blocks, 0 for none.
    """
    t, head, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    j = tl.load(FIRST + b) + t
    if j >= capacity:
        return
    page = tl.load(TABLE + b * table_row + j // page_size).to(tl.int64)
    at = (j % page_size).to(tl.int64)
    if page < 0:
        return
    d = tl.arange(0, D)
    row = X + b.to(tl.int64) * x_batch + head.to(tl.int64) * x_head + t.to(tl.int64) * x_token
    x = tl.load(row + d, mask=d < dim, other=0.0).to(tl.float32)
    if ROTARY:
        half = rotary_dim // 2
        if INTERLEAVED:
            pair, second = d // 2, d % 2 == 1
            other = tl.where(second, d - 1, d + 1)
        else:
            pair, second = d % half, d >= half
            other = tl.where(second, d - half, d + half)
        turns = d < rotary_dim
        y = tl.load(row + other, mask=turns, other=0.0).to(tl.float32)
        angle = b.to(tl.int64) * c_batch + t * c_token + pair
        cos = tl.load(COS + angle, mask=turns, other=1.0)
        sin = tl.load(SIN + angle, mask=turns, other=0.0)
        x = x * cos + tl.where(second, y, -y) * sin

    to = DATA + page * d_page + head * d_head + at * d_row
    scales = SCALES + page * s_page + head * s_head + at * groups
    if FORMAT == 0:
        if DATA.dtype.element_ty == tl.bfloat16:
            x = rounded_to_bf16(x)  # Triton's interpreter would cut digits off
        tl.store(to + d, x.to(DATA.dtype.element_ty), mask=d < dim)
    elif FORMAT == 3:
        i = tl.arange(0, D // 2)
        if ROTATION > 0:
            low, high = _rotated(x, d, i, D, ROTATION)
        else:
            low = tl.sum(tl.where(d[:, None] == 2 * i[None, :], x[:, None], 0.0), 0)
            high = tl.sum(tl.where(d[:, None] == 2 * i[None, :] + 1, x[:, None], 0.0), 0)
        low, high = tl.reshape(low, (GROUPS, 16)), tl.reshape(high, (GROUPS, 16))
        most = tl.maximum(tl.max(low, 1), tl.max(high, 1))
        least = tl.minimum(tl.min(low, 1), tl.min(high, 1))
        extreme = tl.where(most >= -least, most, least)
        size = _scale_above(tl.abs(extreme) / 8.0)
        scale = tl.where(extreme > 0, -size, size)
        divisor = tl.where(scale == 0.0, 1.0, scale)[:, None] + tl.zeros_like(low)
        low = (
            tl.minimum(tl.maximum((tl.div_rn(low, divisor) + _ROUNDER) - _ROUNDER, -8.0), 7.0) + 8.0
        )
        high = (
            tl.minimum(tl.maximum((tl.div_rn(high, divisor) + _ROUNDER) - _ROUNDER, -8.0), 7.0)
            + 8.0
        )
        both = (low.to(tl.uint8) | (high.to(tl.uint8) << 4)).to(tl.uint8)
        g = tl.arange(0, GROUPS)
        byte = g[:, None] * _HALF_GROUP + tl.arange(0, 16)[None, :]
        tl.store(to + byte, both, mask=(g < groups)[:, None])
        tl.store(scales + g, scale.to(tl.bfloat16), mask=g < groups)
    else:
        top = 448.0 if FORMAT == 1 else 127.0
        most = tl.max(tl.abs(x), 0)
        scale = _scale_above(tl.div_rn(most, tl.full([], top, tl.float32)))
        y = tl.div_rn(x, tl.where(scale == 0.0, 1.0, scale) + tl.zeros_like(x))
        y = tl.minimum(tl.maximum(y, -top), top)
        if FORMAT == 1:
            tl.store(to + d, _e4m3(y), mask=d < dim)
        else:
            codes = ((y + _ROUNDER) - _ROUNDER).to(tl.int8)
            tl.store(to + d, codes, mask=d < dim)
        tl.store(scales, scale.to(tl.bfloat16))


@triton.jit
def _rotated(x, d, i, D: tl.constexpr, ROTATION: tl.constexpr):
    """Even and odd dimensions of x times the block-diagonal Hadamard matrix.

    Its entry (r, c) is (-1)^(number of ones in r & c) / sqrt(ROTATION) within a block.
    """
    inside = (d // ROTATION)[:, None] == (2 * i // ROTATION)[None, :]
    low = _signs(d[:, None] & (2 * i)[None, :] & (ROTATION - 1))
    high = _signs(d[:, None] & (2 * i + 1)[None, :] & (ROTATION - 1))
    norm = 1.0 / (ROTATION**0.5)
    even = tl.sum(tl.where(inside, low * x[:, None], 0.0), 0) * norm
    odd = tl.sum(tl.where(inside, high * x[:, None], 0.0), 0) * norm
    return even, odd


@triton.jit
def _signs(bits):
    """-1.0 where an odd number of bits is set, else 1.0."""
    bits = bits ^ (bits >> 8)
    bits = bits ^ (bits >> 4)
    bits = bits ^ (bits >> 2)
    bits = bits ^ (bits >> 1)
    return 1.0 - 2.0 * (bits & 1).to(tl.float32)
