"""The pages of one side of a store, keys or values, as bytes and scales."""

from copy import copy

import torch

from kvfold.kernels.layout import Layout
from kvfold.kernels.view import Rows
from kvfold.ops.format import Format
from kvfold.ops.formats import encode

CPU = torch.device("cpu")


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
        new = type(self)(layout, self.heads, pages, self.device)
        count = self.data.shape[0]
        new.data[:count, :, : old.page_bytes] = self.data
        new.scales[:count, :, : old.page_scales] = self.scales
        return new

    def only(self, pages: torch.Tensor, spare: int = 0) -> "Half":
        """A copy with some of the pages ``[n]``, and so many empty ones."""
        new = type(self)(self.layout, self.heads, len(pages) + spare, self.device)
        torch.index_select(self.data, 0, pages, out=new.data[: len(pages)])
        torch.index_select(self.scales, 0, pages, out=new.scales[: len(pages)])
        return new

    def by_head(self) -> "Half":
        """The same memory as pages of one head each: those of a page's heads follow each other."""
        new = copy(self)
        new.heads = 1
        pages = self.data.shape[0] * self.heads
        with normal_tensors():
            new.data = self.data.view(pages, 1, self.data.shape[2])
            new.scales = self.scales.view(pages, 1, self.scales.shape[2])
        return new

    def rows(self, dim: int | None = None) -> Rows:
        """The pages as kernels read them; of plain rows perhaps only the first ``dim`` numbers."""
        layout, fmt, data, scales = self.layout, self.layout.fmt, self.data, self.scales
        if not layout.packed:
            with normal_tensors():  # they are kept for other calls
                data = data.unflatten(-1, (layout.page_size, -1)).view(fmt.dtype)
                scales = scales.unflatten(-1, (layout.page_size, fmt.groups(layout.dim)))
        data = data if dim is None else data[..., :dim]
        return Rows(fmt, data, scales, dim or layout.dim, layout.packed, self.rotation)


class Summaries(Half):
    """Two rows for each page, which tell of its keys (``ops.select``)."""

    ROWS = 2

    @classmethod
    def of(cls, fmt: Format, dim: int, heads: int, pages: int, device: torch.device) -> "Summaries":
        return cls(Layout(fmt, dim, cls.ROWS, packed=False, key=False), heads, pages, device)

    def resized(self, pages: int, page_size: int) -> "Half":
        """A copy with more pages, however long they are."""
        return super().resized(pages, self.ROWS)

    def keep(self, pages: torch.Tensor, rows: torch.Tensor) -> None:
        """Write float32 ``[n, Hkv, 2, D]`` for pages ``[n]``."""
        data, scales = encode(rows, self.layout.fmt)
        self.data[pages] = data.flatten(-2)
        self.scales[pages] = scales.flatten(-2)
