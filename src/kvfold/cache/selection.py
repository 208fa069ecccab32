"""What a step of decoding reads of a cache: the summaries of its pages, and views of the chosen."""

from typing import NamedTuple

import torch

from kvfold.cache.heads import by_head
from kvfold.cache.storage import Uniform
from kvfold.cache.store import Store
from kvfold.errors import InputError
from kvfold.kernels.limits import MAX_TOKENS
from kvfold.kernels.pages import decoded, listed
from kvfold.kernels.selection import Chosen, Question, chosen_of, exact_logits
from kvfold.kernels.view import KVView
from kvfold.ops.format import Format
from kvfold.ops.formats import FORMATS
from kvfold.ops.options import PLACELESS, Options
from kvfold.ops.select import MOST_SHARE, PAGES, Reading, Select, enclosing, summarised


def summary_format(formats: tuple[Format, Format], dims: tuple[int, int], page_size: int) -> Format:
    """Of what tells of a page: bfloat16, or int8 where that would take more than a twentieth.

    Raises:
        InputError: for pages that cannot be selected.
    """
    if page_size not in PAGES:
        sizes = ", ".join(map(str, PAGES))
        raise InputError(f"select: pages of {page_size} tokens", f"page_size is one of {sizes}")
    page = page_size * sum(f.bits_each(dim) * dim for f, dim in zip(formats, dims, strict=True))
    for fmt in (FORMATS["bf16"], FORMATS["int8"]):
        if 2 * fmt.bits_each(dims[0]) * dims[0] <= MOST_SHARE * page:
            return fmt
    raise InputError(
        f"select: what tells of pages of {page_size} tokens would take more than "
        f"{MOST_SHARE:.0%} of a cache of {formats[0].name} keys and {formats[1].name} values",
        f"page_size={PAGES[-1]}",
    )


class Step(NamedTuple):
    """A call of attention over sequences ``rows``; the first view is the main store's."""

    q: torch.Tensor
    rows: list[int]
    lengths: list[int]
    options: Options
    views: list[KVView]


