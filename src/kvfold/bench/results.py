"""Rows of results, and the files that keep them. No torch."""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

from annotated_types import Ge, Le
from typing_extensions import TypedDict

from kvfold.arch.config import Heads
from kvfold.bench.timing import Spread
from kvfold.checkpoint.records import Count, Number, StoredSpread
from kvfold.documents import Document, open_ended
from kvfold.errors import InputError
from kvfold.files import append_text, check_file

_LONGEST_LINE = 1 << 20
OK, WRONG, SKIPPED = "ok", "wrong", "skipped"
_SPREADS = (
    "seconds", "floor_fraction", "vs_own_bf16", "vs_best_peer", "vs_first", "first_token",
    "tokens_per_second", "slope", "prefill_vs_peer",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One implementation in one case. What was not measured, or must not be told, is None.

    Attributes:
        benchmark: ``attention``, ``model`` or ``serve``.
        case: what was asked, as names and numbers; the same for all that compete.
        implementation: who answered, e.g. ``kvfold int8`` or ``sdpa``.
        status: ``ok``; ``wrong`` (failed the correctness gate, so no speed is reported); or
            ``skipped``, with the reason.
        error, allowed: the gate's measure and its limit.
        kv_bytes: of the KV cache that one step reads. bytes: all that it must read, with a
            model's weights.
        seconds: per decode step. floor_fraction: of it that reading ``bytes`` at the bandwidth
            of the same round would take.
        bandwidth: bytes per second, measured in the same run.
        working_set: bytes that were rotated over. cold: whether those are at least twice the
            last-level cache, None if its size is unknown.
        vs_own_bf16, vs_best_peer, vs_first: speed as a multiple of the row's so named.
        first_token: seconds of a prefill. top1: share of steps with the first row's choice.
        kv_bytes_expected: what arithmetic says ``kv_bytes`` should be.
        tokens_per_second: of all sequences that are served. running: how many an engine decoded
            at once. cache_tokens: how many tokens its cache holds.
        slope: seconds that each token of context of a sequence adds to a step.
        prefill_vs_peer: speed to the first token as a multiple of vLLM's own attention's.
        sharing: ``MHA``, ``GQA``, ``MQA`` or ``MLA``, by the model's cache.
        perplexity: of the model on the text asked for, and its standard error.
        starts: of an engine that was alone, each of which is a sample; None where engines took
            turns.
    """

    benchmark: str
    case: dict[str, Any]
    implementation: str
    status: str = OK
    reason: str = ""
    error: float | None = None
    allowed: float | None = None
    kv_bytes: int = 0
    bytes: int = 0
    seconds: Spread | None = None
    floor_fraction: Spread | None = None
    bandwidth: float | None = None
    working_set: int = 0
    cold: bool | None = None
    vs_own_bf16: Spread | None = None
    vs_best_peer: Spread | None = None
    vs_first: Spread | None = None
    first_token: Spread | None = None
    top1: float | None = None
    kv_bytes_expected: int | None = None
    tokens_per_second: Spread | None = None
    running: int | None = None
    cache_tokens: int | None = None
    slope: Spread | None = None
    prefill_vs_peer: Spread | None = None
    starts: int | None = None
    sharing: str | None = None
    perplexity: float | None = None
    perplexity_error: float | None = None

    @property
    def key(self) -> tuple[str, str, str]:
        """The same in two runs for what can be compared."""
        return (self.benchmark, json.dumps(self.case, sort_keys=True), self.implementation)


@dataclass(frozen=True)
class Results:
    """Rows of one run, and what ran them.

    Attributes:
        machine: date, CPU, threads, versions. command: that was run.
    """

    command: str
    machine: dict[str, Any]
    rows: tuple[Row, ...]

    @property
    def wrong(self) -> list[Row]:
        return [row for row in self.rows if row.status == WRONG]

    def as_dicts(self) -> list[dict[str, Any]]:
        """One for each row, complete in itself."""
        head = {"command": self.command, "machine": self.machine}
        return [asdict(row) | head for row in self.rows]


def check_save(path: Path | None) -> None:
    """Refuse a file that cannot be added to, before the work.

    Raises:
        InputError: if it holds anything but rows of benchmarks, or cannot be written.
    """
    if path is None:
        return
    check_file(path, force=True)
    if path.is_file() and path.stat().st_size:
        first, last = _ends(path)
        for where, line in (("first", first), ("last", last)):
            _ROWS.parse(line, f"the {where} line of {path}")


def _ends(path: Path) -> tuple[bytes, bytes]:
    """The first and the last line."""
    with path.open("rb") as file:
        first = file.readline(_LONGEST_LINE)
        file.seek(max(0, path.stat().st_size - _LONGEST_LINE))
        end = file.read()
    if not end.endswith(b"\n"):
        raise InputError(f"{path} ends in half a line", "name a new file, or mend this one")
    return first, end.splitlines()[-1]


def save(results: Results, path: Path) -> None:
    """Add the rows to a file of JSON lines.

    Raises:
        InputError: if it holds anything else. WriteError: if it cannot be written.
    """
    check_save(path)
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in results.as_dicts()]
    append_text(path, "".join(lines))


def load(path: Path) -> list[Row]:
    """The rows of a file that ``save`` wrote; of equal cases the latest.

    Raises:
        InputError: if the file is missing, or holds something else.
    """
    rows = [_made(found) for _, found in _ROWS.lines(path)]
    if not rows:
        raise InputError(f"{path} is empty", _HOW)
    return list({row.key: row for row in rows}.values())


_HOW = "give files written by `kvfold bench attention`, `model` or `serve` with --save FILE"


@open_ended
class _Case(TypedDict):
    """What every case has; the rest is shown as it is."""

    num_kv_heads: Heads
    context: Annotated[int, Ge(1), Le(1 << 40)]
    batch: Annotated[int, Ge(1), Le(1 << 40)]
    head_dim: NotRequired[Heads]
    model: NotRequired[str]


@open_ended
class _Stored(TypedDict):
    """A line of a file of rows: a :class:`Row`, the machine and the command."""

    benchmark: Literal["attention", "model", "serve"]
    case: _Case
    implementation: str
    status: NotRequired[str]
    reason: NotRequired[str | None]
    error: NotRequired[Number | None]
    allowed: NotRequired[Number | None]
    kv_bytes: NotRequired[Count]
    bytes: NotRequired[Count]
    bandwidth: NotRequired[Number | None]
    working_set: NotRequired[Count]
    cold: NotRequired[bool | None]
    top1: NotRequired[Number | None]
    kv_bytes_expected: NotRequired[Count | None]
    seconds: NotRequired[StoredSpread | None]
    floor_fraction: NotRequired[StoredSpread | None]
    vs_own_bf16: NotRequired[StoredSpread | None]
    vs_best_peer: NotRequired[StoredSpread | None]
    vs_first: NotRequired[StoredSpread | None]
    first_token: NotRequired[StoredSpread | None]
    tokens_per_second: NotRequired[StoredSpread | None]
    slope: NotRequired[StoredSpread | None]
    prefill_vs_peer: NotRequired[StoredSpread | None]
    running: NotRequired[Count | None]
    cache_tokens: NotRequired[Count | None]
    starts: NotRequired[Count | None]
    sharing: NotRequired[str | None]
    perplexity: NotRequired[Number | None]
    perplexity_error: NotRequired[Number | None]


_ROWS = Document(_Stored, _HOW, error=InputError)


def _made(found: _Stored) -> Row:
    values: dict[str, Any] = {f.name: found[f.name] for f in fields(Row) if f.name in found}  # type: ignore[literal-required]
    for name in _SPREADS:
        if values.get(name) is not None:
            values[name] = Spread(**{**values[name], "samples": tuple(values[name]["samples"])})
    return Row(**values)
