"""Rounding to codes and scales, as every encoded cache format does it.

Scales are bfloat16, rounded up so that no code overflows; codes are computed with the rounded
scale, so rounding it costs next to nothing.
"""

import torch


def scale_above(x: torch.Tensor) -> torch.Tensor:
    """The next bfloat16 at or above ``x`` >= 0 (float32)."""
    bits = ((x.view(torch.int32) + 0xFFFF) >> 16).to(torch.int16)
    nan = torch.full_like(x, torch.nan, dtype=torch.bfloat16)
    return torch.where(x.isnan(), nan, bits.view(torch.bfloat16))


def divided(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """``x / scale``, 0 where the scale is."""
    return torch.where(scale == 0, 0.0, x / scale)


def whole(x: torch.Tensor, low: int, high: int) -> torch.Tensor:
    """The nearest whole number within ``low`` and ``high``; 0 for NaN."""
    return x.round().nan_to_num(nan=0.0).clamp(low, high)


def scaled_to(rows: torch.Tensor, top: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows with their largest number at or just below ``top``, and their scales ``[..., 1]``."""
    scales = scale_above(rows.abs().amax(-1, keepdim=True) / top)
    return divided(rows, scales.float()), scales


def grouped(rows: torch.Tensor, group: int) -> torch.Tensor:
    """Rows ``[..., D]`` as ``[..., groups, group]``, the last group filled with zeros."""
    padded = torch.nn.functional.pad(rows, (0, -rows.shape[-1] % group))
    return padded.unflatten(-1, (-1, group))


def signed_scales(groups: torch.Tensor, top: float) -> torch.Tensor:
    """Scales ``[..., 1]`` that give each group's number of largest size ``-top``, or just above."""
    extreme = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    size = scale_above(extreme.abs() / top)
    return torch.where(extreme > 0, -size, size)