class Selection:
    """Chooses what is read, for a cache whose main store has summaries of all whole pages."""

    def __init__(self, select: Select, storage: Uniform) -> None:
        self.select, self._storage = select, storage

    @property
    def _main(self) -> Store:
        return self._storage.main

    @property
    def _first(self) -> int:
        return self._storage.first

    def whole_pages(self, b: int, length: int) -> int:
        """How many pages of a sequence lie before the end of what the main store has of it."""
        return self._storage.tail(b, length) // self._main.page_size

    # -- summaries --------------------------------------------------------------------------

    def note(self, k: torch.Tensor, b: int, low: int, length: int, first: int) -> None:
        """Summarise the pages that have become whole, from page ``first`` on.

        Args:
            k: ``[Hkv, T, D]``, the sequence's keys from position ``low`` on.
        """
        size, last = self._main.page_size, self.whole_pages(b, length)
        new = min(max(-(-low // size), first), last)  # the first page of which k has every key
        if first < new:
            self._describe(b, first, self._main.read(b, first * size, new * size)[0])
        if new < last:
            self._describe(b, new, k[:, new * size - low : last * size - low])

    def _describe(self, b: int, first: int, keys: torch.Tensor) -> None:
        """Keep what tells of pages from ``first`` on: their keys ``[Hkv, n * page_size, D]``."""
        self._main.tell(b, first, self._summaries(keys))

    def again(self, row: int, begin: int, end: int) -> None:
        """Summarise anew what a row of the main store's table holds, all of it whole pages."""
        main, size = self._main, self._main.page_size
        first = begin // size
        keys = main.read_row(row, first * size, end)[0]
        main.tell_row(row, first, self._summaries(keys))

    def _summaries(self, keys: torch.Tensor) -> torch.Tensor:
        rows = summarised(keys.unflatten(1, (-1, self._main.page_size)), self.select.by)
        return enclosing(rows, self._main.summary) if self.select.by == "box" else rows

    # -- choosing ---------------------------------------------------------------------------

    def readings(self, b: int, length: int, queries: int, start: int = 0) -> list[Reading]:
        """What is read of a sequence of that length, for every row of the table that is its own."""
        size, whole = self._main.page_size, self.whole_pages(b, length)
        found = []
        for begin in self._main.begins_of(b):
            reading = self.select.pages(length, queries, size, max(start, begin), self._first)
            last = min(reading.last, whole)
            found.append(self.select.fitted(reading._replace(last=last)))
        return found

    def views(self, step: Step) -> list[KVView]:
        """Views of what is read in place of all."""
        found = self._choose(step)
        if found is None:
            return step.views
        readings, chosen = found
        main, *others = step.views
        size, heads = main.page_size, self._main.heads
        floors = [0] * len(readings) if main.begin is None else listed(main.begin, len(readings))
        # What is chosen stands at other positions than its own, all of them before the queries'.
        low = [max(r.begin * size, floor) for r, floor in zip(readings, floors, strict=True)]
        high = [max(r.last * size, floor) for r, floor in zip(readings, floors, strict=True)]
        table = chosen.table.view(len(step.rows), heads, -1)
        ends = (chosen.counts * size).flatten().tolist()
        each = len(ends) // len(low)
        selected = main._replace(
            table=table, begin=[n for n in low for _ in range(each)], end=ends,
            most=table.shape[2] * size,
        )  # fmt: skip
        return [selected, main._replace(begin=high), *others]

    def positions(self, step: Step) -> torch.Tensor:
        """Which are read: bool ``[B, Hkv, S]``."""
        rows, lengths, most = step.rows, step.lengths, max(step.lengths)
        heads, size = self._main.heads, self._main.page_size
        read = torch.ones(len(rows), heads, most, dtype=torch.bool, device="cpu")
        found = self._choose(step)
        if found is not None:
            readings, chosen = found
            each = len(rows) * heads // len(readings)
            table = _by_row(step.views[0].table)
            for i, counts in enumerate(chosen.counts.view(-1).tolist()):
                reading = readings[i // each]
                pages = table[i // each, : reading.last]
                among = torch.isin(pages, chosen.table.view(len(rows) * heads, -1)[i, :counts])
                read.view(-1, most)[i, : len(pages) * size] = among.repeat_interleave(size)
            read[:, :, : self._first] = True
        inside = torch.arange(most, device="cpu") < torch.tensor(lengths, device="cpu")[:, None]
        start = step.options.visibility.start
        if start is not None:
            inside &= torch.arange(most, device="cpu") >= start.cpu()[:, None]
        return read & inside[:, None]

    def _choose(self, step: Step) -> tuple[list[Reading], Chosen] | None:
        """What is read of each row of the table, and its pages; None where nothing is left out."""
        q, options, views = step.q, step.options, step.views
        if q.shape[2] > MAX_TOKENS or options.beyond(PLACELESS):
            return None
        start = options.visibility.start
        starts = [0] * len(step.rows) if start is None else start.tolist()
        readings = [
            reading
            for each in zip(
                step.rows, step.lengths, [q.shape[2]] * len(starts), starts, strict=True
            )
            for reading in self.readings(*each)
        ]
        if all(reading.whole for reading in readings):
            return None
        scoring, by = options.scoring, self.select.by
        scale = q.shape[3] ** -0.5 if scoring.scale is None else scoring.scale
        apart = len(readings) // len(step.rows)  # heads with tables of their own
        question = Question(
            by_head(q, apart), self._main.told, _by_row(views[0].table), readings, by, scale,
            scoring.softcap, self.select.top_p,
        )  # fmt: skip
        if by != "exact":
            return readings, self._main.kernels.choose(question)
        keys = by_head(decoded(views, max(step.lengths), torch.float32)[0], apart)
        size, heads = self._main.page_size, keys.shape[1]
        logits = [exact_logits(question, b, keys[b], size) for b in range(len(keys))]
        return readings, chosen_of(question, logits, heads)

    def step_bytes(self, b: int, length: int) -> float:
        """Bytes that one query reads of a sequence, summaries included; at most, with ``top_p``."""
        main, readings = self._main, self.readings(b, length, 1)
        each = main.key_bytes * main.page_size if self.select.by == "exact" else main.summary_bytes
        change = 0.0
        for reading in readings:
            pages = 0 if reading.whole else reading.last - reading.always
            skipped = max(0, pages - reading.keep) * main.page_size
            change += pages * each - skipped * main.row_bytes
        held = self._storage.held(b, length)
        return self._storage.step_bytes(b, held) + change / len(readings)


def _by_row(table: torch.Tensor) -> torch.Tensor:
    """A table of pages with a row for each KV head that has one: ``[n, pages]``."""
    return table if table.dim() == 2 else table.flatten(0, 1)
