"""Documents in, batches of packed sequences out, in an order that can be taken up exactly.

Several documents share a sequence. Their positions start at 0 each, and transformers keeps
attention inside a document where it sees that; no token is trained to predict the start of the
next document. The state of the stream is a few numbers and the tokens in hand, so a resumed run
gets the very batch that comes next.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from kvfold.errors import CheckpointError, InputError
from kvfold.healing.sources import Corpus, fingerprint
from kvfold.quality.text import Tokenizer, check_ids, opening_tokens

_HELD_OUT_EVERY = 16  # of a source's documents, until there is enough


@dataclass(frozen=True)
class Batch:
    """Packed sequences.

    Attributes:
        ids: ``[B, T]`` int64. positions: ``[B, T]`` int64, 0 at the start of each document.
        valid: ``[B, T - 1]`` bool, whether a token's successor belongs to its document.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    valid: torch.Tensor

    def __getitem__(self, part: slice) -> "Batch":
        return Batch(self.ids[part], self.positions[part], self.valid[part])

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self, index: torch.Tensor) -> "Batch":
        """Some of the sequences."""
        return Batch(self.ids[index], self.positions[index], self.valid[index])

    def to(self, device: torch.device) -> "Batch":
        return Batch(self.ids.to(device), self.positions.to(device), self.valid.to(device))

    @property
    def targets(self) -> int:
        """How many predictions it trains."""
        return int(self.valid.sum())


def pack(sequences: Sequence[list[list[int]]]) -> Batch:
    """Lay out sequences, each a list of segments of token ids, as a :class:`Batch`.

    >>> pack([[[5, 6, 7], [8, 9]]]).positions.tolist()
    [[0, 1, 2, 0, 1]]
    """
    ids = _whole([[i for part in parts for i in part] for parts in sequences])
    positions = _whole([[p for part in s for p in range(len(part))] for s in sequences])
    return Batch(ids, positions, positions[:, 1:] != 0)


def _whole(numbers: list[list[int]]) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int64)


@dataclass
class Tokens:
    """A tokenizer, and what it puts around a document.

    Attributes:
        vocabulary: of the model, whose embedding has no row for larger ids.
    """

    tokenizer: Tokenizer
    vocabulary: int | None = None
    opening: list[int] = field(init=False)
    closing: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.opening = opening_tokens(self.tokenizer)
        end = getattr(self.tokenizer, "eos_token_id", None)
        self.closing = [] if end is None else [int(end)]
        check_ids([*self.opening, *self.closing], self.vocabulary)

    def of(self, text: str) -> list[int]:
        """A document's tokens, ending with the end-of-text token."""
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        check_ids(ids, self.vocabulary)
        return [*ids, *self.closing]


@dataclass
class _Stream:
    """One corpus as an endless row of segments that fill sequences."""

    corpus: Corpus
    name: str
    tokens: Tokens
    held_out: set[bytes]
    epoch: int = 1
    document: int = 0
    left: list[int] = field(default_factory=list)
    _documents: Iterator[str] | None = None

    def sequence(self, length: int) -> list[list[int]]:
        """Segments of ``length`` tokens altogether; a document may go on in the next one."""
        segments: list[list[int]] = []
        room = length
        while room:
            if not self.left:
                self.left = self._next_document()
            opening = self.tokens.opening[: max(0, room - 1)]
            body = self.left[: room - len(opening)]
            self.left = self.left[len(body) :]
            segments.append([*opening, *body])
            room -= len(segments[-1])
        return segments

    def _next_document(self) -> list[int]:
        first_epoch = self.epoch
        while True:
            if self._documents is None:
                self._documents = self.corpus.documents(self.epoch, self.document)
            for text in self._documents:
                self.document += 1
                if fingerprint(text) not in self.held_out and (ids := self.tokens.of(text)):
                    return ids
            self.epoch, self.document, self._documents = self.epoch + 1, 0, None
            if self.epoch > first_epoch + 1:
                raise InputError(
                    f"{self.name} holds no text to train on", "give more text, or hold out less"
                )

    def state(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "document": self.document, "left": self.left}

    def restore(self, state: dict[str, Any]) -> None:
        self.epoch, self.document, self.left = state["epoch"], state["document"], state["left"]
        check_ids(self.left, self.tokens.vocabulary)
        self._documents = None


