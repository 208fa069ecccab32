"""The report's drawings, each a function from numbers to SVG."""

import io
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from kvfold.report.healing import draw_healing
from kvfold.report.labels import any_letters, label
from kvfold.report.tables import size

if TYPE_CHECKING:
    from kvfold.bench.results import Row

# Okabe and Ito's colours, told apart by colour-blind readers; markers tell them apart in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_LETTERS_ABREAST = 24  # names of more are set aslant


def captured_energy(layers: Sequence[dict[str, Any]]) -> str:
    """Energy kept of keys and values, layer by layer."""
    figure, axes = _new()
    index = [layer["layer"] for layer in layers]
    for name, legend, colour, marker in (
        ("captured_key", "keys", COLOURS[0], "o"),
        ("captured_value", "values", COLOURS[1], "s"),
    ):
        kept = [100 * layer[name] for layer in layers]
        axes.plot(index, kept, color=colour, marker=marker, label=legend)
    axes.set_ylim(top=101)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _label(axes, "layer", "energy kept, %")
    return _svg(figure)


def layer_errors(layers: Sequence[dict[str, Any]]) -> str:
    """The error before fitting and after each stage, layer by layer."""
    figure, axes = _new()
    fitted = [layer for layer in layers if layer["stages"]]
    index = [layer["layer"] for layer in fitted]
    first = [layer["stages"][0]["error_before"] for layer in fitted]
    axes.plot(index, first, color="#999999", marker="x", label="folded")
    for number in range(max(len(layer["stages"]) for layer in fitted)):
        having = [layer for layer in fitted if len(layer["stages"]) > number]
        index = [layer["layer"] for layer in having]
        after = [layer["stages"][number]["error_after"] for layer in having]
        name = label(having[0]["stages"][number]["stage"].replace("_", " "))
        axes.plot(index, after, color=COLOURS[number], marker=MARKERS[number], label=name)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _label(axes, "layer", "error, share of what the layer adds")
    return _svg(figure)


def drift(layers: Sequence[dict[str, Any]]) -> str:
    """How far the hidden states have come from the source's, layer by layer."""
    figure, axes = _new()
    index = [layer["layer"] for layer in layers]
    far = [100 * layer["drift"] for layer in layers]
    axes.plot(index, far, color=COLOURS[0], marker="o", label="after fitting")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _label(axes, "layer", "distance from the source's, %")
    return _svg(figure)


def kv_memory(source: int, folded: int) -> str:
    """Cache size against context for both models; bytes per token in 16 bits."""
    figure, axes = _new()
    contexts = [2**power for power in range(10, 18)]
    for per_token, legend, colour, marker in (
        (source, "source", COLOURS[1], "s"),
        (folded, "folded", COLOURS[0], "o"),
    ):
        held = [per_token * context for context in contexts]
        axes.plot(contexts, held, color=colour, marker=marker, label=legend)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(_tokens))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: size(value)))
    _label(axes, "context, tokens", "KV cache")
    return _svg(figure)


def quality_path(rows: Sequence[Mapping[str, Any]]) -> str:
    """Nats lost by every model but the first, in their order: a panel for each text."""
    texts = list(dict.fromkeys(row["text"] for row in rows))
    figure = Figure(figsize=(max(7.6, 2.9 * len(texts)), 3.8), layout="constrained")
    FigureCanvasSVG(figure)
    panels = figure.subplots(1, len(texts), sharey=True, squeeze=False)[0]
    for axes, text in zip(panels, texts, strict=True):
        _path(axes, [row for row in rows if row["text"] == text][1:])
        axes.set_title(label(text), fontsize=11)
    panels[0].set_ylabel("nats lost per token")
    return _svg(figure)


