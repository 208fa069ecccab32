"""``int4``: one scale per group of 32 dimensions; keys are rotated first.

The number of largest size gets the code -8, which has no positive twin, so the scale takes its
sign (as in llama.cpp's Q4_0). Codes are stored with 8 added, an even dimension in the low half of
each byte.
"""

from typing import TYPE_CHECKING

from kvfold.ops.format import Format

if TYPE_CHECKING:
    import torch

_GROUP = 32


def _encode(rows: "torch.Tensor") -> "tuple[torch.Tensor, torch.Tensor]":
    import torch

    from kvfold.ops.rounding import divided, grouped, signed_scales, whole

    groups = grouped(rows, _GROUP)
    scales = signed_scales(groups, 8)
    codes = (whole(divided(groups, scales.float()), -8, 7) + 8).to(torch.uint8).flatten(-2)
    return codes[..., 0::2] | codes[..., 1::2] << 4, scales[..., 0]


def _decode(data: "torch.Tensor", scales: "torch.Tensor", dim: int) -> "torch.Tensor":
    import torch

    codes = torch.stack([data & 15, data >> 4], -1).flatten(-2).to(torch.float32) - 8
    grouped = codes.unflatten(-1, (-1, _GROUP)) * scales.float()[..., None]
    return grouped.flatten(-2)[..., :dim]


FORMAT = Format(
    "int4", code=5, bits=4, stored="uint8", encode=_encode, decode=_decode,
    group=_GROUP, step=8, rotates_keys=True, keeps_exact_ends=True,
)  # fmt: skip
