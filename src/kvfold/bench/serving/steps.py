"""What an engine's steps say. No torch.

Of each step is known: its seconds, how many requests were given a token, how many of those their
first, and how many were in hand. A step in which every request in hand is given a token, and none
its first, does nothing but decode; so decoding and prefill are told apart however the engine mixes
them.
"""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

from kvfold.bench.timing import Spread
from kvfold.errors import RunError


@dataclass(frozen=True)
class Step:
    """One step of an engine.

    Attributes:
        tokens: requests that were given one. begun: requests whose token was the first.
        in_hand: requests that were begun or continued.
    """

    seconds: float
    tokens: int
    begun: int
    in_hand: int

    @property
    def decodes_only(self) -> bool:
        return self.begun == 0 and self.tokens == self.in_hand > 0


@dataclass(frozen=True)
class Decoding:
    """How an engine decodes.

    Attributes:
        seconds: a step of as many requests as it decoded at once: the time of a token.
        running: how many those were: all, or as many as its memory holds.
    """

    seconds: float
    running: int

    @property
    def tokens_per_second(self) -> float:
        """Of all requests together, as long as there are as many."""
        return self.running / self.seconds

    @classmethod
    def of(cls, steps: Iterable[Step]) -> Self:
        """The median of the fullest steps that only decoded.

        Raises:
            RunError: if no step only decoded.

        >>> Decoding.of([Step(9.0, 1, 1, 2), Step(0.5, 2, 0, 2), Step(0.1, 1, 0, 1)])
        Decoding(seconds=0.5, running=2)
        """
        pure = [step for step in steps if step.decodes_only]
        if not pure:
            raise RunError("vLLM took no step that only decoded", "a longer --output")
        most = max(step.tokens for step in pure)
        return cls(statistics.median(s.seconds for s in pure if s.tokens == most), most)


def first_token(steps: Sequence[Step]) -> float:
    """Seconds until a request that was alone had its first token.

    >>> first_token([Step(2.0, 0, 0, 1), Step(1.0, 1, 1, 1), Step(0.5, 1, 0, 1)])
    3.0
    """
    until = next(at for at, step in enumerate(steps) if step.begun)
    return sum(step.seconds for step in steps[: until + 1])


def slope(contexts: Sequence[int], rounds: Sequence[Sequence[Decoding]]) -> Spread | None:
    """Seconds that a token of context of one sequence adds to a step: least squares, each round.

    Args:
        rounds: of each round, a measurement for every context.

    >>> slope([100, 300], [[Decoding(1.0, 2), Decoding(2.0, 2)]]).median
    0.0025
    """
    if len(contexts) < 2:
        return None
    found = []
    for measured in rounds:
        tokens = [n * each.running for n, each in zip(contexts, measured, strict=True)]
        if len(set(tokens)) < 2:
            return None
        found.append(
            statistics.linear_regression(tokens, [each.seconds for each in measured]).slope
        )
    return Spread.of(found)
