"""``int8``: symmetric, one scale per row that maps the largest number to 127."""

from typing import TYPE_CHECKING

from kvfold.ops.format import WHOLE_ROW, Format

if TYPE_CHECKING:
    import torch


def _encode(rows: "torch.Tensor") -> "tuple[torch.Tensor, torch.Tensor]":
    import torch

    from kvfold.ops.rounding import scaled_to, whole

    numbers, scales = scaled_to(rows, 127.0)
    return whole(numbers, -127, 127).to(torch.int8).view(torch.uint8), scales


def _decode(data: "torch.Tensor", scales: "torch.Tensor", dim: int) -> "torch.Tensor":
    import torch

    return data.view(torch.int8).float() * scales.float()


FORMAT = Format(
    "int8", code=4, bits=8, stored="int8", encode=_encode, decode=_decode,
    group=WHOLE_ROW, step=4, key_flip=0x80,
)  # fmt: skip
