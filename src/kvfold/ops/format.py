"""What a cache format is: how caches store a head's key or value of one token, a row of numbers.

Torch is imported where numbers are encoded, so that the planner and the command line, which only
ask for sizes, start without it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

WHOLE_ROW = 1 << 30  # a group that no row fills
_SCALE_BITS = 16  # scales are bfloat16


@dataclass(frozen=True)
class Format:
    """A way to store rows of numbers. Its file in ``ops/formats`` declares it.

    Attributes:
        code: its number in the kernels, which have the same in ``kernels/cpu/formats``.
        bits: per number, without scales: 4, or whole bytes.
        stored: the torch dtype that its bytes are read as.
        encode: rows ``[..., D]`` float32 to bytes ``[..., row_bytes(D)]`` uint8, and scales
            ``[..., groups(D)]`` bfloat16.
        decode: those and D to rows ``[..., D]`` float32.
        plain: numbers as PyTorch has them, without scales.
        group: consecutive numbers that share a scale (``WHOLE_ROW``: all), 0 for no scales. The
            last group of a row is filled with zeros.
        step: numbers that lie together in the blocks that the CPU kernels read, see
            ``kernels/cpu/layout.h``. key_flip: bits that they find flipped in bytes of keys.
        rotates_keys: by a Hadamard matrix, which spreads the few large dimensions of keys over
            all (arXiv 2404.00456).
        keeps_exact_ends: too coarse for the first and the last tokens of a sequence.
    """

    name: str
    code: int
    bits: int
    stored: str
    encode: "Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]" = field(compare=False)
    decode: "Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]" = field(compare=False)
    plain: bool = False
    group: int = 0
    step: int = 1
    key_flip: int = 0
    rotates_keys: bool = False
    keeps_exact_ends: bool = False

    @property
    def dtype(self) -> "torch.dtype":
        """What its bytes are read as."""
        import torch

        return getattr(torch, self.stored)

    @property
    def grouped(self) -> bool:
        """Whether a row has as many scales as groups of numbers."""
        return 0 < self.group < WHOLE_ROW

    def groups(self, dim: int) -> int:
        """Scales per row of ``dim`` numbers."""
        return -(-dim // self.group) if self.group else 0

    def stored_dim(self, dim: int) -> int:
        """Numbers stored per row: the last group is filled with zeros."""
        return self.groups(dim) * self.group if self.grouped else dim

    def row_bytes(self, dim: int) -> int:
        """Bytes of an encoded row, without scales."""
        return self.stored_dim(dim) * self.bits // 8

    def bits_each(self, dim: int) -> float:
        """Bits per number of a row, scales included."""
        return (8 * self.row_bytes(dim) + _SCALE_BITS * self.groups(dim)) / dim

    def rotation(self, dim: int) -> int:
        """Size of the Hadamard blocks that keys of ``dim`` numbers are rotated by, 0 for none.

        The largest power of two that divides the stored row.
        """
        stored = self.stored_dim(dim)
        return stored & -stored if self.rotates_keys else 0


def plain(name: str, code: int, bits: int, stored: str, step: int = 1) -> Format:
    """A format of PyTorch's own numbers: as they are, rounded once, no scales."""
    encode, decode = partial(_rounded, stored), partial(_read, stored)
    return Format(name, code, bits, stored, encode, decode, plain=True, step=step)


def _rounded(stored: str, rows: "torch.Tensor") -> "tuple[torch.Tensor, torch.Tensor]":
    import torch

    numbers = rows.to(getattr(torch, stored)).contiguous()
    return numbers.view(torch.uint8), rows.new_empty((*rows.shape[:-1], 0)).bfloat16()


def _read(stored: str, data: "torch.Tensor", scales: "torch.Tensor", dim: int) -> "torch.Tensor":
    import torch

    return data.contiguous().view(getattr(torch, stored)).float()
