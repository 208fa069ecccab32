"""Numbers for people. No torch."""

import statistics

from kvfold.bench.results import Results
from kvfold.bench.timing import Spread


def per_second(seconds: Spread, batch: int) -> str:
    """Tokens per second of a step over so many sequences."""
    return f"{batch / seconds.median:.3g} {spread(seconds)}"


def spread(found: Spread) -> str:
    """Half the interquartile range, relative."""
    return f"±{found.relative:.0%}"


def percent(found: Spread | None) -> str:
    """A fraction, or nothing."""
    return "" if found is None else f"{found.median:.0%}"


def fraction(found: Spread | None) -> str:
    """A fraction and its spread, or nothing."""
    return "" if found is None else f"{found.median:.0%} {spread(found)}"


def times(found: Spread | None) -> str:
    """A ratio, or nothing."""
    return "" if found is None else f"{found.median:.2f}×"


def seconds(value: float) -> str:
    """A time for people."""
    unit, scale = ("s", 1.0) if value >= 1 else ("ms", 1e3) if value >= 1e-3 else ("µs", 1e6)
    return f"{value * scale:.3g} {unit}"


def median(values: list[float]) -> float:
    """Of several rows, 0 for none."""
    return statistics.median(values) if values else 0.0


def machine(results: Results) -> str:
    """What ran it, in a line."""
    found = results.machine
    threads = f"{found['threads']} thread{'s' if found['threads'] > 1 else ''}"
    return (
        f"{found['cpu']}, {found['isa']}, {threads}, torch {found['torch']}, {found['date'][:10]}."
    )
