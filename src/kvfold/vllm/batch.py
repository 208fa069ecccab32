"""A step of vLLM's: which rows of its tokens are which sequence's, and who goes together.

vLLM lays the new tokens of all sequences behind one another: one each where they decode, one and a
few drafts where it speculates, thousands where a prompt comes in. kvfold's kernels take sequences
with equally many, so a step is a few calls, mostly one.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from kvfold.kernels.cpu.again import Again
from kvfold.kernels.limits import MAX_TOKENS
from kvfold.kernels.view import KVView, Positions, Rows
from kvfold.vllm.recent import Recent, Rings


class Group(NamedTuple):
    """Sequences with equally many new tokens.

    Attributes:
        tokens: of each sequence. rows: where they are, sequence by sequence: a slice where they lie
            behind one another, else int64 ``[B * tokens]``.
        table: int32 ``[B, blocks]``. starts, ends: how long the sequences are before and after.
        most: the longest of them, or more.
        recent: what is read exactly, where blocks are too coarse for it.
        kept: see ``keep``. again: the step as another layer with the same options made it.
    """

    tokens: int
    rows: slice | torch.Tensor
    table: torch.Tensor
    starts: Positions
    ends: Positions
    most: int
    recent: Recent | None
    kept: dict[object, dict[str, Any]]
    again: dict[int, Again]

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """The group's part ``[B, H, tokens, D]`` of ``[all tokens, H, D]``; a view of a slice."""
        own = x[self.rows]
        if self.tokens == 1:
            return own.unsqueeze(2)
        return own.unflatten(0, (-1, self.tokens)).transpose(1, 2)

    def keep(self, what: object) -> dict[str, Any]:
        """What kernels keep for the layers of this step that ask for the same."""
        found = self.kept.get(what)
        if found is None:
            found = self.kept[what] = {}
        return found

    @property
    def in_a_row(self) -> bool:
        """Whether they are few tokens of each sequence, behind one another."""
        return self.tokens <= MAX_TOKENS and isinstance(self.rows, slice)

    @property
    def whole(self) -> bool:
        """Whether it is all that its sequences have."""
        return isinstance(self.starts, list) and not any(self.starts)

    def view(self, keys: Rows, values: Rows, page_size: int, ends: Positions) -> KVView:
        """Its blocks, up to where its tokens begin or end, or its exact ones begin."""
        return KVView(keys, values, self.table, page_size, None, ends, self.most)


def groups(
    begins: Sequence[int],
    lengths: Sequence[int],
    table: torch.Tensor,
    on_device: torch.Tensor | None = None,
    rings: Rings | None = None,
    page_size: int = 0,
) -> list[Group]:
    """The calls of a step.

    Args:
        begins: ``[B + 1]``, where the new tokens of each sequence begin, and the end of the last.
        lengths: ``[B]``, of the sequences, new tokens included; at least that, if ``on_device``.
        table: int32 ``[B, blocks]``.
        on_device: int32 ``[B]``, the lengths, where a GPU reads them; its kernels are for few
            queries, so that prompts go as many short sequences that share their blocks.
        rings: of sequences whose most recent tokens are kept exactly, with the tokens of a block.

    >>> table = torch.zeros(3, 4, dtype=torch.int32)
    >>> [(x.tokens, x.rows, x.ends) for x in groups([0, 1, 2, 40], [9, 7, 38], table)]
    [(1, slice(0, 2, None), [9, 7]), (38, slice(2, 40, None), [38])]
    """
    if on_device is not None:
        begins, lengths, table, on_device = _in_pieces(begins, lengths, table, on_device)
    members: dict[tuple[int, int], list[int]] = {}
    for b, (begin, end) in enumerate(pairwise(begins)):
        tokens = end - begin
        if tokens:  # sequences without any fill up a batch
            alone = b if tokens > MAX_TOKENS else -1
            members.setdefault((tokens, alone), []).append(b)
    owned = [] if rings is None else rings.step(begins, lengths, table, page_size)
    found = []
    for (tokens, _), of in members.items():
        group = _group(tokens, of, begins, lengths, table, on_device)
        if rings is not None and isinstance(group.starts, list):
            mine = [ring for ring in (owned[b] for b in of) if ring is not None]
            group = group._replace(recent=rings.together(mine, group.starts))
        found.append(group)
    return found


def _group(
    tokens: int,
    members: list[int],
    begins: Sequence[int],
    lengths: Sequence[int],
    table: torch.Tensor,
    on_device: torch.Tensor | None,
) -> Group:
    first, last = members[0], members[-1] + 1
    if last - first == len(members):
        rows: slice | torch.Tensor = slice(begins[first], begins[last])
        chosen: slice | torch.Tensor = slice(first, last)
    else:
        at = [begin + t for begin in (begins[b] for b in members) for t in range(tokens)]
        rows = torch.tensor(at, device=table.device)
        chosen = torch.tensor(members, device=table.device)
    own = [lengths[b] for b in members]
    most = max(own)
    if on_device is None:
        starts: Positions = [length - tokens for length in own]
        return Group(tokens, rows, table[chosen], starts, own, most, None, {}, {})
    ends = on_device[chosen]
    return Group(tokens, rows, table[chosen], ends - tokens, ends, most, None, {}, {})


def _in_pieces(
    begins: Sequence[int], lengths: Sequence[int], table: torch.Tensor, on_device: torch.Tensor
) -> tuple[list[int], list[int], torch.Tensor, torch.Tensor]:
    """The same step with at most ``MAX_TOKENS`` new tokens for each sequence.

    Queries of an earlier piece do not see the keys of a later one, which are there already.
    """
    starts, own, after = [begins[0]], list[int](), list[int]()
    for b, (begin, end) in enumerate(pairwise(begins)):
        pieces = [*range(begin + MAX_TOKENS, end, MAX_TOKENS), end]
        starts += pieces
        own += [b] * len(pieces)
        after += [end - piece for piece in pieces]
    if len(own) == len(lengths):
        return starts, list(lengths), table, on_device
    chosen = torch.tensor(own, device=table.device)
    later = torch.tensor(after, dtype=torch.int32, device=table.device)
    cut = [lengths[b] - rest for b, rest in zip(own, after, strict=True)]
    return starts, cut, table[chosen], on_device[chosen] - later
