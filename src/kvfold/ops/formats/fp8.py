"""``fp8``: e4m3 (arXiv 2209.05433), times one scale per row that maps the largest number to 448."""

from typing import TYPE_CHECKING

from kvfold.ops.format import WHOLE_ROW, Format

if TYPE_CHECKING:
    import torch

_TOP = 448.0


def _encode(rows: "torch.Tensor") -> "tuple[torch.Tensor, torch.Tensor]":
    import torch

    from kvfold.ops.rounding import scaled_to

    numbers, scales = scaled_to(rows, _TOP)
    return numbers.clamp(-_TOP, _TOP).to(torch.float8_e4m3fn).view(torch.uint8), scales


def _decode(data: "torch.Tensor", scales: "torch.Tensor", dim: int) -> "torch.Tensor":
    import torch

    return data.contiguous().view(torch.float8_e4m3fn).float() * scales.float()


FORMAT = Format(
    "fp8", code=3, bits=8, stored="uint8", encode=_encode, decode=_decode, group=WHOLE_ROW
)
