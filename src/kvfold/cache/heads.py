"""A store whose KV heads hold different tokens.

Each KV head of a sequence has a row of the page table, and pages of its own. What a head has
forgotten leaves no holes: what it keeps lies together, right before the tokens that all heads have,

    head 0          [ kept of it ][ tokens of all heads ...
    head 1    [ kept of it       ][ tokens of all heads ...

so heads differ in where they begin, and in nothing else.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from kvfold.cache.half import CPU, normal_tensors
from kvfold.cache.store import Store
from kvfold.kernels.view import KVView, Positions, Rows

_SLOW_GROWTH = 1.125  # such a store is there to be small


class HeadStore(Store):
    """A store that can forget tokens of single heads; ``of`` makes it of another, and its memory.

    To its memory it is a store of one KV head, whose sequences are the heads.

    Attributes:
        begins: of each of these the first position that is held.
    """

    begins: list[int]
    _wide: tuple[tuple[Rows, Rows], tuple[Rows, Rows]] | None = None

    @classmethod
    def of(cls, store: Store) -> "HeadStore":
        """The same tokens in the same memory, which ``store`` must not be used for any more."""
        heads, batch = store.heads, len(store.table)
        new = cls(replace(store.shape, batch=batch * heads, num_kv_heads=1, reserve=0))
        new._replace([half.by_head() for half in store._parts])
        new.heads, new.growth, new.begins = heads, _SLOW_GROWTH, [0] * (batch * heads)
        new.references = [count for count in store.references for _ in range(heads)]
        new._free = [page * heads + head for page in store._free for head in range(heads)]
        with normal_tensors():
            each = torch.arange(heads, dtype=torch.int32, device=CPU)[:, None]
            pages = store.table[:, None]
            new.table = torch.where(pages < 0, -1, pages * heads + each).flatten(0, 1)
        return new

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_wide": None}

    def _rows(self, sequence: int) -> range:
        return range(sequence * self.heads, (sequence + 1) * self.heads)

    def rows(self, sequences: Sequence[int]) -> list[int]:
        """Those of the table that are some sequences'."""
        return [row for b in sequences for row in self._rows(b)]

    def begins_of(self, sequence: int) -> list[int]:
        rows = self._rows(sequence)
        return self.begins[rows.start : rows.stop]

    def clear(self, sequence: int) -> None:
        super().clear(sequence)
        for row in self._rows(sequence):
            self.begins[row] = 0

    def share(self, source: int, target: int, length: int) -> None:
        super().share(source, target, length)
        for row, own in zip(self._rows(source), self._rows(target), strict=True):
            self.begins[own] = self.begins[row]

    def select(self, sequences: list[int]) -> None:
        super().select(sequences)
        self.begins = [self.begins[row] for row in self.rows(sequences)]

    def write(self, k: torch.Tensor, v: torch.Tensor, first: int, rows: list[int]) -> None:
        super().write(by_head(k, self.heads), by_head(v, self.heads), first, self.rows(rows))

    def forget(self, sequence: int, kept: Sequence[torch.Tensor], end: int) -> None:
        """Keep only some positions before ``end``, and free the pages that are left empty.

        Args:
            kept: of each head int64 ``[n]`` on the CPU, ascending; afterwards they are ``end - n``
                to ``end - 1``.
            end: where a page begins.
        """
        rows, begins = self._rows(sequence), [end - len(own) for own in kept]
        sources, ends = [], []
        for row, begin, own in zip(rows, begins, kept, strict=True):
            # Those that are where they should be are the last.
            moved = int((own != torch.arange(begin, end, device=CPU)).sum())
            self._reserve(row, begin, begin + moved)
            sources.append(own[:moved])
            ends.append(begin + moved)
        self.kernels.move(self._view(list(rows), begins, ends), sources)
        for row, begin in zip(rows, begins, strict=True):
            self._release(row, 0, begin)
            self.begins[row] = begin

    def view(
        self,
        sequences: list[int],
        begin: Positions | None,
        end: Positions,
        most: int | None = None,
    ) -> KVView:
        """As ``Store.view``, with a table and a begin for each KV head."""
        rows, each = self.rows(sequences), range(self.heads)
        begins = [self.begins[row] for row in rows]
        if begin is not None:
            given = [low for low in begin for _ in each]
            begins = [max(pair) for pair in zip(begins, given, strict=True)]
        ends = [high for high in end for _ in each]
        view = self._view(rows, begins, ends)
        held = max((high - low for low, high in zip(begins, ends, strict=True)), default=0)
        table = view.table.unflatten(0, (-1, self.heads))
        return KVView(*self._of_all_heads(), table, self.page_size, begins, ends, max(held, 0))

    def _of_all_heads(self) -> tuple[Rows, Rows]:
        """The sides as if every page held every head: a head's table names pages of its own."""
        if self._wide is None or self._wide[0] is not self.sides:
            k, v = self.sides
            self._wide = self.sides, (_repeated(k, self.heads), _repeated(v, self.heads))
        return self._wide[1]


def by_head(x: torch.Tensor, heads: int) -> torch.Tensor:
    """``[B, heads * n, T, D]`` with a sequence for every head: ``[B * heads, n, T, D]``."""
    return x if heads == 1 else x.unflatten(1, (heads, -1)).flatten(0, 1)


def _repeated(rows: Rows, heads: int) -> Rows:
    scales = None if rows.scales is None else _expanded(rows.scales, heads)
    data = _expanded(rows.data, heads)
    return Rows(rows.fmt, data, scales, rows.dim, rows.packed, rows.rotation)


def _expanded(x: torch.Tensor, heads: int) -> torch.Tensor:
    return x.expand(-1, heads, *x.shape[2:])
