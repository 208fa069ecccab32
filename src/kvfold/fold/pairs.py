"""Which dimensions of a head rotate together under rotary embedding."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Pairs:
    """Which dimensions of a head rotate together: the first ``rotary_dim``, in pairs.

    Half-split pairs (Llama) are (j, j + r/2); interleaved pairs are (2j, 2j + 1).
    A pair is one complex number, k_j = k[first] + i k[second]; rotary embeddings multiply
    it by a phase, so a gauge that commutes with them is one complex number per pair.
    """

    rotary_dim: int
    interleaved: bool = False

    def split(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``[..., D, X]`` -> complex pairs ``[..., r/2, X]`` and the rest ``[..., D - r, X]``."""
        rotating, rest = rows[..., : self.rotary_dim, :], rows[..., self.rotary_dim :, :]
        if self.interleaved:
            first, second = rotating[..., 0::2, :], rotating[..., 1::2, :]
        else:
            first, second = rotating.tensor_split(2, dim=-2)
        return torch.complex(first.contiguous(), second.contiguous()), rest

    def join(self, pairs: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
        """The inverse of :meth:`split`."""
        if self.interleaved:
            rotating = torch.stack([pairs.real, pairs.imag], dim=-2).flatten(-3, -2)
        else:
            rotating = torch.cat([pairs.real, pairs.imag], dim=-2)
        return torch.cat([rotating, rest], dim=-2)
