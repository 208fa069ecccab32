"""The one way in which kvfold times anything.

Machines are shared and their clocks drift, so competitors take turns in one process, and what is
reported is a ratio of samples of the same round rather than of times taken minutes apart.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from time import perf_counter
from typing import Self

DEFAULT_ROUNDS = 9
DEFAULT_MIN_TIME = 0.02  # seconds: a thousand times the clock's and the loop's own cost
_GROWTH_AT_MOST = 10


@dataclass(frozen=True)
class Spread:
    """Repeated measurements of one quantity, in the order of the rounds.

    Attributes:
        median: of the samples. low, high: their quartiles.
    """

    median: float
    low: float
    high: float
    samples: tuple[float, ...]

    @classmethod
    def of(cls, samples: Sequence[float]) -> Self:
        """Summarize samples.

        >>> Spread.of([3.0, 1.0, 2.0]).median
        2.0
        """
        if len(samples) < 2:
            only = samples[0]
            return cls(only, only, only, (only,))
        low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(median, low, high, tuple(samples))

    @property
    def relative(self) -> float:
        """Half the interquartile range, as a fraction of the median."""
        return (self.high - self.low) / 2 / self.median if self.median else 0.0


class Timing(Spread):
    """Seconds per call."""


def ratio(over: Spread, under: Spread, factor: float = 1.0) -> Spread:
    """``factor * over / under``, round by round: drift that both share cancels.

    >>> ratio(Spread.of([2.0, 4.0]), Spread.of([1.0, 2.0])).median
    2.0
    """
    pairs = zip(over.samples, under.samples, strict=True)
    return Spread.of([factor * a / b for a, b in pairs])


def measure(
    competitors: Mapping[str, Callable[[], object]],
    *,
    rounds: int = DEFAULT_ROUNDS,
    min_time: float = DEFAULT_MIN_TIME,
    repeats: int | None = None,
    clock: Callable[[], float] = perf_counter,
    tick: Callable[[], None] = lambda: None,
) -> dict[str, Timing]:
    """Time callables that take turns.

    Each is called once to warm up, then until a sample of it lasts ``min_time``; after that every
    round takes one sample of each. The order moves on by one from round to round, so that nobody
    always follows the same neighbour. Rotating over buffers is the callables' own business.

    Args:
        rounds: samples of each. min_time: seconds a sample should last at least.
        repeats: calls per sample, in place of ``min_time``.
        clock: seconds, monotonic. tick: called after every sample.

    Returns:
        seconds per call, by name, in the given order.
    """
    calls = {name: _warm_up(call, min_time, repeats, clock) for name, call in competitors.items()}
    samples: dict[str, list[float]] = {name: [] for name in competitors}
    names = list(competitors)
    for index in range(rounds):
        turn = index % max(1, len(names))
        for name in names[turn:] + names[:turn]:
            samples[name].append(_sample(competitors[name], calls[name], clock))
            tick()
    return {name: Timing.of(taken) for name, taken in samples.items()}


def _warm_up(
    call: Callable[[], object],
    min_time: float,
    repeats: int | None,
    clock: Callable[[], float],
) -> int:
    """Call until warm; the number of calls that last ``min_time``."""
    call()
    if repeats is not None:
        return repeats
    count = 1
    while (seconds := _sample(call, count, clock) * count) < min_time:
        growth = 1.1 * min_time / seconds if seconds > 0 else _GROWTH_AT_MOST
        count = ceil(count * min(max(growth, 1.1), _GROWTH_AT_MOST))
    return count


def _sample(call: Callable[[], object], count: int, clock: Callable[[], float]) -> float:
    start = clock()
    for _ in range(count):
        call()
    return (clock() - start) / count
