"""Two runs of a benchmark, case by case. No torch."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kvfold.bench.results import Row, load
from kvfold.bench.timing import Spread
from kvfold.errors import InputError

FASTER, SLOWER, SAME = "faster", "slower", "same"


@dataclass(frozen=True)
class Change:
    """One case in both runs.

    Attributes:
        before, after: fractions of the floor, None where there is no speed.
        ratio: after / before. verdict: ``faster`` or ``slower`` if the interquartile ranges do
            not overlap, else ``same``; or the status of the run that has no speed.
    """

    case: str
    implementation: str
    before: Spread | None
    after: Spread | None
    ratio: float | None
    verdict: str


@dataclass(frozen=True)
class Comparison:
    """All changes, and what could not be compared."""

    changes: tuple[Change, ...]
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def compare_files(before: Path, after: Path) -> Comparison:
    """Match the rows of two files by case and implementation.

    Raises:
        InputError: for files that hold no rows, or have none in common.
    """
    old, new = ({row.key: row for row in load(path)} for path in (before, after))
    shared = [key for key in old if key in new]
    if not shared:
        raise InputError(
            f"{before} and {after} have no case in common",
            "run both benchmarks with the same options",
        )
    notes = [
        f"{len(rows) - len(shared)} of {len(rows)} rows are only in {path}"
        for path, rows in ((before, old), (after, new))
        if len(rows) > len(shared)
    ]
    return Comparison(tuple(change(old[key], new[key]) for key in shared), tuple(notes))


def change(old: Row, new: Row) -> Change:
    """What became of a row."""
    before, after = old.floor_fraction, new.floor_fraction
    case, name = describe(old.case), old.implementation
    if before is None or after is None:
        status = old.status if before is None else new.status
        return Change(case, name, before, after, None, status)
    verdict = SAME
    if after.low > before.high:
        verdict = FASTER
    elif after.high < before.low:
        verdict = SLOWER
    return Change(case, name, before, after, after.median / before.median, verdict)


def describe(case: dict[str, Any]) -> str:
    """A case in few words.

    >>> describe({"num_heads": 32, "num_kv_heads": 8, "head_dim": 128, "context": 512, "batch": 1})
    '32:8 heads of 128, context 512, batch 1'
    """
    heads = f"{case.get('num_heads')}:{case.get('num_kv_heads')}"
    what = f"{case['model']} ({heads})" if "model" in case else f"{heads} heads"
    size = f" of {case['head_dim']}" if "head_dim" in case else ""
    return f"{what}{size}, context {case.get('context')}, batch {case.get('batch')}"
