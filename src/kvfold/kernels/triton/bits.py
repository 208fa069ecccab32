"""Rounding by bits, the same on every GPU and under Triton's interpreter."""

import triton
import triton.language as tl


@triton.jit
def rounded_to_bf16(x):
    """The nearest bfloat16, half to even, as float32."""
    bits = x.to(tl.int32, bitcast=True)
    near = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) << 16
    return near.to(tl.float32, bitcast=True)
