"""The plot of a healing run: divergence from the source against tokens."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from kvfold.report.labels import label
from kvfold.report.picture import save

# Okabe and Ito's colours, told apart by colour-blind readers; markers tell them apart in grey.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
_MARKERS = ("o", "s", "^", "D")
_INK, _GREY = "#222222", "#999999"
_SMOOTHING = 20  # the training line shows means over a twentieth of the steps


def plot_healing(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw KL(source || healing) on training text and on each held-out text.

    Args:
        rows: the metrics of ``healing.jsonl``, in order.
        path: of the PNG.

    >>> plot_healing(read_metrics(Path("healed/healing.jsonl")), Path("a.png"))  # doctest: +SKIP
    """
    figure = Figure(figsize=(7.6, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    draw_healing(figure.subplots(), rows)
    save(figure, path)


def draw_healing(axes: Axes, rows: Sequence[dict[str, Any]]) -> None:
    """The curves of :func:`plot_healing`, on given axes."""
    steps = [row for row in rows if "kl" in row]
    axes.plot(
        [row["tokens"] for row in steps],
        _smooth([row["kl"] for row in steps]),
        color=_GREY, linewidth=1.5, label="training text (smoothed)",
    )  # fmt: skip
    every = dict.fromkeys(name for row in rows for name in row)
    names = [name for name in every if name.startswith("kl ")]
    for name, colour, marker in zip(names, _COLOURS, _MARKERS, strict=False):
        points = [(row["tokens"], row[name]) for row in rows if name in row]
        axes.plot(
            *zip(*points, strict=True),
            color=colour, marker=marker, linewidth=2, label=label(name.removeprefix("kl ")),
        )  # fmt: skip
    axes.set_xlabel("tokens healed", color=_INK)
    axes.set_ylabel("KL from the source, nats per token", color=_INK)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd")
    axes.legend(frameon=False)


def _smooth(values: list[float]) -> list[float]:
    """Means over what has passed, a twentieth of the run at most."""
    width = max(1, len(values) // _SMOOTHING)
    windows = (values[max(0, i + 1 - width) : i + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]
