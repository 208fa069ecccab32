"""``kvfold report``: everything measured about runs, in one HTML file that needs nothing else.

A run is a folder that ``convert``, ``heal`` or ``demo`` made, or a file that ``bench --save``
wrote. A section is a heading, facts, tables and plots; how they look is decided here alone.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvfold.arch.target import heads_or_latent
from kvfold.arguments import flag, location, several
from kvfold.checkpoint.records import DEMO_RECORD, FOLDING, HEALING, QUALITY, RECORDS, DemoModel
from kvfold.documents import open_regular
from kvfold.errors import InputError
from kvfold.files import check_file, write_text
from kvfold.fold.record import cached_numbers
from kvfold.healing.watch import read_metrics
from kvfold.record import DEMO, METRICS, RECORD
from kvfold.report.figures import (
    captured_energy,
    decode_times,
    drift,
    healing_curve,
    kv_memory,
    layer_errors,
)
from kvfold.report.page import Figure, Section, Table, embedded, render
from kvfold.report.tables import size

if TYPE_CHECKING:
    from kvfold.bench.results import Row
    from kvfold.bench.timing import Spread

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
    folders = several(runs, "RUN", location)
    if not folders:
        raise InputError("no runs to report on", "name one or more folders")
    for path in (path for run in folders for path in _what_is_read(run)):
        if out.exists() and path.exists() and out.samefile(path):
            raise InputError(f"{out} is read for the report", "choose another file to write")
    sections = [section for run in folders for section in sections_of(run)]
    write_text(out, render("kvfold report", sections), force=force)


def _what_is_read(run: Path) -> list[Path]:
    return [run, *(run / name for name in (RECORD, METRICS, DEMO, _PLOT))]


def sections_of(run: Path) -> list[Section]:
    """The sections of one run.

    Raises:
        InputError: if it left no record.
    """
    if (run / RECORD).is_file():
        return _of_checkpoint(run)
    if (run / DEMO).is_file():
        return [_of_demo(run)]
    if run.is_file():
        return _of_bench(run)
    raise InputError(
        f"{run} holds no record of a run",
        "give a folder made by kvfold convert, heal or demo, or a file of kvfold bench --save",
    )


# -- checkpoints ----------------------------------------------------------------------------


def _of_checkpoint(run: Path) -> list[Section]:
    path = run / RECORD
    record = RECORDS.read(path)
    sections = []
    if "geometry" in record:
        sections.append(_folding(run.name, dict(FOLDING.check(record, str(path)))))
    if "heal" in record:
        heal = HEALING.check(record["heal"], f"{path}, of healing")
        sections.append(_healing(run, dict(heal)))
    return sections


def _folding(name: str, record: dict[str, Any]) -> Section:
    geometry = record["geometry"]
    before, after = cached_numbers(geometry)
    cache = geometry["kv_bytes_per_token_16bit"]
    calibration = record.get("calibration")
    text = "none"
    if calibration:
        text = f"{calibration['tokens']:,} tokens of {', '.join(calibration['texts'])}"
    facts = [
        ("source", record["source"]["name"]),
        ("query heads", str(geometry["num_heads"])),
        ("KV heads", f"{before} → {after}"),
        ("KV cache per token, 16 bit", f"{size(cache['source'])} → {size(cache['folded'])}"),
        ("method, fit", f"{record['method']}, {record['fit']}"),
        ("calibration", text),
        ("time, peak memory", f"{record['run']['seconds']:.0f} s, "
                              f"{size(record['run']['peak_memory_bytes'])}"),
    ]  # fmt: skip
    parts: list[Table | Figure | str] = [Table(["", ""], facts)]
    parts += [f"Warning: {warning}." for warning in record.get("warnings", [])]
    layers = [row for row in record["layers"] if {"captured_value", "captured_key"} <= row.keys()]
    if layers:
        parts.append(Figure(
            captured_energy(layers),
            "Energy that the shared heads keep of the source's keys and values, by layer. What is "
            "missing is what fitting and healing must make good.",
        ))  # fmt: skip
    if any(layer["stages"] for layer in layers):
        parts.append(Figure(
            layer_errors(layers),
            "Error of each layer's output as a share of what the layer adds (median over tokens), "
            "after each stage.",
        ))  # fmt: skip
    drifted = [layer for layer in record["layers"] if layer.get("drift") is not None]
    if drifted:
        parts.append(Figure(
            drift(drifted),
            "Drift: how far the hidden states after each layer are from the source's, as a share "
            "of their length (median over tokens).",
        ))  # fmt: skip
    parts.append(Figure(
        kv_memory(cache["source"], cache["folded"]),
        "KV cache of one sequence in 16 bits against its length.",
    ))  # fmt: skip
    parts.append(_code(record["command"]))
    return Section(f"Folding: {name}", parts)


def _healing(run: Path, heal: dict[str, Any]) -> Section:
    request = heal["request"]
    facts = [
        ("stages", ", ".join(request["stages"])),
        ("tokens", f"{request['tokens']:,} in {heal['steps']:,} updates"),
        ("trained", request["train"] + (", LoRA" if request["lora_rank"] else "")),
        ("peak learning rate", f"{request['lr']:g} (attention), {request['lr_rest']:g} (rest)"),
        ("time", f"{heal['run']['seconds']:.0f} s on {heal['run']['device']}, "
                 f"{heal['run']['processes']} process(es)"),
    ]  # fmt: skip
    parts: list[Table | Figure | str] = [Table(["", ""], facts), _quality(heal["quality"])]
    if (run / METRICS).is_file():
        rows = read_metrics(run / METRICS)
        if rows:
            parts.append(Figure(healing_curve(rows), "Divergence from the source while healing."))
    parts.append(_code(heal["command"]))
    return Section(f"Healing: {run.name}", parts)


def _quality(rows: Sequence[dict[str, Any]]) -> Table:
    columns = ["text", "model", "perplexity", "nats lost", "KL", "KL p95", "KL p99", "top-1"]
    return Table(
        columns,
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


# -- demo and benchmarks --------------------------------------------------------------------


def _of_demo(run: Path) -> Section:
    record = DEMO_RECORD.read(run / DEMO)
    for number, row in enumerate(record["rows"]):
        QUALITY.check({**row["quality"], "name": row["method"]}, f"{run / DEMO}, row {number}")
    rows = [{**row["quality"], "name": _demo_name(row)} for row in record["rows"]]
    parts: list[Table | Figure | str] = []
    if (run / _PLOT).is_file():
        # As an image, not as a part of the page: whoever wrote it, nothing in it is run or fetched.
        plot = embedded(_plot(run / _PLOT), "image/svg+xml", "the demo's plot")
        parts.append(Figure(plot, "Perplexity against the size of the KV cache."))
    parts.append(_quality(rows))
    parts.append(_code(f"kvfold demo --seed {record['seed']} --out {run.name}"))
    return Section(f"Demo: {run.name}", parts)


def _demo_name(row: DemoModel) -> str:
    return f"{row['method']}, {heads_or_latent(row['kv_heads'], row.get('latent')).label}"


def _of_bench(path: Path) -> list[Section]:
    from kvfold.bench.results import load

    rows = load(path)
    parts: list[Table | Figure | str] = []
    for benchmark, caption in _STEPS.items():
        measured = [row for row in rows if row.benchmark == benchmark and row.seconds]
        if measured:
            parts.append(Figure(decode_times(measured), caption))
    for benchmark in _STEPS:
        measured = [row for row in rows if row.benchmark == benchmark]
        if measured:
            parts.append(_measured(measured))
    return [Section(f"Benchmark: {path.name}", parts)]


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


_STEPS = {
    "attention": "One decoding step of one layer against context, with the time that reading the "
    "16-bit cache once takes at the bandwidth of the same run (dashed).",
    "model": "One decoding step of a whole model against context, with the time that reading its "
    "weights and its 16-bit cache once takes at the bandwidth of the same run (dashed).",
}


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


def _code(command: str) -> str:
    return f"$ {command}"


def _plot(path: Path) -> bytes:
    with open_regular(path, "run kvfold demo again") as file:
        found = file.read(_LARGEST_PLOT + 1)
    if len(found) > _LARGEST_PLOT:
        raise InputError(f"{path} is larger than {size(_LARGEST_PLOT)}", "run kvfold demo again")
    return found
