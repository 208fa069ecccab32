"""``nl4``: as ``int4``, in as many bytes, but with levels that stand closer together near zero.

Most numbers of a group are small beside its largest one, so evenly spaced levels are finest where
few numbers are (compare NF4, arXiv 2305.14314). Code c from -8 to 7 stands for the whole number
nearest to c (12.75 + 25/512 c²), of at most 127: close to the levels that Lloyd's algorithm finds
for normally distributed numbers in groups of 32. The number of largest size gets the code -8, and
the scale its sign; codes are stored as INT4's, and keys are rotated first.
"""

from itertools import pairwise
from typing import TYPE_CHECKING

from kvfold.ops.format import Format

if TYPE_CHECKING:
    import torch

_GROUP = 32
LEVELS = [round(c * (12.75 + 25 / 512 * c**2)) for c in range(-8, 8)]
BETWEEN = [(low + high) / 2 for low, high in pairwise(LEVELS)]


def _encode(rows: "torch.Tensor") -> "tuple[torch.Tensor, torch.Tensor]":
    import torch

    from kvfold.ops.rounding import divided, grouped, signed_scales

    groups = grouped(rows, _GROUP)
    scales = signed_scales(groups, -LEVELS[0])
    between = torch.tensor(BETWEEN, dtype=torch.float32, device=rows.device)
    codes = torch.bucketize(divided(groups, scales.float()).nan_to_num(nan=-128.0), between)
    codes = codes.to(torch.uint8).flatten(-2)
    return codes[..., 0::2] | codes[..., 1::2] << 4, scales[..., 0]


def _decode(data: "torch.Tensor", scales: "torch.Tensor", dim: int) -> "torch.Tensor":
    import torch

    levels = torch.tensor(LEVELS, dtype=torch.float32, device=data.device)
    codes = torch.stack([data & 15, data >> 4], -1).flatten(-2)
    grouped = levels[codes.long()].unflatten(-1, (-1, _GROUP)) * scales.float()[..., None]
    return grouped.flatten(-2)[..., :dim]


FORMAT = Format(
    "nl4", code=6, bits=4, stored="uint8", encode=_encode, decode=_decode,
    group=_GROUP, step=8, rotates_keys=True, keeps_exact_ends=True,
)  # fmt: skip
