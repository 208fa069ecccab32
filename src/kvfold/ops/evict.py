"""Which tokens of a sequence a cache keeps, of each KV head.

A token's score is the attention that the last queries give it, as the mean over the query heads
that share a KV head, then over its neighbours (SnapKV, arXiv 2404.14469). Of the queries the last
1, 4, 16, ... count as much together as all of them: many tell what a text is about, the very last
what is asked. KV heads share their budget: the best scores of all of them are kept, and of each a
least share (Ada-KV, arXiv 2407.11550). What is kept fills whole pages, so all others are freed.

Torch is imported where numbers are, so that the planner starts without it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvfold.arguments import choice
from kvfold.errors import InputError
from kvfold.numbers import FRACTION, Whole
from kvfold.ops.budget import COUNT, check_budget, tokens_of

if TYPE_CHECKING:
    import torch

KINDS = ("attention", "recent")
_WINDOW = Whole(1, 1 << 16, "128 is the default")
_POOL = Whole(1, 1 << 10, "7 is the default; 1 leaves scores as they are")


@dataclass(frozen=True)
class Evict:
    """What a cache keeps of a sequence; the rest is forgotten, and its memory freed.

    Args:
        budget: the tokens that are kept of each KV head, on average: a share of the sequence in
            (0, 1], or, as a whole number, how many. Sinks and recent tokens are among them, and
            always kept.
        by: ``attention``, that of the last ``window`` queries; or ``recent``: the last tokens.
        sinks, recent: first and last tokens that are always kept.
        window: queries whose attention counts. pool: tokens next to each other that share their
            scores, an odd number.
        floor: the least share of its even part that a KV head keeps; 1 gives all the same.
        every: tokens by which a cache outgrows its budget while decoding, before more are
            forgotten.
        dense_layers: first layers of a model that keep everything.

    Raises:
        InputError: for what is out of range, and budgets below ``sinks + recent``.

    >>> Evict(budget=0.5).tokens(32_768), Evict(budget=4096).tokens(32_768)
    (16384, 4096)
    """

    budget: float = 0.5
    by: str = "attention"
    sinks: int = 64
    recent: int = 256
    window: int = 128
    pool: int = 7
    floor: float = 0.2
    every: int = 256
    dense_layers: int = 0

    def __post_init__(self) -> None:
        check_budget(self.budget)
        for name in ("sinks", "recent", "every", "dense_layers"):
            COUNT.check(getattr(self, name), name)
        _WINDOW.check(self.window, "window")
        if _POOL.check(self.pool, "pool") % 2 == 0:
            raise InputError(f"pool={self.pool}: expected an odd number", _POOL.hint)
        FRACTION.check(self.floor, "floor")
        choice(self.by, "by", KINDS)
        least = self.sinks + self.recent
        if self.budget > 1 and self.budget < least:
            raise InputError(
                f"budget={self.budget} tokens, less than sinks + recent: {least}",
                "keep more, or fewer sinks and recent tokens",
            )

    def tokens(self, length: int) -> int:
        """Tokens to be kept of a sequence of ``length``."""
        return tokens_of(self.budget, length)


def query_weights(tokens: int) -> "torch.Tensor":
    """What each of the last queries counts: float32 ``[T]``, of sum 1.

    The mean of means over the last 1, 4, 16, ... and over all of them.

    >>> query_weights(4).tolist()
    [0.125, 0.125, 0.125, 0.625]
    """
    import torch

    weights, windows = torch.zeros(tokens, dtype=torch.float32, device="cpu"), [tokens]
    while 4 ** (len(windows) - 1) < tokens:
        windows.append(4 ** (len(windows) - 1))
    for window in windows:
        weights[-window:] += 1 / (window * len(windows))
    return weights


def pooled(scores: "torch.Tensor", pool: int) -> "torch.Tensor":
    """Scores ``[..., S]`` as means over ``pool`` neighbours, fewer at the ends."""
    import torch

    flat = scores.flatten(0, -2)[:, None]
    means = torch.nn.functional.avg_pool1d(
        flat, pool, stride=1, padding=pool // 2, count_include_pad=False
    )
    return means[:, 0].view(scores.shape)


def shared_out(scores: "torch.Tensor", lows: Sequence[int], keep: int, floor: float) -> list[int]:
    """How many tokens each KV head keeps, ``keep`` on average.

    Args:
        scores: ``[Hkv, S]``, of which head h may lose those from ``lows[h]`` on.
        floor: the least share of ``keep`` for each head.

    >>> import torch
    >>> shared_out(torch.tensor([[9.0, 8.0, 7.0], [1.0, 2.0, 0.0]]), [0, 0], 2, 0.5)
    [3, 1]
    """
    import torch

    heads, size = scores.shape
    there = [size - low for low in lows]
    least = [min(int(floor * keep), n) for n in there]
    position = torch.arange(size, device=scores.device)
    held = position >= torch.tensor(lows, device=scores.device)[:, None]
    ranked = scores.masked_fill(~held, -torch.inf).sort(-1, descending=True).values
    for head, count in enumerate(least):
        ranked[head, :count] = torch.inf
    total = min(heads * keep, sum(there))
    best = ranked.flatten().topk(total).indices // size
    return torch.bincount(best, minlength=heads).tolist()


def in_whole_pages(wanted: Sequence[int], most: Sequence[int], page_size: int) -> list[int]:
    """Tokens of each KV head that fill pages, together no more than ``wanted``.

    The pages that are left after rounding down go to those who lost most by it. A head that keeps
    all it has, ``most``, need not fill its pages.

    >>> in_whole_pages([40, 23, 70], [100, 100, 70], 32)
    [32, 0, 70]
    """
    some = [i for i, n in enumerate(wanted) if n < most[i]]
    pages = {i: wanted[i] // page_size for i in some}
    spare = sum(wanted[i] for i in some) // page_size - sum(pages.values())
    for i in sorted(some, key=lambda i: -(wanted[i] % page_size))[:spare]:
        pages[i] += 1
    return [min(pages[i] * page_size, n) if i in pages else n for i, n in enumerate(most)]


def best(scores: "torch.Tensor", low: int, count: int) -> "torch.Tensor":
    """The positions from ``low`` on with the best of scores ``[S]``, ascending, int64 ``[count]``.

    Of equals the later, on whichever device.
    """
    order = scores[low:].flip(0).argsort(descending=True, stable=True)[:count]
    return (len(scores) - 1 - order).sort().values
