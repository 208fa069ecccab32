"""How the kernels read and write each cache format; a kernel is compiled for the formats it meets.

FORMAT is a format's code (see ``kvfold.ops.formats``). Formats of whole bytes have a scale per row,
those of four bits one per group. What is written here is what they encode, byte for byte (but for
which of two equal extremes an INT4 scale takes its sign from).
"""

import triton
import triton.language as tl

from kvfold.ops.formats import FORMATS

_FP8, _INT8, _INT4 = (tl.constexpr(FORMATS[name].code) for name in ("fp8", "int8", "int4"))
_NL4 = tl.constexpr(FORMATS["nl4"].code)
_ROUNDER = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it rounds a float32 half to even
_FP8_FACTOR = tl.constexpr(256.0)  # e4m3 bits read as float16 are 2^-8 of the number


@triton.jit
def widened(raw, FORMAT: tl.constexpr, DOT: tl.constexpr):
    """Stored numbers without their scale, exactly, in the products' dtype."""
    if FORMAT == _FP8:
        wide = raw.to(tl.uint16)
        bits = ((wide & 0x80) << 8) | ((wide & 0x7F) << 7)
        return bits.to(tl.float16, bitcast=True).to(DOT)
    return raw.to(DOT)


@triton.jit
def row_scale(scales, at, inside, FORMAT: tl.constexpr):
    """``[N]`` float32, the scale of each row."""
    found = tl.load(scales + at, mask=inside, other=0.0).to(tl.float32)
    if FORMAT == _FP8:
        found = found * _FP8_FACTOR
    return found


@triton.jit
def halves(raw, scales, at, inside, N: tl.constexpr, WIDTH: tl.constexpr, groups,
           GROUPS: tl.constexpr, FORMAT: tl.constexpr, DOT: tl.constexpr):  # fmt: skip
    """Both planes ``[N, WIDTH]`` of rows of four bits, decoded. WIDTH: bytes of a row."""
    g = tl.arange(0, GROUPS)
    there = inside[:, None] & (g < groups)[None, :]
    scale = tl.load(scales + at[:, None] + g[None, :], mask=there, other=0.0).to(tl.float32)
    wide = tl.broadcast_to(scale[:, :, None], (N, GROUPS, WIDTH // GROUPS))
    each = tl.reshape(wide, (N, WIDTH))
    low = _of_half(raw & 15, FORMAT) * each
    high = _of_half(raw >> 4, FORMAT) * each
    return low.to(DOT), high.to(DOT)


@triton.jit
def _of_half(code, FORMAT: tl.constexpr):
    """The numbers, without their scale, that codes of four bits stand for."""
    tl.static_assert((FORMAT == _INT4) | (FORMAT == _NL4))
    c = code.to(tl.float32) - 8.0
    if FORMAT == _NL4:
        c = _nl4_level(c)
    return c


@triton.jit
def encoded(x, FORMAT: tl.constexpr):
    """Codes of a row of numbers, as they are stored, and its scale (float32)."""
    tl.static_assert((FORMAT == _FP8) | (FORMAT == _INT8))
    top = 448.0 if FORMAT == _FP8 else 127.0
    most = tl.max(tl.abs(x), 0)
    scale = _scale_above(tl.div_rn(most, tl.full([], top, tl.float32)))
    y = tl.div_rn(x, tl.where(scale == 0.0, 1.0, scale) + tl.zeros_like(x))
    y = tl.minimum(tl.maximum(y, -top), top)
    if FORMAT == _FP8:
        codes = _e4m3(y)
    else:
        codes = ((y + _ROUNDER) - _ROUNDER).to(tl.int8)
    return codes, scale


@triton.jit
def encoded_halves(low, high, FORMAT: tl.constexpr):
    """Codes of the even and the odd numbers ``[GROUPS, bytes]``, and each group's scale."""
    tl.static_assert((FORMAT == _INT4) | (FORMAT == _NL4))
    most = tl.maximum(tl.max(low, 1), tl.max(high, 1))
    least = tl.minimum(tl.min(low, 1), tl.min(high, 1))
    extreme = tl.where(most >= -least, most, least)
    if FORMAT == _INT4:
        size = _scale_above(tl.abs(extreme) / 8.0)
    else:
        size = _scale_above(tl.div_rn(tl.abs(extreme), tl.zeros_like(extreme) + 127.0))
    scale = tl.where(extreme > 0, -size, size)
    divisor = tl.where(scale == 0.0, 1.0, scale)[:, None] + tl.zeros_like(low)
    if FORMAT == _INT4:
        low, high = _int4_code(low, divisor), _int4_code(high, divisor)
    else:
        low, high = _nl4_code(low, divisor), _nl4_code(high, divisor)
    return low, high, scale


@triton.jit
def _int4_code(x, divisor):
    whole = (tl.div_rn(x, divisor) + _ROUNDER) - _ROUNDER
    return tl.minimum(tl.maximum(whole, -8.0), 7.0) + 8.0


@triton.jit
def _nl4_level(c):
    """The whole number nearest to ``c (12.75 + 25/512 c²)``; all before rounding is exact."""
    return (c * (12.75 + c * c * 0.048828125) + _ROUNDER) - _ROUNDER


@triton.jit
def _nl4_code(x, divisor):
    """How many of the fifteen middles between levels lie below ``x / divisor``."""
    y = tl.div_rn(x, divisor)
    code = tl.zeros_like(y)
    for c in tl.static_range(-8, 7):
        low, high = _nl4_level(tl.zeros_like(y) + c), _nl4_level(tl.zeros_like(y) + (c + 1))
        code += (y > (low + high) * 0.5).to(tl.float32)
    return code


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
