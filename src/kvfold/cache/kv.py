"""The KV cache: contiguous, paged or sliding, in any format."""

from typing import Unpack

import torch

from kvfold.cache.checks import (
    check_budget_of,
    check_device,
    check_dtype,
    check_evict,
    check_formats,
    check_heads,
    check_kind,
    check_placeless,
    check_policy,
    check_rows,
    check_scores,
    check_select,
    check_sequences,
    check_sizes,
    check_starts,
    check_switches,
    refuse_gradients,
)
from kvfold.cache.eviction import Eviction, attention_given
from kvfold.cache.selection import Selection, Step, summary_format
from kvfold.cache.storage import EXACT_PAGE, ExactEnds, Uniform
from kvfold.cache.store import Shape, Store
from kvfold.errors import InputError
from kvfold.kernels.backend import Call, need_gradients
from kvfold.kernels.outside import python_state
from kvfold.kernels.pages import decoded
from kvfold.kernels.registry import attend
from kvfold.kernels.view import readable
from kvfold.ops.evict import Evict, pooled
from kvfold.ops.format import Format
from kvfold.ops.formats import FORMATS
from kvfold.ops.options import Accepted, CacheOptions, Options, check_options, declared
from kvfold.ops.select import Select
from kvfold.ops.signatures import with_options

_EXACT_FIRST = 16  # attention sinks live there, and quantize badly
_EXACT_RECENT = 64  # most of the attention's weight lies on what came last
_START_CAPACITY = 256

Dtype = str | torch.dtype
_OPTIONS = Accepted("attend", declared(CacheOptions))


