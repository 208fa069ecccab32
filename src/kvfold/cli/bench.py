"""``kvfold bench``"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvfold.bench import readable
from kvfold.bench.cases import AttentionRequest
from kvfold.bench.model_cases import ModelRequest
from kvfold.bench.serving.request import ServeRequest
from kvfold.cli.options import Location
from kvfold.cli.output import emit, say
from kvfold.cli.parse import asks
from kvfold.names import printable

if TYPE_CHECKING:
    from kvfold.bench.compare import Change
    from kvfold.bench.results import Results, Row

_SHOWN: list[Callable[[Any], Any]] = [
    click.option("--save", type=Location(), help="Add the rows to a file (JSON lines)."),
    click.option("--markdown", is_flag=True, help="Print a Markdown table."),
    click.option("--json", "as_json", is_flag=True, help="Print one JSON document."),
]


def _shows(command: Any) -> Any:
    """What every benchmark can do with its results."""
    for option in reversed(_SHOWN):
        command = option(command)
    return command


@click.group("bench", no_args_is_help=False)
def command() -> None:
    """Measure speed, alternating with competitors.

    Every row says which part of this machine's read bandwidth it reached, measured in the same
    run. A result that is wrong gets no speed, and the exit code is 1.
    """


@command.command("attention", short_help="Time one decode step of one layer.")
@asks(AttentionRequest)
@_shows
def attention(request: AttentionRequest, save: Path | None, markdown: bool, as_json: bool) -> None:
    """Time one decode step of one layer: one query token over a full KV cache."""
    _check_output(save, markdown, as_json)

    from kvfold.bench.attention import run_attention
    from kvfold.cli.progress import progress_bar

    with progress_bar() as progress:
        results = run_attention(request, progress=progress)
    _finish(results, save, markdown, as_json, _attention_tables)


@command.command("model", short_help="Time whole models, side by side.")
@asks(ModelRequest)
@_shows
def model(request: ModelRequest, save: Path | None, markdown: bool, as_json: bool) -> None:
    """Time whole models in bf16: to the first token, and per token after it.

    Each PATH is a Hugging Face folder, a hub name, or a GGUF file. Ratios are to the first PATH
    with transformers' own cache and attention (sdpa).
    """
    _check_output(save, markdown, as_json)

    from kvfold.bench.model import run_model
    from kvfold.cli.progress import progress_bar

    with progress_bar() as progress:
        results = run_model(request, progress=progress)
    _finish(results, save, markdown, as_json, _model_tables)


@command.command("serve", short_help="Serve checkpoints through vLLM, side by side.")
@asks(ServeRequest)
@_shows
def serve(request: ServeRequest, save: Path | None, markdown: bool, as_json: bool) -> None:
    """Serve checkpoints through vLLM, with kvfold's attention and with its own, in turn.

    Each PATH is a folder. Decoding and prefill are measured apart, in engines without server and
    client; where decoding is measured, prompts are made up (--computed computes them). Ratios are
    to vLLM's own attention with its own cache, and to the first PATH served in the same way. Starts
    of one engine can differ by more than engines do: --starts tells them apart.
    """
    _check_output(save, markdown, as_json)

    from kvfold.bench.serving.run import run_serve
    from kvfold.cli.progress import progress_bar

    with progress_bar() as progress:
        results = run_serve(request, progress=progress)
    _finish(results, save, markdown, as_json, _serving_tables)


@command.command("compare", short_help="Compare two saved runs.")
@click.argument("before", metavar="A", type=Location())
@click.argument("after", metavar="B", type=Location())
@click.option("--markdown", is_flag=True, help="Print a Markdown table.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def compare(before: Path, after: Path, markdown: bool, as_json: bool) -> None:
    """Compare two files written with --save, case by case.

    What is compared is the fraction of the read bandwidth, so that two runs on a machine that
    was busy with other things can still be told apart.
    """
    from kvfold.bench.compare import compare_files

    _check_output(None, markdown, as_json)
    found = compare_files(before, after)
    emit(as_json, found.as_dict(), lambda: _print_changes(found.changes, markdown))
    for line in found.notes:
        say(f"note: {line}", err=True)


def _check_output(save: Path | None, markdown: bool, as_json: bool) -> None:
    from kvfold.bench.results import check_save
    from kvfold.errors import InputError

    check_save(save)
    if markdown and as_json:
        raise InputError("--markdown and --json exclude each other", "leave one of them out")


def _finish(
    results: "Results",
    path: Path | None,
    markdown: bool,
    as_json: bool,
    tables: "Callable[[Results, bool], None]",
) -> None:
    """Keep and print the results; complain of those that are wrong."""
    from kvfold.bench.results import save
    from kvfold.errors import RunError

    if path is not None:
        save(results, path)
    emit(as_json, results.as_dicts(), lambda: tables(results, markdown))
    for row in results.rows:
        if row.status == "skipped":
            say(f"skipped: {row.implementation}: {row.reason}", err=True)
    if results.wrong:
        worst = results.wrong[0]
        raise RunError(
            f"{len(results.wrong)} of {len(results.rows)} results are wrong, first "
            f"{worst.implementation} ({worst.reason})",
            "a wrong result has no speed; please report it with the command",
        )


def _attention_tables(results: "Results", markdown: bool) -> None:
    from kvfold.report.tables import size

    for first, rows in _grouped(results.rows, "num_kv_heads"):
        case = first.case
        title = (
            f"Context {case['context']:,}, batch {case['batch']}, "
            f"{case['num_heads']} query heads of {case['head_dim']}"
        )
        cells, before = list[list[str]](), None
        for row in rows:
            heads = row.case["num_kv_heads"]
            cells.append(
                [
                    str(heads) if heads != before or markdown else "",
                    row.implementation,
                    size(row.kv_bytes),
                    *_speed(row),
                    readable.times(row.vs_own_bf16),
                    readable.times(row.vs_best_peer),
                ]
            )
            before = heads
        columns = ["Hkv", "attention", "KV read", "step", "floor", "vs bf16", "vs peer"]
        _print(title, columns, cells, _attention_caption(results, rows), markdown)


def _attention_caption(results: "Results", rows: "list[Row]") -> str:
    bandwidth = readable.median([row.bandwidth for row in rows if row.bandwidth])
    cold = {True: "cold", False: "not cold", None: "cache size unknown"}[rows[0].cold]
    return (
        "Hkv: KV heads. step: median ± half the interquartile range. floor: the share of the step "
        "that reading the KV once takes, at the bandwidth measured in the same run "
        f"({bandwidth / 1e9:.1f} GB/s). vs bf16: speed as a multiple of kvfold bf16's; vs peer: "
        "of the fastest peer's (bf16 tensors). "
        f"Caches {cold}; {readable.machine(results)}"
    )


def _model_tables(results: "Results", markdown: bool) -> None:
    from kvfold.report.steps import sharing
    from kvfold.report.tables import size

    for first, rows in _grouped(results.rows, "model"):
        title = f"Context {first.case['context']:,}, batch {first.case['batch']}"
        cells, before = list[list[str]](), None
        for row in rows:
            name = f"{row.case['model']} ({row.case['num_heads']}:{row.case['num_kv_heads']})"
            expected = row.kv_bytes_expected
            speed = row.seconds
            cells.append(
                [
                    name if name != before or markdown else "",
                    row.implementation,
                    readable.seconds(row.first_token.median) if row.first_token else "",
                    readable.per_second(speed, row.case["batch"]) if speed else row.status.upper(),
                    readable.percent(row.floor_fraction),
                    readable.times(row.vs_first),
                    size(row.kv_bytes),
                    f"{row.kv_bytes / expected:.2f}" if expected else "",
                    f"{row.top1:.0%}" if row.top1 is not None else "",
                ]
            )
            before = name
        columns = ["model", "attention", "first", "tokens/s", "floor", "ratio", "KV", "of KV"]
        _print(title, [*columns, "top-1"], cells, _model_caption(results, rows), markdown)
    compared = sharing(results.rows)
    if compared is not None:
        title = "One model, its keys and values shared by more and more query heads"
        cells = [list(row) for row in compared.rows]
        _print(title, list(compared.columns), cells, compared.caption, markdown)


def _model_caption(results: "Results", rows: "list[Row]") -> str:
    bandwidth = readable.median([row.bandwidth for row in rows if row.bandwidth])
    return (
        "model (query heads:KV heads). first: time to the first token, one prefill. tokens/s: "
        "median ± half the interquartile range. floor: the share of a step that reading weights "
        f"and KV once takes, at the bandwidth measured in the same run ({bandwidth / 1e9:.1f} "
        "GB/s). ratio: speed as a multiple of the first row's. KV: bytes allocated; of KV: as a "
        "multiple of what the tokens need. top-1: the same choice as sdpa's. "
        f"{readable.machine(results)}"
    )


def _serving_tables(results: "Results", markdown: bool) -> None:
    tables = _grouped(results.rows, "model")
    for number, (first, rows) in enumerate(tables, 1):
        title = f"Context {first.case['context']:,}, {first.case['batch']} at once"
        cells, before = list[list[str]](), None
        for row in rows:
            name = f"{row.case['model']} ({row.case['num_heads']}:{row.case['num_kv_heads']})"
            cells.append([name if name != before or markdown else "", *_served(row)])
            before = name
        columns = ["model", "attention", "first", "ms", "tok/s", "vLLM", "1st", "µs", "holds"]
        caption = _serving_caption(results) if number == len(tables) else ""
        _print(title, columns, cells, caption, markdown)


def _served(row: "Row") -> list[str]:
    assert row.seconds is not None
    assert row.tokens_per_second is not None
    fewer = row.running != row.case["batch"]
    return [
        row.implementation,
        readable.seconds(row.first_token.median) if row.first_token else "",
        f"{1e3 * row.seconds.median:.3g} {readable.spread(row.seconds)}",
        f"{row.tokens_per_second.median:,.0f}" + (f" (by {row.running})" if fewer else ""),
        readable.times(row.vs_best_peer),
        readable.times(row.vs_first),
        f"{1e6 * row.slope.median:.2f}" if row.slope else "",
        f"{(row.cache_tokens or 0) / 1e3:.0f}k",
    ]


def _serving_caption(results: "Results") -> str:
    agreeing = min((row.top1 for row in results.rows if row.top1 is not None), default=None)
    same = "" if agreeing is None else f"First tokens as of vLLM's own: {agreeing:.0%} or more. "
    prefill = [
        row.prefill_vs_peer.median
        for row in results.rows
        if row.prefill_vs_peer and row.implementation.startswith("kvfold")
    ]
    if prefill:
        same += f"Prefill, of vLLM's own speed: {min(prefill):.2f}× to {max(prefill):.2f}×. "
    return (
        "model (query heads:KV heads). first: time to the first token of one request alone. ms: "
        "per token, a step that only decodes, median ± half the interquartile range. tok/s: of "
        "all requests, by as many at once as memory holds. vLLM, 1st: tok/s as a multiple of "
        "vLLM's own attention's, and of the first model's. µs: added to a step by each token of "
        f"context of each sequence. holds: tokens in the cache's memory. {_started(results)}{same}"
        f"vLLM {results.machine['vllm']}, {readable.machine(results)}"
    )


def _started(results: "Results") -> str:
    count = results.rows[0].starts
    return f"Each engine alone, started {count} times: a sample is a start. " if count else ""


def _print_changes(changes: "tuple[Change, ...]", markdown: bool) -> None:
    cases = [c.case for c in changes]
    cells = [
        [
            c.case if markdown or c.case not in cases[max(0, i - 1) : i] else "",
            c.implementation,
            readable.fraction(c.before),
            readable.fraction(c.after),
            f"{c.ratio:.2f}×" if c.ratio else "",
            c.verdict,
        ]
        for i, c in enumerate(changes)
    ]
    columns = ["case", "attention", "A", "B", "B/A", ""]
    caption = (
        "A, B: fraction of the floor, ± half the interquartile range. faster, slower: the "
        "interquartile ranges do not overlap."
    )
    _print("Fractions of the floor", columns, cells, caption, markdown)


def _grouped(rows: "tuple[Row, ...]", *inner: str) -> "list[tuple[Row, list[Row]]]":
    """Rows by what stands in a table's title: the case without the ``inner`` names."""
    groups: dict[str, list[Row]] = {}
    within = {*inner, "num_heads", "num_kv_heads"} if "model" in inner else set(inner)
    for row in rows:
        title = {name: value for name, value in row.case.items() if name not in within}
        groups.setdefault(str(title), []).append(row)
    return [(found[0], found) for found in groups.values()]


def _print(
    title: str, columns: list[str], rows: list[list[str]], caption: str, markdown: bool
) -> None:
    from kvfold.report.tables import print_table

    if not markdown:
        print_table(title, columns, rows, caption)
        return
    lines = [columns, ["---", "---", *["---:"] * (len(columns) - 2)], *rows]
    cells = [[printable(cell).replace("|", "\\|") for cell in line] for line in lines]
    table = "\n".join(f"| {' | '.join(line)} |" for line in cells)
    click.echo(f"### {printable(title)}\n\n{table}\n\n{printable(caption)}\n")


def _speed(row: "Row") -> list[str]:
    if row.seconds is None:
        return [row.status.upper(), ""]
    return [
        f"{readable.seconds(row.seconds.median)} {readable.spread(row.seconds)}",
        readable.percent(row.floor_fraction),
    ]
