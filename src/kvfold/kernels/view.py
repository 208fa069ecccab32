"""Keys and values as kernels read them: pages, and which of them hold which positions.

A view says nothing about who owns the memory. Caches hand out views of theirs; tensors are one
page per sequence; and ``KVView.of_pages`` looks at pages that somebody else keeps.
"""

from typing import NamedTuple

import torch

from kvfold.errors import InputError
from kvfold.ops.format import Format
from kvfold.ops.formats import format_of

_CPU = torch.device("cpu")
#: Whole numbers, one of each sequence, wherever their owner keeps them: int32 ``[B]`` or a list.
Positions = list[int] | torch.Tensor

_PAGES = (
    "expected k [P, Hkv, page_size, D] and v [P, Hkv, page_size, Dv], of one dtype and device;"
    " of [2, P, page_size, Hkv, D] those are pages[0].transpose(1, 2) and pages[1].transpose(1, 2)"
)


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

    def of_heads(self, heads: slice) -> "Rows":
        """Those of some KV heads."""
        scales = None if self.scales is None else self.scales[:, heads]
        return Rows(self.fmt, self.data[:, heads], scales, self.dim, self.packed, self.rotation)

    @classmethod
    def plain(cls, x: torch.Tensor) -> "Rows":
        """Numbers as they are, ``[P, Hkv, page_size, D]``."""
        return cls(format_of(x.dtype), x, None, x.shape[3])


class KVView(NamedTuple):
    """Keys and values of some positions of each sequence.

    Position ``begin[b] <= j < end[b]`` of sequence b is at slot ``j % page_size`` of page
    ``table[b, j // page_size]``; a page below 0 holds nothing.

    Attributes:
        table: int32 ``[B, pages]``; or ``[B, Hkv, pages]``, for each KV head its own, and then
            ``begin`` and ``end`` are ``[B * Hkv]``, sequence after sequence.
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

    @property
    def per_head(self) -> bool:
        """Whether each KV head has a table and a range of its own."""
        return self.table.dim() == 3

    @property
    def within(self) -> bool:
        """Whether values are the first numbers of their keys' rows, in the same memory."""
        k, v = self.keys, self.values
        one = k.fmt is v.fmt and k.data.stride() == v.data.stride() and v.dim < k.dim
        return one and not k.packed and k.data.data_ptr() == v.data.data_ptr()

    @classmethod
    def of_tensors(cls, k: torch.Tensor, v: torch.Tensor, end: Positions) -> "KVView":
        """``[B, Hkv, S, D]`` and ``[B, Hkv, S, Dv]``: one page per sequence."""
        batch, keys = k.shape[0], k.shape[2]
        table = torch.arange(batch, dtype=torch.int32, device=k.device)[:, None]
        return cls(Rows.plain(k), Rows.plain(v), table, max(keys, 1), None, end, keys)

    @classmethod
    def of_pages(
        cls,
        k: torch.Tensor,
        v: torch.Tensor,
        table: torch.Tensor,
        lengths: Positions,
        begin: Positions | None = None,
    ) -> "KVView":
        """Pages that somebody else keeps, as a serving engine does. Nothing is copied.

        Args:
            k: ``[P, Hkv, page_size, D]``; v: ``[P, Hkv, page_size, Dv]``; float32, float16 or
                bfloat16, of any strides with contiguous rows.
            table: int32 ``[B, pages]``, there or on the CPU. Pages below 0 are for positions that
                no query sees. ``[B, Hkv, pages]``: of each KV head; so are then the positions.
            lengths, begin: the positions ``begin[b] <= j < lengths[b]`` are there. On a GPU they
                are not read before the kernels run: there, they must be right.

        Raises:
            InputError: for what kernels could not follow.

        >>> pages = torch.zeros(2, 5, 16, 4, 32)  # keys and values, 5 pages of 16 tokens, 4 heads
        >>> k, v = pages.transpose(2, 3)
        >>> KVView.of_pages(k, v, torch.tensor([[3, 0]], dtype=torch.int32), [17]).most
        32
        """
        _check_pages(k, v)
        pages, heads, size, _ = k.shape
        whole = isinstance(table, torch.Tensor) and table.dtype == torch.int32
        whole = whole and (table.dim() == 2 or (table.dim() == 3 and table.shape[1] == heads))
        if not whole or table.device not in (k.device, _CPU):
            raise InputError(
                "table: expected int32 [B, pages] on the device of the pages",
                f"or [B, {heads}, pages] for each KV head",
            )
        if not table.is_cuda and table.numel() and int(table.max()) >= pages:
            raise InputError(f"table names page {int(table.max())} of {pages}")
        most = table.shape[-1] * size
        for name, given in (("lengths", lengths), ("begin", begin)):
            if given is not None:
                _check_positions(name, given, table.shape[:-1].numel(), most)
        return cls(Rows.plain(k), Rows.plain(v), table.contiguous(), size, begin, lengths, most)


def _check_pages(k: torch.Tensor, v: torch.Tensor) -> None:
    for name, x in (("k", k), ("v", v)):
        if not isinstance(x, torch.Tensor) or x.dim() != 4 or 0 in x.shape[1:]:
            raise InputError(f"{name}: {getattr(x, 'shape', type(x).__name__)}", _PAGES)
        if not has_contiguous_rows(x):
            raise InputError(f"{name} has strides {list(x.stride())}: rows are not contiguous")
    if k.shape[:3] != v.shape[:3] or k.dtype != v.dtype or k.device != v.device:
        kinds = [f"{x.dtype} {list(x.shape)} on {x.device}" for x in (k, v)]
        raise InputError(f"k and v do not fit: {' and '.join(kinds)}", _PAGES)


def _check_positions(name: str, given: Positions, batch: int, most: int) -> None:
    if isinstance(given, torch.Tensor):
        if given.dtype != torch.int32 or given.shape != (batch,):
            raise InputError(f"{name} is {given.dtype} {list(given.shape)}: int32 [{batch}]")
        if given.is_cuda:
            return
    numbers: list[int] = given if isinstance(given, list) else given.tolist()
    if len(numbers) != batch or not all(0 <= number <= most for number in numbers):
        raise InputError(f"{name}={numbers}: expected {batch} numbers from 0 to {most}")


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
