"""The pages of one side of a store, keys or values, as bytes and scales."""

from typing import TYPE_CHECKING

import torch

from kvfold.cache.layout import Layout
from kvfold.kernels.cpu.library import Side
from kvfold.kernels.cpu.pointer import Buffer
from kvfold.ops.formats import decode, encode
from kvfold.ops.rotation import rotate

if TYPE_CHECKING:
    from kvfold.kernels.triton.launch import Rows

CPU = torch.device("cpu")
_DATA, _SCALES = Buffer("pages", torch.uint8), Buffer("scales", torch.bfloat16)


def normal_tensors() -> torch.inference_mode:
    """A context in which to make what outlives a call.

    PyTorch lets nobody write to a tensor made under ``inference_mode`` once that has ended.
    """
    return torch.inference_mode(False)


class Half:
    """The pages of keys, or of values."""

    def __init__(self, layout: Layout, heads: int, pages: int, device: torch.device = CPU) -> None:
        self.layout, self.heads, self.device = layout, heads, device
        self.rotation = layout.fmt.rotation(layout.dim) if layout.key else 0
        shape = pages, heads
        with normal_tensors():
            self.data = torch.zeros(*shape, layout.page_bytes, dtype=torch.uint8, device=device)
            self.scales = torch.zeros(
                *shape, layout.page_scales, dtype=torch.bfloat16, device=device
            )

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + self.scales.nbytes

    def resized(self, pages: int, page_size: int) -> "Half":
        """A copy with more or longer pages."""
        old = self.layout
        layout = Layout(old.fmt, old.dim, page_size, old.packed, old.key)
        new = Half(layout, self.heads, pages, self.device)
        count = self.data.shape[0]
        new.data[:count, :, : old.page_bytes] = self.data
        new.scales[:count, :, : old.page_scales] = self.scales
        return new

    def only(self, pages: torch.Tensor) -> "Half":
        """A copy with some of the pages ``[n]``."""
        new = Half(self.layout, self.heads, len(pages), self.device)
        new.data.copy_(self.data[pages])
        new.scales.copy_(self.scales[pages])
        return new

    def side(self) -> Side:
        layout = self.layout
        return Side(
            layout.fmt.code,
            layout.packed,
            layout.dim,
            self.rotation,
            _DATA.address(self.data, (len(self.data), self.heads, layout.page_bytes)),
            self.data.stride(0),
            self.data.stride(1),
            layout.fmt.row_bytes(layout.dim),
            _SCALES.address(self.scales, (len(self.data), self.heads, layout.page_scales)),
            self.scales.stride(0),
            self.scales.stride(1),
        )

    def gpu_rows(self) -> "Rows":
        """The pages as Triton kernels read them (unpacked pages only)."""
        from kvfold.kernels.triton.launch import Rows

        layout = self.layout
        data = self.data.unflatten(-1, (layout.page_size, -1))
        scales = self.scales.unflatten(-1, (layout.page_size, layout.fmt.groups(layout.dim)))
        return Rows(layout.fmt, data.view(layout.fmt.dtype), scales, layout.dim)

    def write(self, pages: torch.Tensor, slots: torch.Tensor, rows: torch.Tensor) -> None:
        """Write rows ``[n, H, D]`` at slots ``[n]`` of pages ``[n]`` (unpacked pages only)."""
        rows = rows.float()
        if self.rotation:
            padding = self.layout.padded - rows.shape[-1]
            rows = rotate(torch.nn.functional.pad(rows, (0, padding)), self.rotation)
        data, scales = encode(rows, self.layout.fmt)
        size = self.layout.page_size
        self.data.unflatten(-1, (size, -1))[pages, :, slots] = data
        if scales.shape[-1]:
            self.scales.unflatten(-1, (size, -1))[pages, :, slots] = scales

    def read(self, pages: torch.Tensor) -> torch.Tensor:
        """Decode whole pages ``[n]``: float32 ``[H, n * page_size, D]``."""
        rows = self.layout.rows(self.data[pages])
        scales = self.layout.scales(self.scales[pages])
        dim = self.layout.padded if self.rotation else self.layout.dim
        numbers = rotate(decode(rows, scales, self.layout.fmt, dim), self.rotation)
        return numbers[..., : self.layout.dim].transpose(0, 1).flatten(1, 2)
