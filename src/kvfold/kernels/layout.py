"""How a store's pages lay out encoded rows.

``packed`` pages hold blocks of 16 tokens in the order the CPU kernels read them (described in
``kernels/cpu/layout.h``); others hold one row per token. Kernels write both; this is the plain
PyTorch view of them, for reading back and for machines without kernels.
"""

from dataclasses import dataclass

import torch

from kvfold.kernels.limits import BLOCK
from kvfold.ops.format import Format


@dataclass(frozen=True)
class Layout:
    """One side (keys or values) of a page of one head.

    Attributes:
        dim: the head's size. key: keys and values are packed differently.
    """

    fmt: Format
    dim: int
    page_size: int
    packed: bool
    key: bool

    @property
    def padded(self) -> int:
        """Numbers per token, with the zeros that fill steps and registers."""
        if not self.packed or self.fmt.grouped:
            return self.fmt.stored_dim(self.dim)
        step = self.fmt.step if self.key else BLOCK
        return -(-self.dim // step) * step

    @property
    def page_bytes(self) -> int:
        return self.page_size * self.padded * self.fmt.bits // 8

    @property
    def page_scales(self) -> int:
        return self.page_size * self.fmt.groups(self.dim)

    def rows(self, pages: torch.Tensor) -> torch.Tensor:
        """Encoded rows ``[..., page_size, row_bytes]`` of pages ``[..., page_bytes]``, uint8."""
        if not self.packed:
            return pages.unflatten(-1, (self.page_size, -1))
        blocks = pages.unflatten(-1, (self.page_size // BLOCK, -1))
        numbers = self._unpacked(blocks).flatten(-3, -2)  # [..., page_size, bytes of padded]
        return numbers[..., : self.fmt.row_bytes(self.dim)].contiguous()

    def _unpacked(self, blocks: torch.Tensor) -> torch.Tensor:
        """``[..., 16 * padded numbers' bytes]`` -> ``[..., 16, bytes]``."""
        fmt, padded = self.fmt, self.padded
        if fmt.bits == 4:
            return self._unpacked_halves(blocks)
        size, step = fmt.bits // 8, fmt.step
        if self.key:  # [padded / step, 16, step]
            x = blocks.unflatten(-1, (padded // step, BLOCK, step * size))
            x = x.transpose(-3, -2).flatten(-2)
            return x ^ fmt.key_flip if fmt.key_flip else x
        if step == 1:
            return blocks.unflatten(-1, (BLOCK, padded * size))
        # [padded / 16, 16 / step, 16, step] -> tokens (16 / step, step), dims (padded / 16, 16)
        x = blocks.unflatten(-1, (padded // BLOCK, BLOCK // step, BLOCK, step, size))
        x = x.movedim((-4, -2, -5, -3, -1), (-5, -4, -3, -2, -1))
        return x.flatten(-5, -4).flatten(-3)

    def _unpacked_halves(self, blocks: torch.Tensor) -> torch.Tensor:
        halves = torch.stack([blocks & 15, blocks >> 4], -1)
        if self.key:  # [padded / 8, 16, 4, 2]: dims (padded / 8, 2, 4)
            x = halves.unflatten(-2, (self.padded // 8, BLOCK, 4))
            codes = x.movedim((-3, -4, -1, -2), (-4, -3, -2, -1)).flatten(-3)
        else:  # [padded / 16, 2, 16, 4, 2]: tokens (2, 2, 4), dims (padded / 16, 16)
            x = halves.unflatten(-2, (self.padded // BLOCK, 2, BLOCK, 4))
            x = x.movedim((-4, -1, -2, -5, -3), (-5, -4, -3, -2, -1))
            codes = x.flatten(-5, -3).flatten(-2)
        return codes[..., 0::2] | codes[..., 1::2] << 4

    def scales(self, pages: torch.Tensor) -> torch.Tensor:
        """Scales ``[..., page_size, groups]`` of pages ``[..., page_scales]``."""
        groups = self.fmt.groups(self.dim)
        if not self.packed or groups == 0:
            return pages.unflatten(-1, (self.page_size, groups))
        blocks = pages.unflatten(-1, (self.page_size // BLOCK, groups, BLOCK))
        return blocks.mT.flatten(-3, -2)
