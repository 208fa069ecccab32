"""Rotary position embedding (RoPE, arXiv 2104.09864).

A pair of dimensions j of a query or key at position p is a point of the plane, and is turned by
the angle ``p * f_j``. So a score depends on how far apart query and key are, not on where.
"""

import math
from dataclasses import dataclass

import torch

from kvfold.errors import InputError


@dataclass(frozen=True)
class Rotary:
    """Which dimensions are turned, and how fast.

    Args:
        dim: number of dimensions turned, even: the first ones of each head. Fewer than
            ``head_dim`` is partial rotary, as in Phi.
        base: pair j turns by ``base ** (-2 j / dim)`` radians per position.
        interleaved: a pair is dimensions 2 j and 2 j + 1 (GPT-J), not j and j + dim / 2 (Llama).
        inv_freq: ``[dim / 2]``, radians per position of each pair, instead of ``base``: for models
            that scale their frequencies. A tensor of any float dtype; kept as a tuple of floats.
        attention_factor: what cosines and sines are multiplied by, so that scores of the turned
            dimensions grow by its square, as YaRN does (arXiv 2309.00071).

    Raises:
        InputError: for values that cannot be.

    >>> rotary = Rotary(4)
    >>> cos, sin = rotary.cos_sin(torch.tensor([0, 1]))
    >>> rotary.apply(torch.ones(1, 1, 2, 4), cos, sin)[0, 0, 0]  # position 0 stays as it is
    tensor([1., 1., 1., 1.])
    """

    dim: int
    base: float = 10000.0
    interleaved: bool = False
    inv_freq: torch.Tensor | tuple[float, ...] | None = None
    attention_factor: float = 1.0

    def __post_init__(self) -> None:
        if self.dim < 2 or self.dim % 2:
            raise InputError(
                f"rotary dim={self.dim}: expected an even number, at least 2",
                "rotary embedding turns pairs of dimensions",
            )
        if not (self.base > 0 and math.isfinite(self.base)):
            raise InputError(f"rotary base={self.base}: expected a positive number")
        if not (self.attention_factor > 0 and math.isfinite(self.attention_factor)):
            factor = f"rotary attention_factor={self.attention_factor}"
            raise InputError(f"{factor}: expected a positive number")
        if self.inv_freq is not None:
            object.__setattr__(self, "inv_freq", _as_floats(self.inv_freq, self.dim // 2))

    def frequencies(self, device: torch.device | None = None) -> torch.Tensor:
        """Radians per position of each pair: float64 ``[dim / 2]``."""
        if self.inv_freq is not None:
            return torch.as_tensor(self.inv_freq, dtype=torch.float64, device=device)
        exponents = torch.arange(0, self.dim, 2, dtype=torch.float64, device=device) / self.dim
        return self.base**-exponents

    def cos_sin(
        self, positions: torch.Tensor, dtype: torch.dtype = torch.float32
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine of every pair's angle, times ``attention_factor``.

        Angles are float64: in float32 they would be off by 0.004 radians at position 65,536.

        Args:
            positions: ``[T]`` or ``[B, T]``, any integer or float dtype.
            dtype: of the result.

        Returns:
            ``[T, dim / 2]`` or ``[B, T, dim / 2]``, twice.
        """
        angles = positions.to(torch.float64)[..., None] * self.frequencies(positions.device)
        cos, sin = (turn * self.attention_factor for turn in (angles.cos(), angles.sin()))
        return cos.to(dtype), sin.to(dtype)

    def apply(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Turn queries or keys.

        Args:
            x: ``[B, H, T, D]``, ``D >= dim``; dimensions from ``dim`` on stay as they are.
            cos, sin: of ``cos_sin``; the arithmetic has their precision if x's is lower.

        Returns:
            ``[B, H, T, D]`` in x's dtype.

        Raises:
            InputError: if the heads are smaller than ``dim``.
        """
        if x.shape[-1] < self.dim:
            raise InputError(f"rotary dim={self.dim} is more than the head's {x.shape[-1]}")
        cos, sin = cos.unsqueeze(-3), sin.unsqueeze(-3)  # one angle for all heads
        turned, rest = x[..., : self.dim], x[..., self.dim :]
        if self.interleaved:
            a, b = turned[..., 0::2], turned[..., 1::2]
            turned = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
        else:
            a, b = turned.chunk(2, -1)
            turned = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
        turned = turned.to(x.dtype)
        return torch.cat([turned, rest], -1) if rest.shape[-1] else turned


def following(tokens: int, past: list[int], device: torch.device | None = None) -> torch.Tensor:
    """Positions of ``tokens`` new tokens after ``past[b]`` ones: ``[T]`` if all have 0, else
    ``[B, T]``.

    >>> following(2, [0, 7]).tolist()
    [[0, 1], [7, 8]]
    """
    new = torch.arange(tokens, dtype=torch.long, device=device)
    first = torch.tensor(past, dtype=torch.long, device=device)
    return first[:, None] + new if any(past) else new


def _as_floats(inv_freq: torch.Tensor | tuple[float, ...], pairs: int) -> tuple[float, ...]:
    given = torch.as_tensor(inv_freq, dtype=torch.float64)
    if given.shape != (pairs,):
        raise InputError(f"inv_freq has shape {list(given.shape)}, expected [{pairs}]: dim / 2")
    if not bool(given.isfinite().all()):
        raise InputError("inv_freq holds numbers that are not finite")
    return tuple(given.tolist())
