"""Keys and values as kernels read them: pages, and which of them hold which positions.

A view says nothing about who owns the memory. Caches hand out views of theirs; tensors are one
page per sequence; and ``KVView.of_pages`` looks at pages that somebody else keeps.
"""

from typing import NamedTuple

import torch

from kvfold.ops.format import Format
from kvfold.ops.formats import format_of

#: Whole numbers, one of each sequence, wherever their owner keeps them: int32 ``[B]`` or a list.
Positions = list[int] | torch.Tensor

_PAGES = "expected k [P, Hkv, page_size, D] and v [P, Hkv, page_size, Dv]: pages of one dtype"


class Rows:
    """Encoded rows of keys, or of values, in pages.

    Attributes:
        dim: numbers of a row. data: ``[P, Hkv, page_size, row]``, floats or the bytes of an
            encoded format, with contiguous rows; packed for the CPU kernels (``layout``), bytes
            ``[P, Hkv, bytes of a page]``.
        scales: bfloat16, none for plain numbers: ``[P, Hkv, page_size, groups]``, or packed,
            ``[P, Hkv, scales of a page]``.
        rotation: size of the Hadamard blocks that rows were rotated by; 0 for none.
        known: what a backend found out about these tensors for its next call, such as addresses.
    """

    __slots__ = ("data", "dim", "fmt", "known", "packed", "rotation", "scales")

    def __init__(
        self,
        fmt: Format,
        data: torch.Tensor,
        scales: torch.Tensor | None,
        dim: int,
        packed: bool = False,
        rotation: int = 0,
    ) -> None:
        self.fmt, self.data, self.scales, self.dim = fmt, data, scales, dim
        self.packed, self.rotation = packed, rotation
        self.known: object = None

    @classmethod
    def plain(cls, x: torch.Tensor) -> "Rows":
        """Numbers as they are, ``[P, Hkv, page_size, D]``."""
        return cls(format_of(x.dtype), x, None, x.shape[3])


class KVView(NamedTuple):
    """Keys and values of some positions of each sequence.

    Position ``begin[b] <= j < end[b]`` of sequence b is at slot ``j % page_size`` of page
    ``table[b, j // page_size]``; a page below 0 holds nothing.

    Attributes:
        table: int32 ``[B, pages]``.
        begin: None is 0 for every sequence.
        most: positions that any sequence holds here at most, or may hold when a CUDA graph is
            replayed.
    """

    keys: Rows
    values: Rows
    table: torch.Tensor
    page_size: int
    begin: Positions | None
    end: Positions
    most: int

    @classmethod
    def of_tensors(cls, k: torch.Tensor, v: torch.Tensor, end: Positions) -> "KVView":
        """``[B, Hkv, S, D]`` and ``[B, Hkv, S, Dv]``: one page per sequence."""
        batch, keys = k.shape[0], k.shape[2]
        table = torch.arange(batch, dtype=torch.int32, device=k.device)[:, None]
        return cls(Rows.plain(k), Rows.plain(v), table, max(keys, 1), None, end, keys)


class Angles(NamedTuple):
    """Rotary embedding of keys on their way into pages.

    Attributes:
        cos, sin: float32 ``[B, T, r / 2]``. interleaved: pairs are (2j, 2j + 1), else
            (j, j + r/2).
    """

    cos: torch.Tensor
    sin: torch.Tensor
    interleaved: bool = False


def readable(x: torch.Tensor) -> torch.Tensor:
    """Numbers as they are, the last dimension contiguous: what the kernels need, nothing else."""
    if x.requires_grad:
        x = x.detach()
    if x.is_neg():  # the imaginary part of a conjugate: its memory holds the other sign
        x = x.resolve_neg()
    return x if has_contiguous_rows(x) else x.clone(memory_format=torch.contiguous_format)


def has_contiguous_rows(x: torch.Tensor) -> bool:
    """Whether the last dimension is one number after the other; fewer than two are, always."""
    return x.stride()[-1] == 1 or x.shape[-1] <= 1
