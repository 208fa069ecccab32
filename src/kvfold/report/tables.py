"""Tables that fit a terminal."""

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvfold.names import printable


def print_table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    caption: str = "",
    console: Console | None = None,
) -> None:
    """Print a table to stdout: the first column to the left, numbers to the right."""
    table = Table(
        title=_words(title, "table.title") if title else None,
        caption=_lines(caption) if caption else None,
        box=box.SIMPLE_HEAD,
        title_justify="left",
        show_header=any(columns),
    )
    table.caption_justify = "left"
    for index, column in enumerate(columns):
        cells = [row[index].lstrip("-") for row in rows if row[index]]
        numeric = index > 0 and all(cell[0].isdigit() for cell in cells)
        table.add_column(_words(column), justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(_words, row))
    console = console or Console()
    unlimited = console.options.update(max_width=10 * console.width)
    if console.measure(table, options=unlimited).maximum > console.width:  # keep words whole
        table.collapse_padding, table.pad_edge = True, False
    console.print(table)


def _words(text: str, style: str = "") -> Text:
    """Words as they stand: brackets are no markup, and nothing in them is obeyed."""
    return Text(printable(text), style=style)


def _lines(text: str) -> Text:
    return Text("\n".join(map(printable, text.split("\n"))), style="table.caption")


def size(number: float) -> str:
    """Bytes for people.

    >>> size(23040)
    '22.5 KiB'
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024:
            return f"{number:.3g} {unit}"
        number /= 1024
    return f"{number:.3g} TiB"


def count(number: int) -> str:
    """A number of parameters for people.

    >>> count(134515008)
    '134.5 M'
    """
    for scale, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= scale:
            return f"{number / scale:.1f} {unit}"
    return str(number)
