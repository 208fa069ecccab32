"""Which store holds which tokens: one for all, or exact ends around a quantized middle."""

import torch

from kvfold.cache.store import Store
from kvfold.kernels.view import KVView

EXACT_PAGE = 16
_MOVED_AT_ONCE = 32  # tokens that leave the recent window together


class Uniform:
    """All tokens in one store.

    Attributes:
        first: positions before it are elsewhere than in the main store.
    """

    first = 0

    def __init__(self, main: Store) -> None:
        self.main = main

    @property
    def stores(self) -> list[Store]:
        return [self.main]

    def state(self, b: int) -> int:
        """Sequences of one length and one state can be written together."""
        return 0

    def tail(self, b: int, length: int) -> int:
        """Where what the main store has of a sequence ends."""
        return length

    def held(self, b: int, length: int) -> float:
        """Tokens of a sequence of that length that a KV head has not forgotten, on average."""
        return length - self.main.forgotten(b, self.first)

    def append(
        self, k: torch.Tensor, v: torch.Tensor, rows: list[int], low: int, high: int, old: int
    ) -> None:
        """Write positions ``low <= j < high`` of sequences that were ``old`` tokens long."""
        write(self.main, k, v, rows, low, low, high)

    def release(self, b: int, low: int, high: int) -> int:
        """Free what lies in ``low <= j < high``, whole pages of it; which positions are gone.

        Returns:
            the end of what is gone: nothing from there on is.
        """
        return self.main.release(b, low, high)

    def shrink(self) -> None:
        for store in self.stores:
            store.shrink()

    def views(self, rows: list[int], lengths: list[int]) -> list[KVView]:
        """The stores as kernels read them: together they hold every position once."""
        return [self.main.view(rows, None, lengths)]

    def truncate(self, b: int, length: int) -> None:
        for store in self.stores:
            store.release(b, length, store.table.shape[1] * store.page_size)

    def clear(self, b: int) -> None:
        for store in self.stores:
            store.clear(b)

    def share(self, source: int, target: int, length: int) -> None:
        for store in self.stores:
            store.share(source, target, length)

    def select(self, rows: list[int]) -> None:
        for store in self.stores:
            store.select(rows)

    def step_bytes(self, b: int, seen: float) -> float:
        """Bytes that attention over ``seen`` tokens reads."""
        return seen * self.main.row_bytes


class ExactEnds(Uniform):
    """The first and the most recent tokens exactly, the others quantized.

    A sequence's positions ``first <= j < tail`` are in ``main``, all others in ``ends``. The tail
    follows the end at a distance of ``recent`` to ``recent + 32``, so each token moves once.
    """

    def __init__(self, main: Store, ends: Store, first: int, recent: int, batch: int) -> None:
        super().__init__(main)
        self.ends, self.first, self.recent = ends, first, recent
        self.tails = [first] * batch

    @property
    def stores(self) -> list[Store]:
        return [self.main, self.ends]

    def state(self, b: int) -> int:
        return self.tails[b]

    def tail(self, b: int, length: int) -> int:
        return self.tails[b]

    def release(self, b: int, low: int, high: int) -> int:
        tail = self.tails[b]
        main, ends = self.main.release(b, low, high), self.ends.release(b, low, high)
        main = min(main, tail) if main > self.first else 0  # it holds first <= j < tail
        return max(main, ends if ends > tail else min(ends, self.first))

    def append(
        self, k: torch.Tensor, v: torch.Tensor, rows: list[int], low: int, high: int, old: int
    ) -> None:
        tail = self.tails[rows[0]]
        if low > old:  # a window skipped what lies between
            tail = max(tail, low)
        if high - tail >= self.recent + _MOVED_AT_ONCE:
            self._move(rows, tail, min(low, high - self.recent))
            tail = high - self.recent
            # From here to the tail tokens are quantized as they come.
            write(self.main, k, v, rows, low, max(low, self.first), tail)
        for b in rows:
            self.tails[b] = tail
        write(self.ends, k, v, rows, low, low, min(self.first, high))
        write(self.ends, k, v, rows, low, max(low, tail), high)

    def _move(self, rows: list[int], low: int, high: int) -> None:
        """Quantize positions that are still exact."""
        if low >= high:
            return
        read = [self.ends.read(b, low, high) for b in rows]
        k, v = (torch.stack(side) for side in zip(*read, strict=True))
        write(self.main, k, v, rows, low, low, high)
        for b in rows:
            self.ends.release(b, max(self.first, low - EXACT_PAGE), high)

    def views(self, rows: list[int], lengths: list[int]) -> list[KVView]:
        tails = [self.tails[b] for b in rows]
        if max(tails, default=0) <= self.first:  # nothing is quantized yet
            return [self.ends.view(rows, None, lengths)]
        begins = [self.first] * len(rows)
        # One list for both, where they are alike, is handed over once.
        shorter = min(lengths) < self.first
        heads = [min(self.first, length) for length in lengths] if shorter else begins
        k, v, table, size, *_ = ends = self.ends.view(rows, None, heads, self.first)
        recent = KVView(k, v, table, size, tails, lengths, self.recent + _MOVED_AT_ONCE)
        return [self.main.view(rows, begins, tails), ends, recent]

    def truncate(self, b: int, length: int) -> None:
        super().truncate(b, length)
        self.tails[b] = max(self.first, min(self.tails[b], length))

    def clear(self, b: int) -> None:
        super().clear(b)
        self.tails[b] = self.first

    def share(self, source: int, target: int, length: int) -> None:
        super().share(source, target, length)
        self.tails[target] = self.tails[source]

    def select(self, rows: list[int]) -> None:
        super().select(rows)
        self.tails = [self.tails[b] for b in rows]

    def step_bytes(self, b: int, seen: float) -> float:
        middle = self.tails[b] - self.first - self.main.forgotten(b, self.first)
        quantized = min(seen, max(0, middle))
        exact = seen - quantized
        return quantized * self.main.row_bytes + exact * self.ends.bytes_per_token


def write(
    store: Store,
    k: torch.Tensor,
    v: torch.Tensor,
    rows: list[int],
    base: int,
    low: int,
    high: int,
) -> None:
    """Write positions ``low <= j < high``; ``k`` and ``v`` begin at position ``base``."""
    if low >= high:
        return
    for b in rows:
        store.reserve(b, low, high)
    if high - low < k.shape[2]:
        cut = slice(low - base, high - base)
        k, v = k[:, :, cut], v[:, :, cut]
    store.write(k, v, low, rows)
