"""Forgetting tokens of single KV heads: which, and what a cache becomes by it."""

import torch

from kvfold.cache.heads import HeadStore
from kvfold.cache.selection import Selection
from kvfold.cache.storage import Uniform
from kvfold.kernels.pages import decoded, held_by_head
from kvfold.ops.evict import Evict, best, in_whole_pages, query_weights, shared_out
from kvfold.ops.mask import visible
from kvfold.ops.options import Options, Scoring
from kvfold.ops.reference import attend


class Eviction:
    """Forgets, for a paged cache. Its main store becomes one of single heads when it does."""

    def __init__(self, storage: Uniform, selection: Selection | None) -> None:
        self._storage, self._selection = storage, selection

    def forget(
        self, b: int, length: int, scores: torch.Tensor, how: Evict, start: int = 0
    ) -> tuple[torch.Tensor, int]:
        """Keep what scores best of a sequence, within the budget.

        Args:
            scores: ``[Hkv, S]``; those of positions that are not held are not looked at.
            start: positions before it are padding.

        Returns:
            which positions are kept, bool ``[Hkv, length]``; and before which some are not.
        """
        main, first, size = self._storage.main, self._storage.first, self._storage.main.page_size
        tail = self._storage.tail(b, length)
        end = max(0, min(length - how.recent, tail)) // size * size
        begins = [max(begin, start, first) for begin in main.begins_of(b)]
        begins *= main.heads // len(begins)
        held = torch.arange(length, device="cpu") >= torch.tensor(begins, device="cpu")[:, None]
        held[:, min(start, first) : first] = True
        if end < max(begins):
            return held, 0
        # Sinks that are not among the exact first tokens; in every head they come first.
        sinks = min(how.sinks, max(0, start + how.sinks - first))
        lows = [min(begin + sinks, end) for begin in begins]
        most = [end - begin for begin in begins]
        always = max(0, first - start) + length - end
        keep = max(0, how.tokens(length - start) - always)
        if sum(most) <= keep * len(most):
            return held, 0
        counts = shared_out(scores[:, :end], lows, max(0, keep - sinks), how.floor)
        own = [low - begin for low, begin in zip(lows, begins, strict=True)]  # sinks, mostly
        counts = in_whole_pages([n + m for n, m in zip(counts, own, strict=True)], most, size)
        kept = []
        for head, (begin, low, count) in enumerate(zip(begins, lows, counts, strict=True)):
            chosen = best(scores[head, :end], low, max(0, count - own[head])).cpu()
            kept.append(torch.cat([torch.arange(begin, low, device="cpu"), chosen]))
            held[head, begin:end] = False
            held[head, kept[head]] = True
        self._forget(b, kept, end)
        return held, end

    def _forget(self, b: int, kept: list[torch.Tensor], end: int) -> None:
        main = self._storage.main
        if not isinstance(main, HeadStore):
            main = self._storage.main = HeadStore.of(main)
        main.forget(b, kept, end)
        if self._selection is not None:
            for row in main.rows([b]):
                if main.begins[row] < end:
                    self._selection.again(row, main.begins[row], end)

    def fit(self, spare: int) -> None:
        """Give memory back, but for so many tokens of each sequence."""
        main = self._storage.main
        if isinstance(main, HeadStore):
            main.fit(len(main.begins) * -(-spare // main.page_size))


def attention_given(
    storage: Uniform, q: torch.Tensor, rows: list[int], lengths: list[int], options: Options
) -> torch.Tensor:
    """The weight that queries give each position: float32 ``[B, Hkv, S]``.

    It is the mean over the query heads that share a KV head, and over queries by
    ``query_weights``.
    """
    heads, most = storage.main.heads, max(lengths, default=0)
    found = torch.zeros(len(rows), heads, most, dtype=torch.float32, device=q.device)
    counts, starts = query_weights(q.shape[2]).to(q.device), options.visibility.start
    for i, (b, length) in enumerate(zip(rows, lengths, strict=True)):
        views = storage.views([b], [length])
        k, v = decoded(views, length, q.dtype)
        start = None if starts is None else starts[i : i + 1]
        sight = options.visibility._replace(start=start)
        seen = visible(q.shape[2], length, sight, q.device)
        there = held_by_head(views, length).to(q.device)
        own = q[i].unflatten(0, (heads, -1))
        for head in range(heads):  # of many queries and long texts all at once would be too much
            given = attend(
                own[head : head + 1], k[:, head : head + 1], v[:, head : head + 1, :, :1],
                scoring=_of_head(options.scoring, head, heads),
                seen=seen & there[:, head, None, None], need_weights=True,
            ).weights  # fmt: skip
            assert given is not None
            found[i, head, :length] = counts @ given[0].float().mean(0)
    return found


def _of_head(scoring: Scoring, head: int, heads: int) -> Scoring:
    """Of the query heads that share a KV head."""
    sinks = scoring.sink_logits
    return scoring if sinks is None else scoring._replace(sink_logits=sinks.view(heads, -1)[head])
