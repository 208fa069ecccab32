"""What was measured of quality, in a report: the picture and the table."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kvfold.checkpoint.records import EVALUATION, QUALITIES
from kvfold.documents import open_regular, read_bytes
from kvfold.report.figures import quality_path
from kvfold.report.page import Figure, Part, Section, Table
from kvfold.report.verdict import Evidence

_COLUMNS = ("text", "model", "perplexity", "nats lost", "KL", "KL p95", "KL p99", "top-1")


def is_evaluation(path: Path) -> bool:
    """Whether a file holds what ``eval --json`` prints, rather than lines of benchmarks."""
    with open_regular(path, _HINT) as file:
        start = file.read(4096).lstrip()
    return start.startswith(b"[") or (start.startswith(b"{") and b'"texts"' in start[:64])


_LARGEST = EVALUATION.largest
_HINT = EVALUATION.hint


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The rows of an evaluation of texts.

    Raises:
        InputError: if it is none.
    """
    return _read(path)[0]


def _read(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What a file has of texts, and of pass keys."""
    data = read_bytes(path, _LARGEST, _HINT)
    if data.lstrip().startswith(b"["):
        return [dict(row) for row in QUALITIES.parse(data, str(path))], []
    found = EVALUATION.parse(data, str(path))
    return [dict(row) for row in found["texts"]], [dict(row) for row in found.get("needles", ())]


def evaluation(path: Path) -> list[Section]:
    """The section of a file that ``eval --json`` printed."""
    texts, needles = _read(path)
    parts = quality(texts) if texts or not needles else []
    return [Section(f"Evaluation: {path.name}", [*parts, *pass_keys(needles)])]


def pass_keys(rows: Sequence[Mapping[str, Any]]) -> list[Part]:
    """Pass keys found, and nats of the right answer, by depth; a table for each length."""
    return [
        Table(
            ("model and cache", *columns),
            body,
            f"Pass keys hidden in {tokens:,} tokens: the share found, and nats per token of the "
            "key. Read, kept: caches that read or keep such a share.",
        )
        for tokens, columns, body in by_depth(rows)
    ]


def by_depth(
    rows: Sequence[Mapping[str, Any]],
) -> Iterator[tuple[int, list[str], list[list[str]]]]:
    """For each length its depths, and a row of cells for each name."""
    for tokens in dict.fromkeys(row["tokens"] for row in rows):
        own = [row for row in rows if row["tokens"] == tokens]
        depths = list(dict.fromkeys(row["depth"] for row in own))
        cells = {(r["name"], r["depth"]): f"{r['found']:.0%}, {r['nats']:.2f}" for r in own}
        names = dict.fromkeys(row["name"] for row in own)
        body = [[name, *(cells.get((name, depth), "") for depth in depths)] for name in names]
        yield tokens, [f"at {depth:.0%}" for depth in depths], body


def evidence(path: Path, found: Evidence) -> None:
    """Add an evaluation to what is known of the last model, which is the last of its own."""
    rows = rows_of(path)
    if rows:
        found.name, found.quality = rows[-1]["name"], rows
        found.cache = (rows[0]["kv_bytes_per_token"], rows[-1]["kv_bytes_per_token"])


def quality(rows: Sequence[Mapping[str, Any]]) -> list[Part]:
    """What an evaluation found: nats lost from model to model, and the whole table."""
    parts: list[Part] = []
    if len({row["name"] for row in rows}) > 1:
        parts.append(Figure(
            quality_path(rows),
            "Nats per token lost against the first model, ± one standard error over windows: less "
            "is better, 0.69 doubles the perplexity. Pale: what a stage won back.",
        ))  # fmt: skip
    return [*parts, table(rows)]


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Every model on every text."""
    return Table(
        _COLUMNS,
        [
            [
                row["text"],
                row["name"],
                f"{row['perplexity']:.2f} ± {row['perplexity_error']:.2f}",
                f"{row['nats_lost']:.3f} ± {row['nats_lost_error']:.3f}",
                f"{row['kl']:.3f} ± {row['kl_error']:.3f}",
                f"{row['kl_p95']:.2f}",
                f"{row['kl_p99']:.2f}",
                f"{row['top1']:.1%}",
            ]
            for row in rows
        ],
        "± one standard error over windows. Nats lost per token are paired with the source's; "
        "0.69 doubles the perplexity. KL is from the source; p95, p99: percentiles over tokens.",
    )
