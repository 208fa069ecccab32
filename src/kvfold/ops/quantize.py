"""How caches store numbers: the one definition of each format, which every kernel is tested by.

A row is one head's key or value of one token. ``encode`` gives it as bytes and scales, ``decode``
gives back float32.

- ``fp32``, ``fp16``, ``bf16``: as they are, no scales.
- ``fp8``: e4m3 (arXiv 2209.05433), times one scale per row that maps the largest number to 448.
- ``int8``: symmetric, one scale per row that maps the largest number to 127.
- ``int4``: one scale per group of 32 dimensions. The number of largest size gets the code -8,
  which has no positive twin, so the scale takes its sign (as in llama.cpp's Q4_0). Codes are
  stored with 8 added, an even dimension in the low half of each byte. Keys are rotated first by
  a Hadamard matrix, which spreads the few large dimensions of keys over all (arXiv 2404.00456).

Scales are bfloat16, rounded up so that no code overflows; codes are computed with the rounded
scale, so rounding it costs next to nothing.
"""

from dataclasses import dataclass

import torch

from kvfold.errors import InputError

GROUP = 32  # dimensions that share an INT4 scale


@dataclass(frozen=True)
class Format:
    """A way to store rows of numbers.

    Attributes:
        code: its number in the kernels' interface. bits: per number, without scales.
        dtype: of the stored rows, or None if they are encoded.
    """

    name: str
    code: int
    bits: int
    dtype: torch.dtype | None = None

    def groups(self, dim: int) -> int:
        """Scales per row of ``dim`` numbers."""
        if self.name == "int4":
            return -(-dim // GROUP)
        return 0 if self.dtype else 1

    def row_bytes(self, dim: int) -> int:
        """Bytes of an encoded row, without scales."""
        return self.stored_dim(dim) * self.bits // 8

    def stored_dim(self, dim: int) -> int:
        """Numbers stored per row: INT4 fills its last group with zeros."""
        return -(-dim // GROUP) * GROUP if self.name == "int4" else dim


FORMATS = {
    f.name: f
    for f in (
        Format("fp32", 0, 32, torch.float32),
        Format("fp16", 1, 16, torch.float16),
        Format("bf16", 2, 16, torch.bfloat16),
        Format("fp8", 3, 8),
        Format("int8", 4, 8),
        Format("int4", 5, 4),
    )
}
_BY_DTYPE = {f.dtype: f for f in FORMATS.values() if f.dtype}


def format_of(dtype: str | torch.dtype) -> Format:
    """Look a cache format up by name, or by the torch dtype of an unquantized one.

    Raises:
        InputError: if there is no such format.

    >>> format_of("int4").row_bytes(128)
    64
    """
    found = FORMATS.get(dtype) if isinstance(dtype, str) else _BY_DTYPE.get(dtype)
    if found is None:
        raise InputError(f"unknown cache dtype {dtype!r}", f"choose one of {', '.join(FORMATS)}")
    return found


def encode(rows: torch.Tensor, fmt: Format) -> tuple[torch.Tensor, torch.Tensor]:
    """Encode rows.

    Args:
        rows: ``[..., D]``, any float dtype.

    Returns:
        bytes ``[..., fmt.row_bytes(D)]`` uint8, and scales ``[..., fmt.groups(D)]`` bfloat16.
    """
    rows = rows.float()
    if fmt.dtype is not None:
        stored = rows.to(fmt.dtype).contiguous()
        return stored.view(torch.uint8), rows.new_empty((*rows.shape[:-1], 0)).bfloat16()
    if fmt.name == "int4":
        return _encode_int4(rows)
    top = 127.0 if fmt.name == "int8" else 448.0
    scales = _scale_above(rows.abs().amax(-1, keepdim=True) / top)
    scaled = _divided(rows, scales.float())
    if fmt.name == "int8":
        return _whole(scaled, -127, 127).to(torch.int8).view(torch.uint8), scales
    return scaled.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8), scales


def decode(data: torch.Tensor, scales: torch.Tensor, fmt: Format, dim: int) -> torch.Tensor:
    """Float32 rows ``[..., dim]`` of what ``encode`` gave."""
    if fmt.dtype is not None:
        return data.contiguous().view(fmt.dtype).float()
    if fmt.name == "int8":
        return data.view(torch.int8).float() * scales.float()
    if fmt.name == "fp8":
        return data.contiguous().view(torch.float8_e4m3fn).float() * scales.float()
    codes = torch.stack([data & 15, data >> 4], -1).flatten(-2).to(torch.float32) - 8
    grouped = codes.unflatten(-1, (-1, GROUP)) * scales.float()[..., None]
    return grouped.flatten(-2)[..., :dim]


def _encode_int4(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    padding = -rows.shape[-1] % GROUP
    groups = torch.nn.functional.pad(rows, (0, padding)).unflatten(-1, (-1, GROUP))
    extreme = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    size = _scale_above(extreme.abs() / 8)
    scales = torch.where(extreme > 0, -size, size)
    codes = (_whole(_divided(groups, scales.float()), -8, 7) + 8).to(torch.uint8).flatten(-2)
    return codes[..., 0::2] | codes[..., 1::2] << 4, scales[..., 0]


def _scale_above(x: torch.Tensor) -> torch.Tensor:
    """The next bfloat16 at or above ``x`` >= 0 (float32)."""
    bits = ((x.view(torch.int32) + 0xFFFF) >> 16).to(torch.int16)
    nan = torch.full_like(x, torch.nan, dtype=torch.bfloat16)
    return torch.where(x.isnan(), nan, bits.view(torch.bfloat16))


def _divided(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return torch.where(scale == 0, 0.0, x / scale)


def _whole(x: torch.Tensor, low: int, high: int) -> torch.Tensor:
    return x.round().nan_to_num(nan=0.0).clamp(low, high)


def rotation_size(fmt: Format, dim: int) -> int:
    """Size of the Hadamard blocks that keys of ``dim`` numbers are rotated by, 0 for none.

    The largest power of two that divides the stored row; only INT4 needs it.
    """
    stored = fmt.stored_dim(dim)
    return stored & -stored if fmt.name == "int4" else 0


def rotate(rows: torch.Tensor, size: int) -> torch.Tensor:
    """Multiply consecutive blocks of ``size`` dimensions by the normalised Hadamard matrix.

    Symmetric and orthogonal, so its own inverse, and q . k does not change when both are rotated.

    Args:
        rows: ``[..., D]``, D a multiple of ``size``, a power of two; 0 changes nothing.

    >>> x = torch.randn(3, 64)
    >>> torch.allclose(rotate(rotate(x, 64), 64), x, atol=1e-5)
    True
    """
    if size == 0:
        return rows
    blocks = rows.unflatten(-1, (-1, size))
    half = 1
    while half < size:
        pairs = blocks.unflatten(-1, (-1, 2, half))
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        blocks = torch.stack([a + b, a - b], -2).flatten(-3)
        half *= 2
    one, of = torch.tensor([1.0, size], dtype=torch.float32, device=rows.device)
    return (blocks * (one / of.sqrt())).flatten(-2)
