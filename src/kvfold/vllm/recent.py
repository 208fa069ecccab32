"""The most recent tokens of a sequence in bfloat16, beside blocks of a format too coarse for them.

Most of attention's weight lies on what came last, and INT4 loses five times as much without this.
Every token is in vLLM's blocks from the moment it comes, so that whoever shares, swaps or frees
blocks need not know. Beside them each running sequence has a ring of its last tokens, and attention
reads these from there instead.

vLLM does not say which sequence a row of a step is. It is the one whose ring ends where the row's
new tokens begin, in the same block: nobody else's tokens lie there, as a block that is not full
has one owner. Rings live from one step to the next, so that a block that was given to another
sequence in between is not taken for its former owner's. A sequence that was not in the last step
begins a new ring with its new tokens: what it had before is in its blocks.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch

from kvfold.kernels.view import KVView, Rows

RECENT = 64  # tokens read from a ring, as kvfold's own caches do
PAGE, PAGES = 32, 4  # of a ring: RECENT and a step's drafts, wherever they begin


class Ring:
    """Exact tokens ``begin <= position < end`` of a sequence, ``RECENT`` of them at most."""

    __slots__ = ("begin", "end", "number")

    def __init__(self, number: int) -> None:
        self.number, self.begin, self.end = number, 0, 0


class Recent(NamedTuple):
    """The rings of sequences that are computed together.

    Attributes:
        table: int32 ``[B, pages]``, the pages of a ring again and again.
        firsts: where each sequence's new tokens begin that are written to its ring.
        begins, ends: what is read from there. rings: how many there are.
    """

    table: torch.Tensor
    firsts: list[int]
    begins: list[int]
    ends: list[int]
    rings: int

    def view(self, keys: Rows, values: Rows) -> KVView:
        """What is read exactly."""
        return KVView(keys, values, self.table, PAGE, self.begins, self.ends, RECENT)

    def free(self, keys: Rows, values: Rows) -> KVView:
        """Where new tokens go."""
        return KVView(keys, values, self.table, PAGE, None, self.firsts, RECENT)


class Rings:
    """Who has which ring, from step to step."""

    def __init__(self) -> None:
        self._in_block: dict[int, Ring] = {}
        self._free: list[int] = []
        self.count = 0  # that were ever needed at once

    def step(
        self, begins: Sequence[int], lengths: Sequence[int], table: torch.Tensor, page_size: int
    ) -> list[Ring | None]:
        """The ring of each sequence after this step's tokens; None for those without any.

        Args:
            begins, lengths, table: as ``batch.groups`` takes them.
            page_size: tokens of a block.
        """
        blocks = table.numpy()
        before, now = self._in_block, dict[int, Ring]()
        found: list[Ring | None] = []
        taken: set[int] = set()
        for b, (begin, end) in enumerate(pairwise(begins)):
            length, start = lengths[b], lengths[b] - (end - begin)
            if start == length:
                found.append(None)
                continue
            ring = before.get(int(blocks[b, (start - 1) // page_size])) if start else None
            if ring is None or ring.number in taken or not ring.begin <= start <= ring.end:
                ring = Ring(self._new(before, taken))
                ring.begin = start
            taken.add(ring.number)
            ring.begin, ring.end = max(ring.begin, length - RECENT), length
            # The next step begins behind this one's first token, or later: drafts may be dropped.
            for block in range(max(start, ring.begin) // page_size, (length - 1) // page_size + 1):
                now[int(blocks[b, block])] = ring
            found.append(ring)
        used = {ring.number for ring in now.values()}
        self._free = [number for number in range(self.count) if number not in used]
        self._in_block = now
        return found

    def _new(self, before: dict[int, Ring], taken: set[int]) -> int:
        """A ring that nobody has, nor may still ask for in this step."""
        asked = {ring.number for ring in before.values()} | taken
        for index, number in enumerate(self._free):
            if number not in asked:
                return self._free.pop(index)
        self.count += 1
        return self.count - 1

    def together(self, rings: Sequence[Ring], starts: Sequence[int]) -> Recent:
        """Those of sequences that are computed together."""
        ends = [ring.end for ring in rings]
        width = max(ends) // PAGE + 1
        numbers = torch.tensor([ring.number for ring in rings], dtype=torch.int32)
        table = PAGES * numbers[:, None] + torch.arange(width, dtype=torch.int32) % PAGES
        begins = [ring.begin for ring in rings]
        firsts = [max(pair) for pair in zip(starts, begins, strict=True)]
        return Recent(table, firsts, begins, ends, self.count)