def _path(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """A bar for what each model loses, and above it in grey what it wins back of the one before."""
    lost = [row["nats_lost"] for row in rows]
    places = range(len(rows))
    for place, (before, after) in enumerate(pairwise(lost), 1):
        if before > after:
            axes.bar(place, before - after, 0.7, after, color="#e3e3e3")
            axes.plot([place - 0.35, place + 0.35], [before] * 2, ":", color="#666666")
    axes.bar(
        places, lost, 0.7, color=[COLOURS[place % 7] for place in places],
        yerr=[row["nats_lost_error"] for row in rows], ecolor="#222222", capsize=3,
    )  # fmt: skip
    for place, row in enumerate(rows):
        top = row["nats_lost"] + row["nats_lost_error"]
        axes.annotate(
            f"{row['nats_lost']:.2f}", (place, top), (0, 3), textcoords="offset points",
            ha="center", fontsize=11,
        )  # fmt: skip
    names = [label(row["name"]) for row in rows]
    crowded = sum(map(len, names)) > _LETTERS_ABREAST
    axes.set_xticks(
        places, names, rotation=20 if crowded else 0, ha="right" if crowded else "center"
    )
    axes.margins(y=0.15)
    axes.axhline(0, color="#222222", linewidth=0.8)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.tick_params(axis="x", length=0)
    axes.grid(axis="y", color="#e3e3e3")
    axes.set_axisbelow(True)


def healing_curve(rows: Sequence[dict[str, Any]]) -> str:
    """KL from the source on each text, against tokens healed."""
    figure, axes = _new()
    draw_healing(axes, rows)
    return _svg(figure)


def decode_times(rows: "Sequence[Row]") -> str:
    """Step time against context, a panel for each shape or model, the floor drawn in."""
    titles = list(dict.fromkeys(_title(row) for row in rows))
    columns = min(3, len(titles))
    lines = -(-len(titles) // columns)
    figure = Figure(figsize=(3.4 * columns + 0.6, 3.1 * lines), layout="constrained")
    FigureCanvasSVG(figure)
    panels = figure.subplots(lines, columns, sharey=True, squeeze=False).flatten()
    names = list(dict.fromkeys(row.implementation for row in rows))
    for axes, title in zip(panels, titles, strict=False):
        _steps(axes, [row for row in rows if _title(row) == title], names)
        axes.set_title(label(title), fontsize=10)
    for axes in panels[len(titles) :]:
        axes.set_visible(False)
    found = [axes.get_legend_handles_labels() for axes in panels]
    every = {name: handle for pair in found for handle, name in zip(*pair, strict=True)}
    figure.legend(
        every.values(), every.keys(), loc="outside lower center", ncols=4, frameon=False, fontsize=9
    )
    return _svg(figure)


def _title(row: "Row") -> str:
    """What distinguishes cases besides their context."""
    case = row.case
    heads = f"{case['num_kv_heads']} KV head{'s' if case['num_kv_heads'] > 1 else ''}"
    what = f"{case['model']}, {heads}" if "model" in case else f"{heads} of {case['head_dim']}"
    return what + (f", batch {case['batch']}" if case["batch"] > 1 else "")


def _steps(axes: Axes, rows: "Sequence[Row]", names: Sequence[str]) -> None:
    for number, name in enumerate(names):
        points = sorted(
            (row.case["context"], 1e3 * row.seconds.median)
            for row in rows
            if row.implementation == name and row.seconds
        )
        if points:
            style = {"color": COLOURS[number % 7], "marker": MARKERS[number % 7]}
            axes.plot(*zip(*points, strict=True), label=label(name), **style)  # type: ignore[arg-type]
    floor = sorted(
        {
            (row.case["context"], 1e3 * row.bytes / row.bandwidth)
            for row in rows
            if row.bandwidth and row.implementation in ("kvfold bf16", "sdpa")
        }
    )
    if floor:
        axes.plot(*zip(*floor, strict=True), "_--", color="#666666", label="floor (16 bit)")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(_tokens))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("context, tokens")
    if axes.get_subplotspec().is_first_col():  # type: ignore[union-attr]
        axes.set_ylabel("step, ms")
    axes.grid(color="#e3e3e3")


def _tokens(value: float, position: int) -> str:
    return f"{value / 1024:g}k" if value >= 1024 else f"{value:g}"


def _new() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7.6, 3.8), layout="constrained")
    FigureCanvasSVG(figure)
    return figure, figure.subplots()


def _label(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e3e3e3")
    axes.set_axisbelow(True)
    axes.legend(frameon=False)


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    style = {"svg.hashsalt": "kvfold", "svg.fonttype": "none"}
    with matplotlib.rc_context(style), any_letters():
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
