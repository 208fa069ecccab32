"""Measured decoding steps in a report."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvfold.report.figures import decode_times
from kvfold.report.page import Figure, Part, Section, Table
from kvfold.report.verdict import Evidence

if TYPE_CHECKING:
    from kvfold.bench.results import Row
    from kvfold.bench.timing import Spread

_CAPTIONS = {
    "attention": "One decoding step of one layer against context, with the time that reading the "
    "16-bit cache once takes at the bandwidth of the same run (dashed).",
    "model": "One decoding step of a whole model against context, with the time that reading its "
    "weights and its 16-bit cache once takes at the bandwidth of the same run (dashed).",
}


def benchmark(path: Path) -> list[Section]:
    """The section of a file that ``bench --save`` wrote.

    Raises:
        InputError: if it is none.
    """
    from kvfold.bench.results import load

    rows = load(path)
    parts: list[Part] = []
    for name, caption in _CAPTIONS.items():
        measured = [row for row in rows if row.benchmark == name and row.seconds]
        if measured:
            parts.append(Figure(decode_times(measured), caption))
    compared = sharing([row for row in rows if row.benchmark == "model"])
    parts += [compared] if compared else []
    for name in _CAPTIONS:
        measured = [row for row in rows if row.benchmark == name]
        if measured:
            parts.append(_measured(measured))
    return [Section(f"Benchmark: {path.name}", parts)]


def evidence(path: Path, found: Evidence) -> None:
    """Add steps of whole models to what is known of the last model."""
    from kvfold.bench.results import load

    found.steps += [row for row in load(path) if row.benchmark == "model"]


def _measured(rows: "Sequence[Row]") -> Table:
    models = rows[0].benchmark == "model"
    columns = ["case", "implementation", "step, ms", "of floor"]
    columns += ["× first row", "first token, s", "KV, MiB"] if models else ["× best peer"]
    cells = []
    for row in rows:
        step = row.status
        if row.seconds:
            half = (row.seconds.high - row.seconds.low) / 2
            step = f"{1e3 * row.seconds.median:.3g} ± {1e3 * half:.2g}"
        own = [_case(row.case), row.implementation, step, _median(row.floor_fraction, ".0%")]
        if models:
            own += [_median(row.vs_first, ".2f"), _median(row.first_token, ".2f")]
            own += [f"{row.kv_bytes / (1 << 20):.4g}" if row.kv_bytes else ""]
        else:
            own += [_median(row.vs_best_peer, ".2f")]
        cells.append(own)
    return Table(columns, cells, "± half the interquartile range.")


def _median(spread: "Spread | None", form: str) -> str:
    return format(spread.median, form) if spread else ""


def _case(case: dict[str, Any]) -> str:
    """A benchmark's case in a few words."""
    words = {"num_heads": "query heads", "num_kv_heads": "KV heads", "head_dim": "numbers each",
             "context": "tokens", "batch": "sequences"}  # fmt: skip

    def phrase(name: str, value: Any) -> str:
        if not isinstance(value, int):
            return str(value)
        word = words.get(name, name)
        return f"{value:,} {word.removesuffix('s') if value == 1 else word}"

    return ", ".join(phrase(name, value) for name, value in case.items())


def sharing(rows: "Sequence[Row]") -> Table | None:
    """MHA, GQA, MQA and MLA of a model, a line each; None unless their perplexity was measured.

    Of each case the speed of the fastest of the model's implementations.
    """
    timed = [row for row in rows if row.perplexity and row.seconds and row.status == "ok"]
    cases = list(dict.fromkeys((row.case["context"], row.case["batch"]) for row in timed))
    if not timed:
        return None
    columns = ["", "KV heads", *(f"{n:,} × {batch}" for n, batch in cases), "GB", "perplexity"]
    cells = []
    for name in dict.fromkeys(row.case["model"] for row in timed):
        own = [row for row in timed if row.case["model"] == name]
        speeds = [_fastest(own, case) for case in cases]
        cells.append([
            f"{own[0].sharing}: {name}",
            f"{own[0].case['num_kv_heads']}",
            *speeds,
            f"{max(row.bytes for row in own) / 1e9:.2f}",
            f"{own[0].perplexity:.2f} ± {own[0].perplexity_error or 0:.2f}",
        ])  # fmt: skip
    return Table(
        columns,
        cells,
        "Tokens per second at so many tokens of context × sequences, by the fastest cache and "
        "attention of each. GB: weights and the cache of the largest case in 16 bits.",
    )


def _fastest(rows: "Sequence[Row]", case: tuple[int, int]) -> str:
    own = [row for row in rows if (row.case["context"], row.case["batch"]) == case]
    speeds = [case[1] / row.seconds.median for row in own if row.seconds]
    return f"{max(speeds):.3g}" if speeds else ""
