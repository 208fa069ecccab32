"""Writing to a cache in one pass: rotary embedding, Hadamard rotation, quantization, store.

One program takes one head's key or value of one token. What it writes is what the row's
format encodes (see ``formats``).
"""

import triton
import triton.language as tl

from kvfold.kernels.triton.bits import rounded_to_bf16
from kvfold.kernels.triton.formats import encoded, encoded_halves


@triton.jit
def append_kernel(
    X, x_batch, x_head, x_token,
    DATA, d_page, d_head, d_row, SCALES, s_page, s_head, groups,
    TABLE, table_row, page_size, capacity, FIRST,
    COS, SIN, c_batch, c_token, rotary_dim,
    heads, tokens, dim,
    D: tl.constexpr, GROUPS: tl.constexpr, FORMAT: tl.constexpr, PLAIN: tl.constexpr,
    HALVES: tl.constexpr, ROTATION: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Write rows X ``[B, H, T, dim]`` at positions ``FIRST[b] + t``.

    COS, SIN: float32 ``[B, T, rotary_dim / 2]``. Positions without a page, or beyond the
    capacity, are skipped. FORMAT: a cache format's code; PLAIN: without scales;
    HALVES: of four bits, in GROUPS groups. ROTATION: size of the Hadamard blocks, 0 for none.
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
    if PLAIN:
        if DATA.dtype.element_ty == tl.bfloat16:
            x = rounded_to_bf16(x)  # Triton's interpreter would cut digits off
        tl.store(to + d, x.to(DATA.dtype.element_ty), mask=d < dim)
    elif HALVES:
        i = tl.arange(0, D // 2)
        if ROTATION > 0:
            low, high = _rotated(x, d, i, D, ROTATION)
        else:
            low = tl.sum(tl.where(d[:, None] == 2 * i[None, :], x[:, None], 0.0), 0)
            high = tl.sum(tl.where(d[:, None] == 2 * i[None, :] + 1, x[:, None], 0.0), 0)
        SIZE: tl.constexpr = D // 2 // GROUPS  # bytes of a group
        low, high = tl.reshape(low, (GROUPS, SIZE)), tl.reshape(high, (GROUPS, SIZE))
        low, high, scale = encoded_halves(low, high, FORMAT)
        both = (low.to(tl.uint8) | (high.to(tl.uint8) << 4)).to(tl.uint8)
        g = tl.arange(0, GROUPS)
        byte = g[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
        tl.store(to + byte, both, mask=(g < groups)[:, None])
        tl.store(scales + g, scale.to(tl.bfloat16), mask=g < groups)
    else:
        codes, scale = encoded(x, FORMAT)
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
