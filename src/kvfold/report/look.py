"""Drawings of attention maps: heads that share a KV head stand together."""

import io
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from kvfold.report.labels import any_letters, label
from kvfold.report.maps import Seen, divergences, pooled
from kvfold.report.page import embedded

_WORDS = 32  # texts up to so many tokens are labelled word by word
_CELL = 1.9  # inches of a map's side
_COLUMNS = 6


@dataclass(frozen=True)
class Picture:
    """One layer, drawn.

    Attributes:
        png: the picture's bytes. summary: one line of words.
    """

    layer: int
    png: bytes
    summary: str

    @property
    def tag(self) -> str:
        """An HTML image that holds its own data."""
        return embedded(self.png, "image/png", "attention maps")


def draw_layer(
    layer: int, names: Sequence[str], seen: Sequence[Seen], words: Sequence[str]
) -> Picture:
    """The maps of one layer for one model, or for two above each other.

    Args:
        names: of the models, the source first. words: of the text, a token each.
    """
    maps = [pooled(each) for each in seen]
    apart = divergences(*seen) if len(seen) == 2 else None
    heads = len(maps[0])
    columns = min(_COLUMNS, heads)
    lines = -(-heads // columns)
    labelled = len(words) <= _WORDS
    cell = max(_CELL, 0.16 * len(words)) if labelled else _CELL
    size = (cell * columns + 0.8, (cell + 0.45) * lines * len(seen) + 0.5)
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    bands = figure.subfigures(len(seen), 1, squeeze=False)[:, 0]
    for number, (band, name, each, heads_maps) in enumerate(
        zip(bands, names, seen, maps, strict=True)
    ):
        count = f"{len(each.key)} KV head{'s' if len(each.key) > 1 else ''}"
        if each.latent:
            count = "one latent"
        band.suptitle(f"{label(name)}: layer {layer}, {count}", fontsize=11, x=0.01, ha="left")
        panels = band.subplots(lines, columns, squeeze=False).flatten()
        for head, axes in enumerate(panels):
            if head >= heads:
                axes.set_visible(False)
                continue
            title = f"{head}" if each.latent else f"{head} · KV {head // each.group_size}"
            if number and apart is not None:
                title += f" · KL {float(apart[head]):.2f}"
            _draw(axes, heads_maps[head], title, words if labelled else [])
    buffer = io.BytesIO()
    with any_letters():
        figure.savefig(buffer, format="png", dpi=110)
    return Picture(layer, buffer.getvalue(), _summary(layer, apart))


def _draw(axes: Axes, values: torch.Tensor, title: str, words: Sequence[str]) -> None:
    # The square root shows small weights beside a sink's; dark is more.
    axes.imshow(values.sqrt().numpy(), cmap="Blues", vmin=0, vmax=1, aspect="equal")
    axes.set_title(title, fontsize=8)
    if words:
        ticks = [label(word) for word in words]
        axes.set_xticks(range(len(ticks)), ticks, rotation=90, fontsize=6)
        axes.set_yticks(range(len(ticks)), ticks, fontsize=6)
    else:
        axes.set_xticks([])
        axes.set_yticks([])
    axes.tick_params(length=0)


def _summary(layer: int, apart: torch.Tensor | None) -> str:
    if apart is None:
        return f"layer {layer}"
    worst = int(apart.argmax())
    return (
        f"layer {layer}: weights diverge by {float(apart.mean()):.3f} nats per query on average, "
        f"most in head {worst} ({float(apart[worst]):.3f})"
    )
