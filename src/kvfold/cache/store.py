"""Pages of encoded keys and values, and the table that says which page holds which positions.

A contiguous cache is one page per sequence; a sliding one frees pages that leave the window; so
every kind of cache is this one store. Positions are absolute: position j of sequence b is at slot
j % page_size of page table[b, j // page_size].
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from kvfold.cache.half import CPU, Half, Summaries, normal_tensors
from kvfold.errors import RunError
from kvfold.kernels import pages
from kvfold.kernels.layout import Layout
from kvfold.kernels.registry import home, named
from kvfold.kernels.view import KVView, Positions, Rows
from kvfold.ops.format import Format

_GROWTH = 1.5


def _empty_table(sequences: int, pages: int) -> torch.Tensor:
    with normal_tensors():
        return torch.full((sequences, pages), -1, dtype=torch.int32, device=CPU)


@dataclass(frozen=True)
class Shape:
    """What a store holds: ``batch`` sequences of KV heads in two formats.

    Attributes:
        reserve: pages to allocate at once, or 0 to grow as needed.
        device: where the pages are; their table is always on the CPU.
        within: values are the first numbers of the keys, and stored with them.
        summary: the format of what is kept to tell of each page's keys, if anything is.
    """

    batch: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    k_format: Format
    v_format: Format
    page_size: int
    reserve: int = 0
    device: torch.device = CPU
    within: bool = False
    summary: Format | None = None


class Store:
    """Pages shared by the sequences of a batch, with reference counts.

    Attributes:
        heads: KV heads of a sequence. growth: of the pages' number where there are too few.
    """

    def __init__(self, shape: Shape) -> None:
        self.shape, self.heads, self.growth = shape, shape.num_kv_heads, _GROWTH
        self.page_size = shape.page_size
        self.kernels = home(shape.device)
        packed = self.kernels.packs(shape.page_size) and not shape.within
        self.halves = [self._half(shape.k_format, shape.head_dim, packed, key=True)]
        if not shape.within:
            self.halves.append(self._half(shape.v_format, shape.v_head_dim, packed, key=False))
        self.summaries: Summaries | None = None
        if shape.summary is not None:
            sizes = shape.head_dim, shape.num_kv_heads, shape.reserve, shape.device
            self.summaries = Summaries.of(shape.summary, *sizes)
        self.references = [0] * shape.reserve
        self._free = list(range(shape.reserve - 1, -1, -1))
        self.table = _empty_table(shape.batch, 0)
        self._all = list(range(shape.batch))  # the sequences
        self._sides: tuple[Rows, Rows] | None = None
        self._none: Rows | None = None
        self._told: Rows | None = None

    def __getstate__(self) -> dict[str, Any]:
        """What a copy needs: everything but views of this store's memory."""
        return {
            **vars(self),
            "_sides": None,
            "_none": None,
            "_told": None,
            "kernels": self.kernels.name,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, kernels=named(state["kernels"]))

    def _half(self, fmt: Format, dim: int, packed: bool, key: bool) -> Half:
        layout = Layout(fmt, dim, self.page_size, packed, key)
        shape = self.shape
        return Half(layout, shape.num_kv_heads, shape.reserve, shape.device)

    @property
    def keys(self) -> Half:
        return self.halves[0]

    @property
    def values(self) -> Half:
        return self.halves[-1]

    @property
    def _parts(self) -> list[Half]:
        """All that pages have memory in."""
        return self.halves if self.summaries is None else [*self.halves, self.summaries]

    @property
    def nbytes(self) -> int:
        """Bytes allocated, used or not, tables included."""
        return sum(half.nbytes for half in self._parts) + self.table.nbytes

    @property
    def bytes_per_token(self) -> float:
        """Bytes of a token of one sequence, all heads, scales included."""
        layouts = [half.layout for half in self._parts]
        size = sum(layout.page_bytes + 2 * layout.page_scales for layout in layouts)
        return self.heads * size / self.page_size

    @property
    def row_bytes(self) -> float:
        """The same without what tells of whole pages."""
        return self.bytes_per_token - self.summary_bytes / self.page_size

    @property
    def key_bytes(self) -> float:
        """Bytes of a token's keys alone, scales included."""
        layout = self.keys.layout
        size = layout.page_bytes + 2 * layout.page_scales
        return self.heads * size / self.page_size

    @property
    def summary_bytes(self) -> float:
        """Bytes that tell of a page's keys."""
        if self.summaries is None:
            return 0.0
        layout = self.summaries.layout
        return float(self.heads * (layout.page_bytes + 2 * layout.page_scales))

    @property
    def pages_in_use(self) -> int:
        return len(self.references) - len(self._free)

    def lengthen(self, capacity: int) -> None:
        """Make the (one) page of every sequence hold ``capacity`` positions."""
        self.page_size = capacity
        self._resize(len(self.references))

    def _resize(self, pages: int) -> None:
        self._replace([half.resized(pages, self.page_size) for half in self._parts])

    def _replace(self, parts: list[Half]) -> None:
        last = parts[-1]
        if isinstance(last, Summaries):
            self.summaries = last
            parts = parts[:-1]
        self.halves, self._sides, self._none, self._told = parts, None, None, None

    def _take_page(self) -> int:
        if not self._free:
            old = len(self.references)
            new = max(old + 1, math.ceil(old * self.growth), self.shape.batch)
            self._resize(new)
            self.references += [0] * (new - old)
            self._free = list(range(new - 1, old - 1, -1))
        page = self._free.pop()
        self.references[page] = 1
        return page

    def _drop_page(self, page: int) -> None:
        self.references[page] -= 1
        if self.references[page] < 0:
            raise RunError(f"page {page} was freed twice")
        if self.references[page] == 0:
            self._free.append(page)

    def _rows(self, sequence: int) -> range:
        """Those of the table that are a sequence's."""
        return range(sequence, sequence + 1)

    def reserve(self, sequence: int, low: int, high: int) -> None:
        """Give positions ``low <= j < high`` of a sequence pages of its own."""
        for row in self._rows(sequence):
            self._reserve(row, low, high)

    def _reserve(self, row: int, low: int, high: int) -> None:
        if low >= high:
            return
        first, last = low // self.page_size, (high - 1) // self.page_size
        if last >= self.table.shape[1]:
            width = max(last + 1, math.ceil(self.table.shape[1] * _GROWTH))
            wider = _empty_table(self.table.shape[0], width)
            wider[:, : self.table.shape[1]] = self.table
            self.table = wider
        pages = self.table.numpy()[row]  # the same memory; reading one number is much faster
        for index in range(first, last + 1):
            page = int(pages[index])
            if page < 0:
                pages[index] = self._take_page()
            elif self.references[page] > 1:
                pages[index] = self._own_copy(page)

    def _own_copy(self, page: int) -> int:
        """Copy a shared page before it is written to."""
        copy = self._take_page()
        for half in self._parts:
            half.data[copy] = half.data[page]
            half.scales[copy] = half.scales[page]
        self._drop_page(page)
        return copy

    def release(self, sequence: int, low: int, high: int) -> int:
        """Free the pages that lie wholly within ``low <= j < high``; where the last one ends."""
        return max(self._release(row, low, high) for row in self._rows(sequence))

    def _release(self, row: int, low: int, high: int) -> int:
        first, last = -(-low // self.page_size), high // self.page_size
        if last <= first:
            return 0
        held = self.table[row, first:last]
        for page in held[held >= 0].tolist():
            self._drop_page(page)
        held.fill_(-1)
        return last * self.page_size

    def begins_of(self, sequence: int) -> list[int]:
        """Where what is held begins, of each row of the table."""
        return [0]

    def forgotten(self, sequence: int, first: int = 0) -> float:
        """Tokens from ``first`` on that a KV head has forgotten, on average."""
        begins = self.begins_of(sequence)
        return sum(max(0, begin - first) for begin in begins) / len(begins)

    def shrink(self) -> None:
        """Give memory back where more than two thirds of the pages are free."""
        if 3 * self.pages_in_use < len(self.references) and not self.shape.reserve:
            self.fit()

    def fit(self, spare: int = 0) -> None:
        """Give the memory of all free pages back but of so many."""
        used = [page for page, count in enumerate(self.references) if count]
        if len(used) + spare >= len(self.references):
            return
        pages = torch.tensor(used, dtype=torch.long, device=CPU)
        moved = torch.full((len(self.references) + 1,), -1, dtype=torch.int32, device=CPU)
        moved[pages] = torch.arange(len(used), dtype=torch.int32, device=CPU)
        self.table.copy_(moved[self.table.long()])  # -1 reads the last one, which is -1
        pages = pages.to(self.shape.device)
        self._replace([half.only(pages, spare) for half in self._parts])
        self.references = [self.references[page] for page in used] + [0] * spare
        self._free = list(range(len(used) + spare - 1, len(used) - 1, -1))

    def clear(self, sequence: int) -> None:
        self.release(sequence, 0, self.table.shape[1] * self.page_size)

    def share(self, source: int, target: int, length: int) -> None:
        """Let ``target`` hold the first ``length`` positions of ``source``, without copying."""
        rows, own = self._rows(source), self._rows(target)
        pages = self.table[rows.start : rows.stop, : -(-length // self.page_size)].clone()
        kept = pages[pages >= 0].tolist()
        for page in kept:
            self.references[page] += 1
        self.clear(target)
        self.table[own.start : own.stop, : pages.shape[1]] = pages

    def select(self, sequences: list[int]) -> None:
        """Make sequence i what sequence ``sequences[i]`` was, as beam search does."""
        old, rows = self.table, [row for b in sequences for row in self._rows(b)]
        with normal_tensors():
            table = old[rows].contiguous()
        for page in table[table >= 0].tolist():
            self.references[page] += 1
        for page in old[old >= 0].tolist():
            self._drop_page(page)
        self.table, self._all = table, list(range(len(rows)))

    def tell(self, sequence: int, first: int, rows: torch.Tensor) -> None:
        """Keep what tells of a sequence's pages from ``first`` on: float32 ``[Hkv, n, 2, D]``."""
        for row, own in zip(self._rows(sequence), rows.split(self.shape.num_kv_heads), strict=True):
            self.tell_row(row, first, own)

    def tell_row(self, row: int, first: int, rows: torch.Tensor) -> None:
        """The same of one row of the table."""
        assert self.summaries is not None
        pages = self.table[row, first : first + rows.shape[1]]
        self.summaries.keep(pages.to(rows.device, torch.long), rows.transpose(0, 1))

    def write(self, k: torch.Tensor, v: torch.Tensor, first: int, rows: list[int]) -> None:
        """Write tokens ``[B, Hkv, T, D]`` of sequences ``rows`` from position ``first`` on.

        Positions without a page are skipped.
        """
        view = self._view(rows, None, [first] * len(rows), 0)
        if self.shape.within:
            v, view = v[..., :0], view._replace(values=self._no_values())
        self.kernels.append(k, v, view)

    def _no_values(self) -> Rows:
        """For writing where values are there with the keys."""
        if self._none is None:
            sizes = *self.keys.data.shape[:2], self.page_size, 0
            with normal_tensors():
                self._none = Rows.plain(torch.zeros(sizes, device=self.shape.device))
        return self._none

    @property
    def summary(self) -> Format:
        """The format of what tells of pages."""
        assert self.summaries is not None
        return self.summaries.layout.fmt

    def read(self, sequence: int, low: int, high: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions ``low <= j < high`` decoded: float32 ``[Hkv, high - low, D]`` and ``Dv``.

        Positions without a page are zeros.
        """
        read = [self.read_row(row, low, high) for row in self._rows(sequence)]
        k, v = (torch.cat(side) for side in zip(*read, strict=True))
        return k, v

    def read_row(self, row: int, low: int, high: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The same of one row of the table."""
        return pages.read(self._view([row], None, []), 0, low, high)

    def view(
        self,
        sequences: list[int],
        begin: Positions | None,
        end: Positions,
        most: int | None = None,
    ) -> KVView:
        """What kernels see of some sequences, which hold ``begin <= j < end`` here.

        Args:
            most: the most positions that one of them holds; as many as its pages by default.
        """
        return self._view(sequences, begin, end, most)

    def _view(
        self, rows: list[int], begin: Positions | None, end: Positions, most: int | None = None
    ) -> KVView:
        """What they see of some rows of the table."""
        table = self.table if rows == self._all else self.table[rows]
        most = table.shape[1] * self.page_size if most is None else most
        return KVView(*self.sides, table, self.page_size, begin, end, most)

    @property
    def sides(self) -> tuple[Rows, Rows]:
        """Keys and values as kernels read them."""
        if self._sides is None:
            first = self.shape.v_head_dim if self.shape.within else None
            self._sides = self.keys.rows(), self.values.rows(first)
        return self._sides

    @property
    def told(self) -> Rows:
        """What tells of pages' keys, as kernels read it."""
        if self._told is None:
            assert self.summaries is not None
            self._told = self.summaries.rows()
        return self._told

    def __iter__(self) -> Iterator[torch.Tensor]:
        """The tensors that hold the store."""
        for half in self._parts:
            yield half.data
            yield half.scales
