"""The demo's plot: quality against KV cache size."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from kvfold.demo.result import DemoRow
from kvfold.report.picture import save
from kvfold.report.tables import size

# Okabe and Ito's colours, told apart by colour-blind readers; markers tell them apart in grey.
_STYLES = (
    {"color": "#D55E00", "marker": "s"},
    {"color": "#009E73", "marker": "^"},
    {"color": "#0072B2", "marker": "o"},
    {"color": "#CC79A7", "marker": "D"},
)
_INK, _GREY = "#222222", "#666666"
_LOG_BEYOND = 3.0  # largest over smallest perplexity where a linear axis hides the small ones
_LABEL_GAP = 0.06  # of the axes' height


@dataclass(frozen=True)
class _Line:
    label: str
    sizes: list[int]
    values: list[float]
    errors: list[float]


def plot_demo(rows: Sequence[DemoRow], path: Path, seed: int = 0) -> None:
    """Draw perplexity against KV bytes per token, as ``path`` (PNG) and an SVG beside it.

    Args:
        rows: the source first, then its folds, as :func:`kvfold.demo.run.run_demo` orders them.

    >>> plot_demo(run_demo(Path("out")).rows, Path("demo.png"))  # doctest: +SKIP
    """
    source, lines = rows[0], _lines(rows)
    figure = Figure(figsize=(7.6, 4.9))
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.095, 0.215, 0.875, 0.615))
    for line, style in zip(lines, _STYLES, strict=False):
        _draw(axes, line, style)
    _size_axis(axes, rows)
    _quality_axis(axes, lines)
    _source_line(axes, source)
    _end_labels(axes, lines)
    _words(figure, rows, seed)
    with matplotlib.rc_context({"svg.hashsalt": "kvfold"}):  # the same bytes each time
        save(figure, path)
        save(figure, path.with_suffix(".svg"))


def _lines(rows: Sequence[DemoRow]) -> list[_Line]:
    """One line per method, from the smallest cache up to the source.

    Errors are those of the paired difference from the source: all models read the same
    windows, so what makes a window hard for all of them is no doubt about their difference.
    """
    source = rows[0].quality
    lines = []
    for label in dict.fromkeys(row.method for row in rows[1:]):
        own = sorted(
            (row.quality for row in rows[1:] if row.method == label),
            key=lambda quality: quality.kv_bytes_per_token,
        )
        points = [*own, source]
        lines.append(
            _Line(
                label,
                [point.kv_bytes_per_token for point in points],
                [point.perplexity for point in points],
                [source.perplexity * point.ratio_error for point in points],
            )
        )
    return lines


def _draw(axes: Axes, line: _Line, style: dict[str, str]) -> None:
    axes.errorbar(
        line.sizes,
        line.values,
        yerr=line.errors,
        linewidth=2,
        markersize=6.5,
        markeredgecolor="white",
        elinewidth=1.2,
        capsize=3,
        **style,  # type: ignore[arg-type]
    )


def _size_axis(axes: Axes, rows: Sequence[DemoRow]) -> None:
    heads = {row.quality.kv_bytes_per_token: row.kv_heads for row in rows if not row.latent}
    ticks = sorted(heads)
    axes.set_xscale("log", base=2)
    axes.set_xlim(ticks[0] / 2.2, ticks[-1] * 1.25)  # room for the labels at the left
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    most = max(heads.values())
    axes.set_xticklabels([f"{size(tick)}\n{_heads(heads[tick], most)}" for tick in ticks])
    axes.set_xlabel("KV cache per token (float16), and KV heads of that size", color=_INK)
    axes.tick_params(colors=_INK, length=3)


def _heads(number: int, most: int) -> str:
    kind = " (MHA)" if number == most else " (MQA)" if number == 1 else ""
    return f"{number} head{'' if number == 1 else 's'}{kind}"


def _quality_axis(axes: Axes, lines: Sequence[_Line]) -> None:
    values = [value for line in lines for value in line.values]
    least, most = min(values), max(values)
    if most > _LOG_BEYOND * least:
        axes.set_yscale("log")
        axes.set_ylim(least / 1.12, most * 1.2)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        spread = max(most - least, 1e-3 * most)
        axes.set_ylim(least - 0.12 * spread, most + 0.12 * spread)
        axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    scale = " (log scale)" if axes.get_yscale() == "log" else ""
    axes.set_ylabel(f"perplexity on held-out text{scale}", color=_INK)
    axes.grid(axis="y", color="#E3E3E3", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _source_line(axes: Axes, source: DemoRow) -> None:
    value = source.quality.perplexity
    axes.axhline(value, color=_GREY, linestyle=(0, (4, 3)), linewidth=1.2, zorder=1)
    axes.annotate(
        f"source: {value:.3g}",
        (1, value),
        xycoords=("axes fraction", "data"),
        xytext=(0, -4),
        textcoords="offset points",
        ha="right",
        va="top",
        color=_GREY,
        fontsize=9,
    )


def _end_labels(axes: Axes, lines: Sequence[_Line]) -> None:
    """Name each line at its left end, nudged apart where ends are close."""
    to_axes = axes.transData + axes.transAxes.inverted()
    ends = [to_axes.transform((line.sizes[0], line.values[0])) for line in lines]
    heights = _spread([float(end[1]) for end in ends], _LABEL_GAP)
    for line, style, end, height in zip(lines, _STYLES, ends, heights, strict=False):
        axes.text(
            float(end[0]) - 0.016,
            height,
            f"{line.label}: {line.values[0]:.3g}",
            transform=axes.transAxes,
            color=style["color"],
            ha="right",
            va="center",
            fontsize=10,
            fontweight="bold",
        )


def _spread(positions: Sequence[float], gap: float) -> list[float]:
    """Move positions up as little as keeps them ``gap`` apart, in their order.

    >>> [round(x, 2) for x in _spread([0.5, 0.1, 0.52], 0.1)]
    [0.5, 0.1, 0.6]
    """
    placed = list(positions)
    last = float("-inf")
    for index in sorted(range(len(placed)), key=placed.__getitem__):
        last = placed[index] = max(placed[index], last + gap)
    return placed


def _words(figure: Figure, rows: Sequence[DemoRow], seed: int) -> None:
    title: dict[str, Any] = {"ha": "left", "va": "top", "color": _INK}
    figure.text(0.02, 0.965, finding(rows), fontsize=11.5, fontweight="bold", **title)
    quality = rows[0].quality
    figure.text(
        0.02,
        0.905,
        f"A small Llama trained on Python's documentation; {quality.tokens:,} held-out tokens",
        fontsize=10,
        **title,
    )
    footer = (
        f"kvfold demo --seed {seed}    "
        "Bars: one standard error of the paired difference from the source."
    )
    figure.text(0.02, 0.025, footer, fontsize=8, color=_GREY, ha="left", va="bottom")


def finding(rows: Sequence[DemoRow]) -> str:
    """The plot's title: what the largest fold cost, by the best and by the worst method."""
    source = rows[0]
    least = min(row.quality.kv_bytes_per_token for row in rows)
    smallest = [row for row in rows[1:] if row.quality.kv_bytes_per_token == least]
    best = min(smallest, key=lambda row: row.quality.perplexity)
    worst = max(smallest, key=lambda row: row.quality.perplexity)
    factor = source.quality.kv_bytes_per_token / best.quality.kv_bytes_per_token
    return (
        f"{'An' if factor == 8 else 'A'} {factor:g}\N{MULTIPLICATION SIGN} smaller KV cache costs "
        f"{best.quality.nats_lost:.2f} nats per token with {best.method}, "
        f"{worst.quality.nats_lost:.2f} with {worst.method}"
    )
