"""Rotary embedding of a layer's tokens: how far each is turned."""

import torch

from kvfold.cache.checks import check_tensor
from kvfold.errors import InputError
from kvfold.ops.rope import Rotary, following

CosSin = tuple[torch.Tensor, torch.Tensor]


def turns_of(
    rotary: Rotary, x: torch.Tensor, positions: torch.Tensor | None, lengths: list[int]
) -> CosSin:
    """Cosines and sines for the tokens of ``x`` ``[B, T, C]``, float32 or better.

    Args:
        positions: ``[T]`` or ``[B, T]``; None to count on from ``lengths``, what sequences hold.

    Raises:
        InputError: for positions of another shape.
    """
    if positions is None:
        positions = following(x.shape[1], lengths, x.device)
    else:
        check_tensor("positions", positions)
        if positions.shape not in ((x.shape[1],), x.shape[:2]):
            shapes = f"{list(positions.shape)}, expected [T] or [B, T] = {list(x.shape[:2])}"
            raise InputError(f"positions has shape {shapes}")
    return rotary.cos_sin(positions, torch.promote_types(x.dtype, torch.float32))
