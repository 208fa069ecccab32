"""What a step of decoding reads of a cache: the summaries of its pages, and views of the chosen."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from kvfold.cache.storage import ExactEnds, Uniform
from kvfold.cache.store import Store
from kvfold.errors import InputError
from kvfold.kernels.limits import MAX_TOKENS
from kvfold.kernels.pages import decoded
from kvfold.kernels.selection import Chosen, Question, chosen_of, exact_logits
from kvfold.kernels.view import KVView
from kvfold.ops.format import Format
from kvfold.ops.formats import FORMATS
from kvfold.ops.options import Options
from kvfold.ops.select import MOST_SHARE, PAGES, Reading, Select, enclosing, summarised

#: The options of a call that do not ask where keys stand.
_PLACELESS = frozenset({"right", "start", "scale", "softcap", "sink_logits"})


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
        """Positions before it are elsewhere than in the main store."""
        return self._storage.first if isinstance(self._storage, ExactEnds) else 0

    def whole_pages(self, b: int, length: int) -> int:
        """How many pages of a sequence lie before the end of what the main store has of it."""
        ends = self._storage
        end = ends.tails[b] if isinstance(ends, ExactEnds) else length
        return end // self._main.page_size

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
        summaries = self._main.summaries
        assert summaries is not None
        rows = summarised(keys.unflatten(1, (-1, self._main.page_size)), self.select.by)
        if self.select.by == "box":
            rows = enclosing(rows, summaries.layout.fmt)
        pages = self._main.table[b, first : first + rows.shape[1]]
        summaries.keep(pages.to(rows.device, torch.long), rows.transpose(0, 1))

    # -- choosing ---------------------------------------------------------------------------

    def readings(
        self,
        lengths: Sequence[int],
        rows: Sequence[int],
        queries: int,
        start: torch.Tensor | None = None,
    ) -> list[Reading]:
        """What is read of sequences of these lengths."""
        starts = [0] * len(rows) if start is None else start.tolist()
        size, found = self._main.page_size, []
        for b, length, padding in zip(rows, lengths, starts, strict=True):
            reading = self.select.pages(length, queries, size, padding, self._first)
            last = min(reading.last, self.whole_pages(b, length))
            found.append(self.select.fitted(reading._replace(last=last)))
        return found

    def views(self, step: Step) -> list[KVView]:
        """Views of what is read in place of all."""
        found = self._choose(step)
        if found is None:
            return step.views
        readings, chosen = found
        main, *others = step.views
        size = main.page_size
        ends = (chosen.counts * size).flatten().tolist()
        # What is chosen stands at other positions than its own, all of them before the queries'.
        low = [max(reading.begin * size, self._first) for reading in readings]
        begins = [low[i // main.keys.data.shape[1]] for i in range(len(ends))]
        selected = main._replace(
            table=chosen.table, begin=begins, end=ends, most=chosen.table.shape[2] * size
        )
        rest = main._replace(begin=[max(r.last * size, self._first) for r in readings])
        return [selected, rest, *others]

    def positions(self, step: Step) -> torch.Tensor:
        """Which are read: bool ``[B, Hkv, S]``."""
        rows, lengths, most = step.rows, step.lengths, max(step.lengths)
        heads, size = self._main.shape.num_kv_heads, self._main.page_size
        read = torch.ones(len(rows), heads, most, dtype=torch.bool, device="cpu")
        found = self._choose(step)
        if found is not None:
            readings, chosen = found
            for b, reading in enumerate(readings):
                pages = step.views[0].table[b, : reading.last]
                for head, count in enumerate(chosen.counts[b].tolist()):
                    among = torch.isin(pages, chosen.table[b, head, :count])
                    read[b, head, : len(pages) * size] = among.repeat_interleave(size)
                read[b, :, : self._first] = True
        inside = torch.arange(most, device="cpu") < torch.tensor(lengths, device="cpu")[:, None]
        start = step.options.visibility.start
        if start is not None:
            inside &= torch.arange(most, device="cpu") >= start.cpu()[:, None]
        return read & inside[:, None]

    def _choose(self, step: Step) -> tuple[list[Reading], Chosen] | None:
        """What is read of each sequence, and its pages; None where nothing is left out."""
        q, options, views = step.q, step.options, step.views
        if q.shape[2] > MAX_TOKENS or options.beyond(_PLACELESS):
            return None
        start = options.visibility.start
        readings = self.readings(step.lengths, step.rows, q.shape[2], start)
        if all(reading.whole for reading in readings):
            return None
        scoring, by = options.scoring, self.select.by
        scale = q.shape[3] ** -0.5 if scoring.scale is None else scoring.scale
        question = Question(
            q, self._main.told, views[0].table, readings, by, scale, scoring.softcap,
            self.select.top_p,
        )  # fmt: skip
        if by != "exact":
            return readings, self._main.kernels.choose(question)
        keys = decoded(views, max(step.lengths), torch.float32)[0]
        size, heads = self._main.page_size, keys.shape[1]
        logits = [exact_logits(question, b, keys[b], size) for b in range(len(keys))]
        return readings, chosen_of(question, logits, heads)

    def step_bytes(self, b: int, length: int) -> float:
        """Bytes that one query reads of a sequence, summaries included; at most, with ``top_p``."""
        (reading,) = self.readings([length], [b], 1)
        if reading.whole:
            return self._storage.step_bytes(b, length)
        size, main = self._main.page_size, self._main
        skipped = (reading.last - reading.always - reading.keep) * size
        told = (reading.last - reading.always) * main.summary_bytes
        if self.select.by == "exact":
            told = (reading.last - reading.always) * size * main.key_bytes
        return self._storage.step_bytes(b, length) - skipped * main.row_bytes + told
