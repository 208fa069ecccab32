"""Buffers to rotate over, so that no step finds its keys in the processor's cache."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import ceil
from typing import Generic, TypeVar

import torch

from kvfold.bench.cases import AttentionCase
from kvfold.kernels.cpu.library import library

T = TypeVar("T")
_READ_AT_ONCE = 64 << 20  # bytes: long enough to hide the cost of starting threads


class Rotation(Generic[T]):
    """Hands out its items in turn. All who use the same items must share one rotation."""

    def __init__(self, items: Sequence[T]) -> None:
        self.items = items
        self._next = 0

    def take(self) -> T:
        item = self.items[self._next]
        self._next = (self._next + 1) % len(self.items)
        return item


class Rows:
    """Plain bfloat16 keys and values: equal copies, enough to fill the working set."""

    def __init__(self, case: AttentionCase, working_set: int, seed: int = 0) -> None:
        shape = (2, case.batch, case.num_kv_heads, case.context, case.head_dim)
        generator = torch.Generator().manual_seed(seed)
        self.flat = torch.empty(copies(case.kv_bytes, working_set), *shape, dtype=torch.bfloat16)
        self.flat[0].normal_(generator=generator)
        self.flat[1:] = self.flat[0]
        queries = (case.batch, case.num_heads, 1, case.head_dim)
        self.q = torch.randn(queries, dtype=torch.float32, generator=generator).bfloat16()
        self._next = 0

    @property
    def k(self) -> torch.Tensor:
        """``[B, Hkv, S, D]``"""
        return self.flat[0, 0]

    @property
    def v(self) -> torch.Tensor:
        """``[B, Hkv, S, D]``"""
        return self.flat[0, 1]

    @property
    def nbytes(self) -> int:
        return self.flat.nbytes

    def take(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The next keys and values."""
        k, v = self.span(1)[0]
        return k, v

    def span(self, count: int) -> torch.Tensor:
        """The next ``count`` buffers, side by side."""
        if self._next + count > len(self.flat):
            self._next = 0
        begin = self._next
        self._next = begin + count
        return self.flat[begin : begin + count]


def copies(size: int, working_set: int) -> int:
    """How many buffers of ``size`` bytes make a working set; at least one.

    >>> copies(300, 1000)
    4
    """
    return max(1, ceil(working_set / max(1, size)))


def reader(rows: Rows) -> tuple[Callable[[], object], int]:
    """A function that reads memory as fast as this machine can, and how many bytes it reads.

    It takes its turn among the buffers like PyTorch's peers.
    """
    one = rows.flat[0].nbytes
    count = min(len(rows.flat), copies(one, _READ_AT_ONCE))
    return lambda: read(rows.span(count)), count * one


def read(data: torch.Tensor) -> None:
    """Read a contiguous tensor's memory once, on all threads."""
    lib = library() if data.device.type == "cpu" else None
    if lib is not None:
        lib.read(data)
    else:  # a sum in its own width moves the memory and little else
        data.view(-1).view(torch.int16).view(torch.int32).sum(dtype=torch.int32)


@contextmanager
def threads(count: int | None) -> Iterator[int]:
    """Use so many threads of PyTorch meanwhile; yields the number in use."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