class TrainingStream:
    """Batches of packed sequences drawn from several corpora by weight.

    Args:
        corpora: name, documents and weight of each. context: tokens per sequence.
        held_out: fingerprints of documents never to train on.

    >>> stream = TrainingStream([("text", corpus, 1.0)], tokens, 512, set(), 0)  # doctest: +SKIP
    >>> batch = stream.batch(8)  # doctest: +SKIP
    """

    def __init__(
        self,
        corpora: Sequence[tuple[str, Corpus, float]],
        tokens: Tokens,
        context: int,
        held_out: set[bytes],
        seed: int,
    ) -> None:
        self._streams = [_Stream(c, name, tokens, held_out) for name, c, _ in corpora]
        self._weights = [weight for _, _, weight in corpora]
        self._context, self._seed, self._sequence = context, seed, 0

    def batch(self, sequences: int) -> Batch:
        """The next ``sequences`` sequences."""
        return pack([self._next() for _ in range(sequences)])

    def _next(self) -> list[list[int]]:
        # Which corpus comes next depends on the sequence's number alone: no state to keep.
        draw = random.Random(f"{self._seed}/{self._sequence}")
        self._sequence += 1
        return draw.choices(self._streams, self._weights)[0].sequence(self._context)

    def state(self) -> dict[str, Any]:
        """Everything needed to go on from here, for JSON."""
        return {"sequence": self._sequence, "streams": [s.state() for s in self._streams]}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from where :meth:`state` was taken.

        Raises:
            CheckpointError: if it is the state of other corpora.
        """
        if len(state["streams"]) != len(self._streams):
            raise CheckpointError(
                f"the checkpoint's state is of {len(state['streams'])} texts; there are "
                f"{len(self._streams)} now",
                "--force to start over",
            )
        self._sequence = state["sequence"]
        for stream, own in zip(self._streams, state["streams"], strict=True):
            stream.restore(own)


def hold_out(
    corpora: Sequence[tuple[str, Corpus, float]], tokens: Tokens, context: int, wanted: int
) -> tuple[Batch | None, set[bytes]]:
    """Every 16th document of each corpus, until there are ``wanted`` tokens.

    Each corpus gives its share of these, or one sequence where that is more: shares that are
    shorter than a sequence would leave nothing to tell by whether training did any good.

    Returns:
        the held-out text, packed (None if nothing is wanted), and the fingerprints of its
        documents.

    Raises:
        InputError: if the corpora are shorter than one sequence besides what is held out.
    """
    sequences: list[list[list[int]]] = []
    chosen: set[bytes] = set()
    share = max(context, wanted // len(corpora)) if wanted else 0
    for name, corpus, _ in corpora:
        ids, total = _every(corpus, tokens, share, chosen, context)
        if total < context:
            raise InputError(
                f"{name} is too short: about {total} tokens besides what is held out; "
                f"expected at least one sequence of {context}",
                "give more text, a smaller --context, or fewer --held-out-tokens",
            )
        size = context - len(tokens.opening)
        for start in range(0, len(ids) - size + 1, size):
            sequences.append([[*tokens.opening, *ids[start : start + size]]])
    return (pack(sequences) if sequences else None), chosen


def _every(
    corpus: Corpus, tokens: Tokens, wanted: int, chosen: set[bytes], context: int
) -> tuple[list[int], int]:
    """Held-out tokens, and how many others were seen (at least ``context``, or all)."""
    held: list[int] = []
    others = 0
    for number, text in enumerate(corpus.documents(epoch=0)):
        if len(held) < wanted and number % _HELD_OUT_EVERY == _HELD_OUT_EVERY // 2:
            held += tokens.of(text)
            chosen.add(fingerprint(text))
        elif others < context and fingerprint(text) not in chosen:
            others += len(tokens.of(text))
        if others >= context and len(held) >= wanted:
            break
    return held[:wanted], others
