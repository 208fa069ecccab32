"""What a report says first: one sentence and three numbers, and how each was found. No torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import exp
from typing import TYPE_CHECKING, Any

from kvfold.report.tables import size

if TYPE_CHECKING:
    from kvfold.bench.results import Row

UNKNOWN = "?"
Quality = Mapping[str, Any]  # see ``checkpoint.records.QualityRow``


@dataclass(frozen=True)
class Tile:
    """One number of a verdict, and what it is; without a number, how to get one."""

    number: str
    words: str


@dataclass(frozen=True)
class Verdict:
    """The head of a report."""

    sentence: str
    tiles: tuple[Tile, ...]


@dataclass
class Evidence:
    """What the runs of a report say about the last model among them.

    Attributes:
        name: of the model. cache: bytes per token of the source and of the model, in 16 bits.
        quality: rows of one evaluation, of each text the source first and the model last.
        steps: rows of ``bench model``.
    """

    name: str = ""
    cache: tuple[int, int] | None = None
    quality: Sequence[Quality] = ()
    steps: "list[Row]" = field(default_factory=list)

    @property
    def lost(self) -> list[Quality]:
        """The last model's row of each text."""
        last = {row["text"]: row for row in self.quality}
        first = _firsts(self.quality)
        return [row for text, row in last.items() if row is not first[text]]

    @property
    def faster(self) -> "Row | None":
        """The last model's step that reads most cache, by the fastest of its implementations."""
        timed = [row for row in self.steps if row.vs_first]
        models = list(dict.fromkeys(row.case.get("model") for row in timed))
        if len(models) < 2:
            return None
        own = [row for row in timed if row.case.get("model") == models[-1]]
        largest = max(_tokens(row) for row in own)
        return max((row for row in own if _tokens(row) == largest), key=_times)


def _firsts(quality: Sequence[Quality]) -> dict[str, Quality]:
    firsts: dict[str, Quality] = {}
    for row in quality:
        firsts.setdefault(row["text"], row)
    return firsts


def _tokens(row: "Row") -> int:
    return int(row.case["context"]) * int(row.case["batch"])


def _times(row: "Row") -> float:
    return row.vs_first.median if row.vs_first else 0.0


def verdict(found: Evidence) -> Verdict | None:
    """None where the runs are about no model that was made."""
    if found.cache is None and not found.lost:
        return None
    parts = [_bytes(found), _nats(found), _speed(found)]
    known = [word for word, tile in parts if tile.number != UNKNOWN]
    unknown = [word for word, tile in parts if tile.number == UNKNOWN]
    told = " and ".join([", ".join(known[:-1]), *known[-1:]][not known[1:] :])
    sentence = "; ".join([f"{found.name} {told}", *unknown])
    return Verdict(f"{sentence}.", tuple(tile for _, tile in parts))


def _bytes(found: Evidence) -> tuple[str, Tile]:
    if found.cache is None:
        return "its cache is not known", Tile(
            UNKNOWN, "of KV cache a token: give the folder that convert made, too"
        )
    before, after = found.cache
    return (
        f"keeps {after / before:.0%} of its source's KV cache",
        Tile(size(after), f"of KV cache a token, {after / before:.0%} of {size(before)}"),
    )


def _nats(found: Evidence) -> tuple[str, Tile]:
    if not found.lost:
        hint = (
            "kvfold eval SRC OUT --text held-out.txt --json > eval.json, and report eval.json, too"
        )
        return "what it lost was not measured", Tile(UNKNOWN, f"nats lost a token: {hint}")
    lost = [row["nats_lost"] for row in found.lost]
    texts = ", ".join(f"{row['text']} {row['nats_lost']:.2f}" for row in found.lost)
    low, high = (exp(min(lost)), exp(max(lost)))
    return (
        f"loses {_range(min(lost), max(lost))} nats a token on {_texts(len(lost))}",
        Tile(
            _range(min(lost), max(lost)),
            f"nats lost a token, perplexity × {_range(low, high)}: {texts}",
        ),
    )


def _texts(count: int) -> str:
    return "one text" if count == 1 else f"{count} texts"


def _range(low: float, high: float) -> str:
    first, last = f"{low:.2f}", f"{high:.2f}"
    return first if first == last else f"{first} to {last}"


def _speed(found: Evidence) -> tuple[str, Tile]:
    row = found.faster
    if row is None:
        hint = "kvfold bench model SRC OUT --save speed.jsonl, and report speed.jsonl, too"
        return "its speed was not measured", Tile(
            "?", f"times the source's tokens a second: {hint}"
        )
    case = row.case
    batch = f", batch {case['batch']}" if case["batch"] > 1 else ""
    where = f"at {case['context']:,} tokens of context{batch}, with {row.implementation}"
    return (
        f"decodes {_times(row):.2g} times as fast {where}",
        Tile(f"{_times(row):.2g} ×", f"the source's tokens a second {where}"),
    )
