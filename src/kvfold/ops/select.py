"""Which pages of a cache a step of decoding reads.

Pages of P keys are summarised by two rows of numbers, a centre c and a spread r, from which a
query's scores with the keys are estimated without reading them:

    ``spread``  c and r are the mean and the standard deviation of each dimension:
                q·c + 3 sqrt(sum_d q_d² r_d²), about where the largest score of a page lies;
    ``box``     c and r are the middle and half the width of the smallest box around the keys:
                q·c + sum_d |q_d| r_d, which no score of the page exceeds (Quest, arXiv 2406.10774).

A KV head reads one list of pages for all of its query heads: of each query the estimates are made
weights by a softmax over pages, and a page counts with the mean over queries.

Torch is imported where numbers are, so that the planner starts without it.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from kvfold.arguments import choice
from kvfold.numbers import BUDGET
from kvfold.ops.budget import COUNT, check_budget, tokens_of
from kvfold.ops.format import Format
from kvfold.ops.formats import decode, encode

if TYPE_CHECKING:
    import torch

KINDS = ("spread", "box", "exact")
PAGES = (16, 32, 48, 64)  # tokens of a page that can be selected
MOST_SHARE = 0.05  # of a page's bytes that may tell of its keys
SPREADS = 3.0  # standard deviations


@dataclass(frozen=True)
class Select:
    """What a cache reads in a step of decoding: the pages that promise most, and no others.

    All tokens are kept; those that are not read now may be read in the next step. Steps of up to 16
    queries select; longer ones, prompts, read everything. So do calls with a ``mask``, a ``window``
    or ``alibi_slopes``, which need to know where each key stands.

    Args:
        budget: the tokens that are read: a share of the sequence in (0, 1], or, as a whole number,
            how many. Sinks and recent tokens are among them, and always read.
        top_p: read fewer where these promise that share of the attention's weight, in (0, 1].
        sinks, recent: first and last tokens that are always read, in whole pages.
        dense_below: sequences of fewer tokens are read as a whole.
        by: how pages are summarised, ``spread`` or ``box`` (``kvfold.ops.select``); or ``exact``,
            which reads all keys to choose: slow, to compare with.
        dense_layers: first layers of a model that read everything; for
            ``kvfold.transformers.KVCache``.

    Raises:
        InputError: for what is out of range.

    >>> Select(budget=0.25).tokens(32_768), Select(budget=4096).tokens(32_768)
    (8192, 4096)
    """

    budget: float = 0.25
    top_p: float | None = None
    sinks: int = 64
    recent: int = 256
    dense_below: int = 2048
    by: str = "spread"
    dense_layers: int = 0

    def __post_init__(self) -> None:
        check_budget(self.budget)
        if self.top_p is not None:
            BUDGET.check(self.top_p, "top_p")
        for name in ("sinks", "recent", "dense_below", "dense_layers"):
            COUNT.check(getattr(self, name), name)
        choice(self.by, "by", KINDS)

    def tokens(self, length: int) -> int:
        """Tokens to be read of a sequence of ``length``."""
        return tokens_of(self.budget, length)

    def pages(
        self, length: int, queries: int, page_size: int, start: int = 0, first: int = 0
    ) -> "Reading":
        """What is read of a sequence whose last ``queries`` tokens ask.

        Args:
            start: positions before it are padding. first: those before it are read in any case.
        """
        begin = start // page_size
        always = -(-max(start + self.sinks, first) // page_size)
        last = max(0, length - max(self.recent, queries)) // page_size
        rest = length - last * page_size + (always - begin) * page_size
        keep = (self.tokens(length - start) - rest) // page_size
        if length - start < self.dense_below:
            return EVERYTHING
        return self.fitted(Reading(always, last, max(keep, 0), begin))

    def fitted(self, reading: "Reading") -> "Reading":
        """The same, or everything where no page can be left out."""
        pages = reading.last - reading.always
        if pages <= 0 or (reading.keep >= pages and self.top_p is None):
            return EVERYTHING
        return reading._replace(keep=min(reading.keep, pages))


class Reading(NamedTuple):
    """Pages of a sequence.

    Attributes:
        always, last: pages below ``always`` and from ``last`` on are read, and
        keep: so many of those between. begin: pages below it are padding.
    """

    always: int
    last: int
    keep: int
    begin: int = 0

    @property
    def whole(self) -> bool:
        """Whether everything is read."""
        return self.last == 0


EVERYTHING = Reading(0, 0, 0)


def summarised(keys: "torch.Tensor", by: str) -> "torch.Tensor":
    """Centre and spread of pages: float32 ``[..., 2, D]`` of keys ``[..., P, D]``."""
    import torch

    keys = keys.float()
    if by == "box":
        low, high = keys.amin(-2), keys.amax(-2)
        return torch.stack([(low + high) / 2, (high - low) / 2], -2)
    return torch.stack([keys.mean(-2), keys.std(-2, correction=0)], -2)


def enclosing(summaries: "torch.Tensor", fmt: Format) -> "torch.Tensor":
    """Boxes ``[..., 2, D]`` made so much wider that they still hold their keys once rounded to
    ``fmt``, bf16 or int8."""
    import torch

    centre, spread = summaries.unbind(-2)
    rounded = decode(*encode(centre, fmt), fmt, centre.shape[-1])
    spread = spread + (centre - rounded).abs()
    # Rounding takes at most 2^-9 of a number, or half of a scale, which is a 127th of the largest.
    if fmt.plain:
        spread = spread * (1 + 2**-8)
    else:
        spread = spread + spread.amax(-1, keepdim=True) * (0.52 / 127)
    return torch.stack([centre, spread], -2)


def estimates(
    q: "torch.Tensor", summaries: "torch.Tensor", by: str, spreads: float = SPREADS
) -> "torch.Tensor":
    """Scores, before any scale, that pages may hold.

    Args:
        q: ``[..., R, D]``, queries. summaries: ``[..., N, 2, D]``, as ``summarised`` makes them.

    Returns:
        ``[..., R, N]``.

    >>> import torch
    >>> keys = torch.tensor([[[1.0, 0.0], [3.0, 0.0]]])  # a page of two keys
    >>> estimates(torch.tensor([[2.0, 1.0]]), summarised(keys, "box"), "box")
    tensor([[6.]])
    """
    centre, spread = summaries.unbind(-2)
    if by == "box":
        found: torch.Tensor = q @ centre.mT + q.abs() @ spread.mT
    else:
        found = q @ centre.mT + spreads * (q.square() @ spread.square().mT).sqrt()
    return found


def weights(scores: "torch.Tensor") -> "torch.Tensor":
    """What pages count: ``[..., N]`` of logits ``[..., R, N]``; not NaN, which has no order."""
    return scores.softmax(-1).mean(-2).nan_to_num(0.0)