class KVCache:
    """Keys and values of a batch of sequences, one layer's, and attention over them.

    Each key and value is read once per step, whatever the number of query heads that share it.
    The compiled kernels (CPU) and Triton kernels (GPU) read the cache as it is stored; without
    them PyTorch decodes it first.

    Args:
        num_kv_heads, head_dim, v_head_dim: of the layer; ``v_head_dim`` defaults to ``head_dim``.
        batch: number of sequences. They may have different lengths.
        dtype: ``fp32``, ``fp16``, ``bf16``, ``fp8``, ``int8``, ``int4`` or ``nl4`` (see
            ``kvfold.ops.formats``), or a pair for keys and values: ``("int8", "int4")``.
        kind: ``contiguous``: one run of memory per sequence, which grows by half when it is full
            unless ``max_length`` reserves it at once. ``paged``: pages of ``page_size`` tokens,
            which sequences can share (``fork``) and KV heads forget (``evict``). ``sliding``:
            pages that have left the last ``window`` tokens are freed, except the first ``sinks``
            tokens.
        slack: how far ``truncate`` can take a sliding cache back from the longest it was, besides
            its last append; it keeps so many tokens more than its window, which are
            ``slack * bytes_per_token`` bytes a sequence.
        page_size: tokens per page; multiples of 16 are read fastest.
        exact_first, exact_recent: tokens kept in bfloat16 at both ends when keys or values are
            of four bits; 0 switches that off. At most 32 tokens more than ``exact_recent`` are.
        select: read only the pages that promise most (:class:`kvfold.Select`); ``paged`` only, with
            pages of 16, 32, 48 or 64 tokens. What tells of a page takes at most a twentieth of its
            bytes.
        device: where keys and values are kept; the CPU by default.

    Raises:
        InputError: for what cannot be.

    >>> cache = KVCache(num_kv_heads=2, head_dim=64, dtype="int8")
    >>> cache.append(torch.randn(1, 2, 10, 64), torch.randn(1, 2, 10, 64))
    >>> cache.attend(torch.randn(1, 8, 1, 64)).shape
    torch.Size([1, 8, 1, 64])
    """

    _within = False  # whether values are the first numbers of their keys

    def __init__(
        self,
        num_kv_heads: int,
        head_dim: int,
        *,
        v_head_dim: int | None = None,
        batch: int = 1,
        dtype: Dtype | tuple[Dtype, Dtype] = "bf16",
        kind: str = "contiguous",
        max_length: int | None = None,
        page_size: int = 64,
        window: int | None = None,
        sinks: int = 0,
        slack: int = 0,
        exact_first: int | None = None,
        exact_recent: int | None = None,
        select: Select | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        v_head_dim = head_dim if v_head_dim is None else v_head_dim
        formats = check_formats(dtype)
        check_kind(kind, window)
        check_select(select, kind, window)
        check_sizes(
            num_kv_heads=num_kv_heads, head_dim=head_dim, v_head_dim=v_head_dim, batch=batch,
            page_size=page_size, max_length=max_length, window=window, sinks=sinks, slack=slack,
            exact_first=exact_first, exact_recent=exact_recent,
        )  # fmt: skip
        self.num_kv_heads, self.head_dim, self.v_head_dim = num_kv_heads, head_dim, v_head_dim
        self.kind, self.max_length, self.window, self.sinks = kind, max_length, window, sinks
        self.slack = slack
        self.formats, self.device = formats, check_device(device)
        self.lengths = [0] * batch
        self._plain = check_options((0, 0, 0, 0), self._asked({}))  # as for most steps
        # Of positions below all are gone but for sinks (sliding), or some (evicted).
        self._freed = [0] * batch
        self._capacity = 0
        if kind == "contiguous":
            page_size = _round_up(max_length or _START_CAPACITY)
            self._capacity = page_size
        summary = None
        if select is not None:
            summary = summary_format(formats, (head_dim, v_head_dim), page_size)
        main = self._store(formats, page_size, batch if kind == "contiguous" else 0, summary)
        self._storage = Uniform(main)
        coarse = any(fmt.keeps_exact_ends for fmt in formats)
        first = (_EXACT_FIRST if coarse else 0) if exact_first is None else exact_first
        recent = (_EXACT_RECENT if coarse else 0) if exact_recent is None else exact_recent
        if first or recent:
            half = FORMATS["bf16"]
            ends = self._store((half, half), EXACT_PAGE, 0)
            self._storage = ExactEnds(main, ends, max(first, sinks), recent, batch)
        self._selection = None if select is None else Selection(select, self._storage)
        self._eviction: Eviction | None = None  # from the first time on that tokens are evicted

    def _store(
        self,
        formats: tuple[Format, Format],
        page_size: int,
        reserve: int,
        summary: Format | None = None,
    ) -> Store:
        return Store(
            Shape(
                len(self.lengths), self.num_kv_heads, self.head_dim, self.v_head_dim, *formats,
                page_size, reserve, self.device, self._within, summary,
            )
        )  # fmt: skip

    @property
    def select(self) -> Select | None:
        """What a step of decoding reads; None is everything."""
        return None if self._selection is None else self._selection.select

    @property
    def batch(self) -> int:
        return len(self.lengths)

    @property
    def held(self) -> torch.Tensor:
        """Tokens that each KV head holds: int64 ``[B, Hkv]`` on the CPU; all but those evicted.

        (Those that a window freed are counted.)
        """
        main, first = self._storage.main, self._storage.first
        found = torch.zeros(self.batch, self.num_kv_heads, dtype=torch.int64, device="cpu")
        for b, length in enumerate(self.lengths):
            gone = [max(0, begin - min(first, length)) for begin in main.begins_of(b)]
            found[b] = length - torch.tensor(gone, dtype=torch.int64, device="cpu")
        return found

    @property
    def mean_held(self) -> float:
        """The mean of ``held``."""
        held = [self._storage.held(b, length) for b, length in enumerate(self.lengths)]
        return sum(held) / max(1, len(held))

    @property
    def nbytes(self) -> int:
        """Bytes of memory the cache has allocated, used or not."""
        return sum(store.nbytes for store in self._storage.stores)

    @property
    def bytes_per_token(self) -> float:
        """Bytes a token of one sequence takes in the middle of the cache, scales included."""
        return self._storage.main.bytes_per_token

    @property
    def bytes_per_step(self) -> float:
        """Bytes of keys, values and scales that one step of attention reads, all sequences.

        Where pages are selected, what tells of them is counted, too.
        """
        if self._selection is not None:
            chosen = self._selection
            return sum(chosen.step_bytes(b, length) for b, length in enumerate(self.lengths))
        total = 0.0
        for b, length in enumerate(self.lengths):
            held = self._storage.held(b, length)
            seen = held if self.window is None else min(held, self.sinks + self.window)
            total += self._storage.step_bytes(b, seen)
        return total

    @python_state
    def append(
        self,
        k: torch.Tensor,
        v: torch.Tensor,
        sequences: list[int] | None = None,
        *,
        queries: int | None = None,
    ) -> None:
        """Add tokens at the end of the sequences.

        Args:
            k: ``[B, Hkv, T, D]``; v: ``[B, Hkv, T, Dv]``; float32, float16 or bfloat16, after
                rotary embedding.
            sequences: which ones, B indices; all of them by default.
            queries: how many of the last of these tokens will attend through the cache, all by
                default. A sliding cache stores no more than they can see.

        Raises:
            InputError: for shapes or dtypes that do not fit, beyond ``max_length``, and for keys
                or values that need gradients, which the cache would lose.
        """
        rows = check_sequences(sequences, self.batch)
        if len(set(rows)) < len(rows):
            raise InputError(f"sequences={rows}: a sequence can be appended to only once a call")
        check_rows("k", k, len(rows), self.num_kv_heads, self.head_dim, self.device)
        check_rows("v", v, len(rows), self.num_kv_heads, self.v_head_dim, self.device)
        if k.shape[2] != v.shape[2]:
            raise InputError(f"k has {k.shape[2]} tokens but v has {v.shape[2]}")
        refuse_gradients(k, v)
        tokens = k.shape[2]
        longest = max((self.lengths[b] for b in rows), default=0) + tokens
        if self.max_length is not None and longest > self.max_length:
            raise InputError(
                f"{longest} tokens do not fit a cache with max_length={self.max_length}",
                "make it longer, or leave max_length out to let it grow",
            )
        if self.kind == "contiguous" and longest > self._capacity:
            self._capacity = _round_up(max(longest, self._capacity * 3 // 2))
            self._storage.main.lengthen(self._capacity)
        k, v = readable(k), readable(v)
        check_sizes(queries=queries)
        queries = tokens if queries is None else queries
        if len({(self.lengths[b], self._storage.state(b)) for b in rows}) <= 1:
            self._append(k, v, rows, queries)
        else:
            for i, b in enumerate(rows):
                self._append(k[i : i + 1], v[i : i + 1], [b], queries)

    def _append(self, k: torch.Tensor, v: torch.Tensor, rows: list[int], queries: int) -> None:
        """Sequences of one length."""
        tokens = k.shape[2]
        if not rows or not tokens:
            return
        old = self.lengths[rows[0]]
        new = old + tokens
        kept = self._kept(old, new, queries)
        whole = 0 if self._selection is None else self._selection.whole_pages(rows[0], old)
        if self.window is not None and self.kind == "sliding":
            skipped = kept[-1][0] if kept[-1][0] > old else 0
            for b in rows:
                self._free(b, old - max(0, self.slack - tokens) - self.window + 1)
                self._freed[b] = max(self._freed[b], skipped)
        for low, high in kept:
            if high - low < tokens:
                cut = slice(low - old, high - old)
                self._storage.append(k[:, :, cut], v[:, :, cut], rows, low, high, old)
            else:
                self._storage.append(k, v, rows, low, high, old)
        for i, b in enumerate(rows):
            self.lengths[b] = new
            if self._selection is not None:
                self._selection.note(k[i], b, old, new, whole)

    def _kept(self, old: int, new: int, queries: int) -> list[tuple[int, int]]:
        """Which of the positions ``old <= j < new`` queries to come can see."""
        if self.kind != "sliding" or self.window is None:
            return [(old, new)]
        first = new - max(queries, self.slack, 1) - self.window + 1
        if first <= old:  # everything new, and what is there already
            return [(old, new)]
        sinks = min(self.sinks, new)
        return [(old, sinks), (first, new)] if old < sinks < first else [(first, new)]

    def _free(self, b: int, end: int) -> None:
        """Free what no query to come can see: all but sinks below ``end``, whole pages of it."""
        if end > self.sinks:
            self._freed[b] = max(self._freed[b], self._storage.release(b, self.sinks, end))

    @python_state
    def trim(self) -> None:
        """Free what a sliding cache kept so that ``truncate`` could go back to it (``slack``)."""
        if self.window is None:
            return
        for b, length in enumerate(self.lengths):
            self._free(b, length - self.window + 1)
        self._storage.shrink()

    @python_state
    @with_options
    def attend(
        self,
        q: torch.Tensor,
        *,
        return_lse: bool = False,
        sequences: list[int] | None = None,
        **options: Unpack[CacheOptions],
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Attention of the last T tokens over everything in the cache, themselves included.

        Args:
            q: ``[B, Hq, T, D]``; the last query stands at the last token appended.
            options: of attention; see the signature.
            return_lse: see ``kvfold.attention``.
            sequences: which ones, B indices; all of them by default.

        S is the longest length. A sliding cache has its own window and sinks.

        Returns:
            ``[B, Hq, T, Dv]`` in q's dtype, and with ``return_lse`` also ``[B, Hq, T]`` float32.

        Gradients reach q, mask, slopes and sink logits; what is in the cache has none.

        Raises:
            InputError: for shapes that do not fit.
        """
        check_switches(return_lse=return_lse)
        rows, lengths, checked = self._checked(q, sequences, options)
        shape = (len(rows), q.shape[1], q.shape[2], max(lengths, default=0))
        self._check_window(rows, q.shape[2])
        views = self._storage.views(rows, lengths)
        if self._selection is not None:
            views = self._selection.views(Step(q, rows, lengths, checked, views))
        call = Call(
            q, None, views, lengths, checked, self.num_kv_heads, self.v_head_dim, shape[3],
            torch.is_grad_enabled() and need_gradients(q, *checked.tensors().values()),
            self._storage.main.kernels.name, return_lse,
        )  # fmt: skip
        out, lse = attend(call)
        return (out, lse) if return_lse else out  # type: ignore[return-value]

    def _checked(
        self, q: torch.Tensor, sequences: list[int] | None, options: CacheOptions
    ) -> tuple[list[int], list[int], Options]:
        """Sequences, their lengths, and the options of a call."""
        rows = check_sequences(sequences, self.batch)
        check_rows("q", q, len(rows), None, self.head_dim, self.device)
        check_heads(q, self.num_kv_heads)
        lengths = [self.lengths[b] for b in rows]
        checked = self._plain
        if options:
            shape = (len(rows), q.shape[1], q.shape[2], max(lengths, default=0))
            checked = check_options(shape, self._asked(options), _OPTIONS)
        self._check_start(checked.visibility.start)
        if self._eviction is not None and any(self._freed[b] for b in rows):
            check_placeless(checked)
        return rows, lengths, checked

    @python_state
    @with_options
    def selected(
        self,
        q: torch.Tensor,
        *,
        sequences: list[int] | None = None,
        **options: Unpack[CacheOptions],
    ) -> torch.Tensor:
        """What ``attend`` would read of keys and values: bool ``[B, Hkv, S]``.

        Args:
            q: ``[B, Hq, T, D]``. options: of attention; see the signature.
            sequences: which ones, B indices; all of them by default.

        Raises:
            InputError: for shapes that do not fit, and for a cache that reads everything.

        >>> cache = KVCache(2, 64, kind="paged", select=Select(budget=0.25))
        >>> cache.append(torch.randn(1, 2, 4096, 64), torch.randn(1, 2, 4096, 64))
        >>> cache.selected(torch.randn(1, 8, 1, 64)).float().mean()
        tensor(0.2500)
        """
        if self._selection is None:
            raise InputError("this cache reads everything", "give it select=kvfold.Select(...)")
        rows, lengths, checked = self._checked(q, sequences, options)
        views = self._storage.views(rows, lengths)
        return self._selection.positions(Step(q, rows, lengths, checked, views))

    @python_state
    @with_options
    def scores(
        self,
        q: torch.Tensor,
        *,
        pool: int = Evict.pool,
        sequences: list[int] | None = None,
        **options: Unpack[CacheOptions],
    ) -> torch.Tensor:
        """The attention that the last T tokens give every position: float32 ``[B, Hkv, S]``.

        The mean over the query heads that share a KV head and over these queries, of which the
        last count more (``kvfold.ops.evict``), then over ``pool`` positions next to each other
        (SnapKV, arXiv 2404.14469); what ``evict`` may go by.

        Args:
            q: ``[B, Hq, T, D]``; the last query stands at the last token appended.
            options: of attention; see the signature.
            pool: an odd number; 1 leaves weights as they are.
            sequences: which ones, B indices; all of them by default.

        Raises:
            InputError: for shapes that do not fit, and options that ask where keys stand.
        """
        rows, lengths, checked = self._checked(q, sequences, options)
        check_placeless(checked)
        pool = Evict(pool=pool).pool
        return pooled(attention_given(self._storage, q, rows, lengths, checked), pool)

    @python_state
    def evict(
        self,
        budget: float,
        *,
        by: torch.Tensor | str = "recent",
        sinks: int = Evict.sinks,
        recent: int = Evict.recent,
        floor: float = Evict.floor,
        start: torch.Tensor | None = None,
        sequences: list[int] | None = None,
        spare: int = 0,
    ) -> torch.Tensor:
        """Forget tokens, of each KV head its own, and free their memory.

        What is kept fills whole pages, which are ``page_size`` tokens of one KV head from now on.
        Kept tokens move together, right before those that all heads have: positions below these
        are then no longer those they were appended at. A cache of which nothing is forgotten, as
        the budget allows for all, stays as it is.

        Args:
            budget: tokens to be kept of each KV head, on average: a share of all that were
                appended, in (0, 1], or, as a whole number, how many.
            by: float ``[B, Hkv, S]``, for instance what ``scores`` gives: positions with the
                largest are kept; or ``recent``: the last.
            sinks, recent: first and last tokens that are kept in any case.
            floor: the least share of its even part that each KV head keeps; 1 gives all the same.
            start: int ``[B]``; positions before it are padding, and forgotten first.
            sequences: which ones, B indices; all of them by default.
            spare: tokens of each sequence to keep memory for.

        Returns:
            which positions were kept: bool ``[B, Hkv, S]``, on the CPU.

        Raises:
            InputError: for budgets below ``sinks + recent``, and caches that are not ``paged``.

        >>> cache = KVCache(2, 64, kind="paged")
        >>> k = v = torch.randn(1, 2, 4096, 64)
        >>> cache.append(k, v)
        >>> kept = cache.evict(0.5, by=cache.scores(torch.randn(1, 8, 32, 64)))
        >>> kept.float().mean(), round(cache.nbytes / k.nbytes, 2)  # both in half as many bits
        (tensor(0.5000), 0.5)
        """
        how = Evict(budget, sinks=sinks, recent=recent, floor=floor)
        rows = check_sequences(sequences, self.batch)
        lengths = [self.lengths[b] for b in rows]
        check_evict(self.kind, rows)
        for length in lengths:
            check_budget_of(how, length)
        check_sizes(spare=spare)
        shape = len(rows), self.num_kv_heads, max(lengths, default=0)
        scores = check_scores(by, shape)
        starts = check_starts(start, lengths)
        return self._evict(how, scores, rows, starts, spare)

    @python_state
    @with_options
    def evict_as(
        self, how: Evict, q: torch.Tensor, **options: Unpack[CacheOptions]
    ) -> torch.Tensor:
        """``evict`` by a policy, which keeps sinks and recent tokens whatever its budget is.

        Memory for ``how.every`` more tokens is kept. ``how.dense_layers`` is not looked at.

        Args:
            q: ``[B, Hq, T, D]``, the last queries; the very last stands at the last token.
            options: of attention; see the signature. Of ``start`` the padding is forgotten.

        Raises:
            InputError: for what cannot be.

        >>> cache = KVCache(2, 64, kind="paged")
        >>> cache.append(torch.randn(1, 2, 4096, 64), torch.randn(1, 2, 4096, 64))
        >>> cache.evict_as(Evict(budget=1024), torch.randn(1, 8, 32, 64)).sum()
        tensor(2048)
        """
        check_policy(how)
        rows = list(range(self.batch))
        check_evict(self.kind, rows)
        start = options.get("start")
        starts = check_starts(start, self.lengths)
        if how.by == "recent":
            shape = self.batch, self.num_kv_heads, max(self.lengths, default=0)
            scores = check_scores("recent", shape)
        else:
            scores = self.scores(q, pool=how.pool, **options)
        return self._evict(how, scores, rows, starts, how.every)

    def _evict(
        self,
        how: Evict,
        scores: torch.Tensor,
        rows: list[int],
        starts: list[int],
        spare: int,
    ) -> torch.Tensor:
        if self._eviction is None:
            self._eviction = Eviction(self._storage, self._selection)
        most = max((self.lengths[b] for b in rows), default=0)
        kept = torch.zeros(len(rows), self.num_kv_heads, most, dtype=torch.bool, device="cpu")
        for i, (b, start) in enumerate(zip(rows, starts, strict=True)):
            length = self.lengths[b]
            kept[i, :, :length], end = self._eviction.forget(b, length, scores[i], how, start)
            self._freed[b] = max(self._freed[b], end)
        self._eviction.fit(spare)
        return kept

    def _asked(self, options: CacheOptions) -> CacheOptions:
        """The options with the cache's own window and sinks; ``sinks=None`` is no sinks."""
        if self.kind == "sliding" and self.window is not None:
            return {**options, "window": self.window, "sinks": self.sinks}
        if options.get("sinks", 0) is None:
            return {**options, "sinks": 0}
        return options

    def _check_window(self, rows: list[int], queries: int) -> None:
        if self.window is None:
            return
        for b in rows:
            if self._lacks(b, self.lengths[b] - queries - self.window + 1, self.lengths[b]):
                raise InputError(
                    f"{queries} queries see further back than the sliding cache still holds",
                    "attend with the tokens of the last append, or fewer",
                )

    def _check_start(self, start: torch.Tensor | None) -> None:
        if start is None or self.kind != "sliding" or not self.sinks or start.is_cuda:
            return
        if start.numel() and int(start.max()) > 0:
            raise InputError(
                "a sliding cache with sinks keeps the first tokens, which start would hide",
                "pad on the right, or use sinks=0",
            )

    @python_state
    def read(self, sequence: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """What the cache holds of a sequence, decoded: float32 ``[Hkv, S, D]``, ``[Hkv, S, Dv]``.

        Freed positions of a sliding cache are zeros.
        """
        rows = check_sequences([sequence], self.batch)
        k, v = self._decoded(rows, torch.float32)
        return k[0], v[0]

    @python_state
    def tensors(
        self, dtype: torch.dtype, sequences: list[int] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Everything, decoded: ``[B, Hkv, S, D]``, shorter sequences filled up with zeros."""
        check_dtype(dtype)
        rows = check_sequences(sequences, self.batch)
        return self._decoded(rows, dtype)

    def _decoded(self, rows: list[int], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        lengths = [self.lengths[b] for b in rows]
        views = self._storage.views(rows, lengths)
        return decoded(views, max(lengths, default=0), dtype)

    @python_state
    def truncate(self, length: int, sequences: list[int] | None = None) -> None:
        """Forget all tokens from position ``length`` on, as speculative decoding must.

        Raises:
            InputError: if a cache would need tokens that it has freed; nothing changes.
        """
        check_sizes(length=length)
        rows = [b for b in check_sequences(sequences, self.batch) if length < self.lengths[b]]
        if not self.can_truncate(length, rows):
            longest = max(self.lengths[b] for b in rows)
            said = f"cannot go back from {longest} to {length} tokens"
            if self.window is None:
                raise InputError(f"{said}: of these some were evicted", "evict with more recent=")
            raise InputError(
                f"{said}: the window's keys are freed",
                "it can forget the tokens of its last append, and slack= tokens before",
            )
        for b in rows:
            if length:
                self._storage.truncate(b, length)
            else:
                self._storage.clear(b)
            self.lengths[b] = length
            self._freed[b] = self._freed[b] if length > self.sinks else 0

    def can_truncate(self, length: int, sequences: list[int] | None = None) -> bool:
        """Whether ``truncate`` can: what the next token would have seen is still held."""
        check_sizes(length=length)
        rows = [b for b in check_sequences(sequences, self.batch) if length < self.lengths[b]]
        if self.window is None:
            return not length or all(length >= self._freed[b] for b in rows)
        return not any(self._lacks(b, length - self.window + 1, length) for b in rows)

    def _lacks(self, b: int, low: int, high: int) -> bool:
        """Whether any of the positions ``low <= j < high`` are gone."""
        return max(low, self.sinks) < min(high, self._freed[b])

    @python_state
    def clear(self, sequences: list[int] | None = None) -> None:
        """Forget everything; the memory is kept for new tokens."""
        for b in check_sequences(sequences, self.batch):
            self._storage.clear(b)
            self.lengths[b] = self._freed[b] = 0

    @python_state
    def fork(self, source: int, target: int) -> None:
        """Make ``target`` a copy of ``source`` that shares its pages until either changes.

        Raises:
            InputError: for a contiguous cache, which has no pages to share.
        """
        if self.kind == "contiguous":
            raise InputError("a contiguous cache cannot fork", "use kind='paged'")
        check_sequences([source, target], self.batch)
        if source == target:
            return
        self._storage.share(source, target, self.lengths[source])
        self.lengths[target] = self.lengths[source]
        self._freed[target] = self._freed[source]

    @python_state
    def reorder(self, sequences: list[int]) -> None:
        """Make sequence i what sequence ``sequences[i]`` was (beam search). Pages are shared.

        The batch becomes as large as the list.
        """
        rows = check_sequences(sequences, self.batch)
        self._storage.select(rows)
        self.lengths = [self.lengths[b] for b in rows]
        self._freed = [self._freed[b] for b in rows]


def _round_up(n: int, to: int = 16) -> int:
    return -(-n // to) * to
