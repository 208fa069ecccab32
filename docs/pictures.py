"""Draws the pictures of folding.md: ``python docs/pictures.py``."""

from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from kvfold.report.picture import save

HERE = Path(__file__).parent
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#8a8a8a"
HEADS = 8
SHAPE = np.array([[0, 0], [0, 1], [0, 2], [0.6, 2], [1.2, 2], [0, 1], [0.45, 1], [0.9, 1]])


def heads() -> Figure:
    """Eight query heads, and how many key/value heads they read."""
    figure = Figure(figsize=(9, 2.9), layout="constrained")
    panels = figure.subplots(1, 3)
    for axes, (name, kv_heads) in zip(
        panels, (("MHA", HEADS), ("GQA", 2), ("MQA", 1)), strict=True
    ):
        axes.set_title(f"{name}: {kv_heads} KV head{'s' if kv_heads > 1 else ''}", fontsize=13)
        group = HEADS // kv_heads
        for query in range(HEADS):
            share = query // group
            middle = (share + 0.5) * group - 0.5
            axes.plot([query, middle], [1.0, 0.45], color=GREY, linewidth=1.2)
            axes.add_patch(Rectangle((query - 0.32, 1.0), 0.64, 0.42, color=BLUE))
        for share in range(kv_heads):
            middle = (share + 0.5) * group - 0.5
            axes.add_patch(Rectangle((middle - 0.32, 0.03), 0.64, 0.42, color=ORANGE))
        axes.text(-0.8, 1.21, "Q", ha="right", va="center", fontsize=12)
        axes.text(-0.8, 0.24, "KV", ha="right", va="center", fontsize=12)
        axes.text(
            3.5, -0.3, f"cache: {kv_heads}/{HEADS}", ha="center", fontsize=12, color="#333333"
        )
        axes.set_xlim(-1.9, HEADS - 0.4)
        axes.set_ylim(-0.45, 1.6)
        axes.axis("off")
    return figure


def gauges() -> Figure:
    """Two heads that keep the same in different coordinates; averaged, and aligned first."""
    turn = np.deg2rad(155)
    gauge = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]) * 0.95
    first = SHAPE - SHAPE.mean(0)
    second = (first + np.array([[0.06, -0.04]])) @ gauge.T
    figure = Figure(figsize=(9, 3.3), layout="constrained")
    one, two, three = figure.subplots(1, 3)
    one.set_title("two heads keep the same thing,\neach in its own coordinates", fontsize=11)
    _draw(one, first, BLUE, "head 1")
    _draw(one, second, ORANGE, "head 2")
    two.set_title("their average\nkeeps next to nothing", fontsize=11)
    _draw(two, (first + second) / 2, GREY, "average")
    three.set_title("head 2's gauge undone first,\nthe shared head keeps it", fontsize=11)
    aligned = second @ np.linalg.inv(gauge).T
    _draw(three, (first + aligned) / 2, GREEN, "shared head")
    for axes in (one, two, three):
        axes.set_xlim(-1.9, 1.9)
        axes.set_ylim(-1.6, 1.6)
        axes.set_aspect("equal")
        axes.set_xticks([])
        axes.set_yticks([])
        axes.legend(loc="lower right", frameon=False, fontsize=10)
    return figure


def _draw(axes: Axes, points: np.ndarray, colour: str, label: str) -> None:
    for part in (slice(0, 5), slice(5, 8)):
        axes.plot(*points[part].T, color=colour, linewidth=2)
    axes.plot(*points.T, "o", color=colour, markersize=6, label=label)


if __name__ == "__main__":
    mpl.rcParams["svg.hashsalt"] = "kvfold"  # the same file every time
    for name, figure in (("heads", heads()), ("gauges", gauges())):
        save(figure, HERE / f"{name}.svg")
