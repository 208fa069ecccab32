"""``kvfold report``: everything measured about runs, in one HTML file that needs nothing else.

A run is a folder that ``convert``, ``heal`` or ``demo`` made, a file that ``bench --save`` wrote,
or what ``eval --json`` printed. The report begins with its verdict on the last model among them;
a section is a heading, pictures, and then tables and facts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvfold.arch.target import heads_or_latent
from kvfold.arguments import flag, location, several
from kvfold.checkpoint.records import DEMO_RECORD, QUALITY, DemoModel
from kvfold.documents import open_regular
from kvfold.errors import InputError
from kvfold.files import check_file, write_text
from kvfold.record import DEMO, METRICS, RECORD
from kvfold.report import made, scored, steps
from kvfold.report.page import Figure, Part, Section, embedded, render
from kvfold.report.tables import size
from kvfold.report.verdict import Evidence, verdict

_PLOT = "demo.svg"
_LARGEST_PLOT = 1 << 23  # bytes; the demo's own has 60,000


def write_report(runs: Sequence[str | Path], out: Path, *, force: bool = False) -> None:
    """Write the report of some runs to ``out``.

    Raises:
        InputError: for something that is no run, or if ``out`` exists and ``force`` is false.

    >>> write_report(["healed", "bench.jsonl"], Path("report.html"))  # doctest: +SKIP
    """
    out = location(out, "--out")
    check_file(out, force=flag(force, "force"))
    paths = several(runs, "RUN", location)
    if not paths:
        raise InputError("no runs to report on", "name one or more folders")
    for path in (path for run in paths for path in _what_is_read(run)):
        if out.exists() and path.exists() and out.samefile(path):
            raise InputError(f"{out} is read for the report", "choose another file to write")
    found = Evidence()
    sections: list[Section] = []
    for run in paths:
        kind = _kind(run)
        sections += kind.sections(run)
        kind.evidence(run, found)
    sections.sort(key=lambda section: section.details)
    write_text(out, render("kvfold report", sections, verdict(found)), force=force)


def _what_is_read(run: Path) -> list[Path]:
    return [run, *(run / name for name in (RECORD, METRICS, DEMO, _PLOT))]


@dataclass(frozen=True)
class _Kind:
    """What is shown of one kind of run, and what it adds to the verdict."""

    sections: Callable[[Path], list[Section]]
    evidence: Callable[[Path, Evidence], None]


def _kind(run: Path) -> _Kind:
    """What sort of run it is.

    Raises:
        InputError: if it left no record.
    """
    if (run / RECORD).is_file():
        return _CHECKPOINT
    if (run / DEMO).is_file():
        return _DEMO
    if run.is_file():
        return _EVALUATION if scored.is_evaluation(run) else _BENCHMARK
    raise InputError(
        f"{run} holds no record of a run",
        "give a folder made by kvfold convert, heal or demo, a file of kvfold bench --save, or "
        "what kvfold eval --json printed",
    )


def _of_demo(run: Path) -> list[Section]:
    record = DEMO_RECORD.read(run / DEMO)
    for number, row in enumerate(record["rows"]):
        QUALITY.check({**row["quality"], "name": row["method"]}, f"{run / DEMO}, row {number}")
    rows = [{**row["quality"], "name": _demo_name(row)} for row in record["rows"]]
    parts: list[Part] = []
    if (run / _PLOT).is_file():
        # As an image, not as a part of the page: whoever wrote it, nothing in it is run or fetched.
        plot = embedded(_plot(run / _PLOT), "image/svg+xml", "the demo's plot")
        parts.append(Figure(plot, "Perplexity against the size of the KV cache."))
    command = f"$ kvfold demo --seed {record['seed']} --out {run.name}"
    return [Section(f"Demo: {run.name}", [*parts, scored.table(rows), command])]


def _demo_name(row: DemoModel) -> str:
    return f"{row['method']}, {heads_or_latent(row['kv_heads'], row.get('latent')).label}"


def _plot(path: Path) -> bytes:
    with open_regular(path, "run kvfold demo again") as file:
        found = file.read(_LARGEST_PLOT + 1)
    if len(found) > _LARGEST_PLOT:
        raise InputError(f"{path} is larger than {size(_LARGEST_PLOT)}", "run kvfold demo again")
    return found


_CHECKPOINT = _Kind(made.checkpoint, made.evidence)
_DEMO = _Kind(_of_demo, lambda run, found: None)
_EVALUATION = _Kind(scored.evaluation, scored.evidence)
_BENCHMARK = _Kind(steps.benchmark, steps.evidence)
