"""Drawings of attention maps: heads that share a KV head stand together."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from kvfold.report.figures import COLOURS
from kvfold.report.labels import any_letters, label
from kvfold.report.maps import Seen, divergences, pooled
from kvfold.report.page import embedded

_WIDTH = 12.0  # inches of the picture, whatever it shows: letters keep their size on a page
_MARGIN = 0.9  # of it, for words at the side and at the foot
_LONGEST = 11  # letters that fit there
_GAP, _ABOVE = 0.2, 0.35  # between maps, and for the words above each
_LETTERS = 11  # points
_MOST_WORDS = 64  # longer texts are not labelled; of shorter ones as many words as fit
_COLUMNS = (3, 4, 5)


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
    """The maps of one layer: of every head one, or two side by side for two models.

    Args:
        names: of the models, the source first. words: of the text, a token each.
    """
    maps = [pooled(each) for each in seen]
    apart = divergences(*seen) if len(seen) == 2 else None
    heads = len(maps[0])
    margin = _MARGIN if len(words) <= _MOST_WORDS else _GAP
    page = _Page(heads, len(seen), _columns(heads), margin)
    figure = Figure(figsize=(_WIDTH, page.height))
    FigureCanvasAgg(figure)
    title = _title(layer, names, seen)
    figure.text(0.1 / _WIDTH, 1 - 0.1 / page.height, title, fontsize=_LETTERS + 2, va="top")
    some = _some(words, page.side)
    for head in range(heads):
        for number, each in enumerate(seen):
            axes = figure.add_axes(page.place(head, number))
            at_side = some if not head % page.columns and not number else {}
            at_foot = some if head + page.columns >= heads else {}
            _draw(axes, maps[number][head], at_side, at_foot)
            distance = float(apart[head]) if apart is not None and number else None
            above = _words(head, each, distance, not number)
            axes.set_title(above, fontsize=_LETTERS, color=_colour(head, each))
    buffer = io.BytesIO()
    with any_letters():
        figure.savefig(buffer, format="png", dpi=110)
    return Picture(layer, buffer.getvalue(), _summary(layer, apart))


@dataclass(frozen=True)
class _Page:
    """Where maps stand, in inches.

    Attributes:
        maps: side by side for each head. columns: heads in a line.
        margin: at the side and at the foot.
    """

    heads: int
    maps: int
    columns: int
    margin: float

    @property
    def side(self) -> float:
        """Of a map."""
        gaps = self.columns * (_GAP + (self.maps - 1) * _GAP / 2)
        return (_WIDTH - self.margin - gaps) / (self.columns * self.maps)

    @property
    def height(self) -> float:
        lines = -(-self.heads // self.columns)
        return lines * (self.side + _ABOVE) + self.margin + _ABOVE

    def place(self, head: int, number: int) -> tuple[float, float, float, float]:
        """Left, bottom, width, height of a map, as parts of the picture."""
        line, column = divmod(head, self.columns)
        side, pair = self.side, self.side + _GAP / 2
        left = self.margin + column * (self.maps * pair + _GAP / 2) + number * pair
        top = _ABOVE + line * (side + _ABOVE) + _ABOVE
        bottom = self.height - top - side
        return left / _WIDTH, bottom / self.height, side / _WIDTH, side / self.height


def _columns(heads: int) -> int:
    """Heads in a line: what leaves the fewest gaps."""
    return min(_COLUMNS, key=lambda columns: (-heads % columns, columns)) if heads > 3 else heads


def _title(layer: int, names: Sequence[str], seen: Sequence[Seen]) -> str:
    models = [f"{label(name)} ({_sharing(each)})" for name, each in zip(names, seen, strict=True)]
    if len(models) == 1:
        return f"Layer {layer} of {models[0]}"
    return f"Layer {layer}: {models[0]} left, {models[1]} right"


def _sharing(seen: Seen) -> str:
    if seen.latent:
        return "one latent"
    return f"{len(seen.key)} KV head{'s' if len(seen.key) > 1 else ''}"


def _words(head: int, each: Seen, apart: float | None, first: bool) -> str:
    """What stands above a map."""
    words = [f"head {head}"] if first else []
    words += [] if each.latent else [f"KV {head // each.group_size}"]
    words += [] if apart is None else [f"KL {apart:.2f}"]
    return " · ".join(words)


def _colour(head: int, each: Seen) -> str:
    """Of the KV head, so that those who share one are seen to."""
    return COLOURS[0 if each.latent else head // each.group_size % len(COLOURS)]


def _some(words: Sequence[str], side: float) -> dict[int, str]:
    """As many of the words, by their place, as can be read along a side of so many inches."""
    if len(words) > _MOST_WORDS:
        return {}
    step = ceil(1.1 * _LETTERS / 72 * len(words) / side)
    return {place: label(_short(words[place])) for place in range(0, len(words), step)}


def _short(word: str) -> str:
    return word if len(word) <= _LONGEST else f"{word[: _LONGEST - 1]}…"


def _draw(
    axes: Axes, values: torch.Tensor, at_side: dict[int, str], at_foot: dict[int, str]
) -> None:
    # The square root shows small weights beside a sink's; dark is more.
    axes.imshow(values.sqrt().numpy(), cmap="Blues", vmin=0, vmax=1, aspect="equal")
    axes.set_yticks(list(at_side), list(at_side.values()), fontsize=_LETTERS)
    axes.set_xticks(list(at_foot), list(at_foot.values()), fontsize=_LETTERS, rotation=90)
    axes.tick_params(length=0)


def _summary(layer: int, apart: torch.Tensor | None) -> str:
    if apart is None:
        return f"layer {layer}"
    worst = int(apart.argmax())
    return (
        f"layer {layer}: weights diverge by {float(apart.mean()):.3f} nats per query on average, "
        f"most in head {worst} ({float(apart[worst]):.3f})"
    )
