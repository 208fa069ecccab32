"""Names as the labels of a drawing."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from kvfold.names import printable

_LONGEST = 80  # characters; longer names would leave no room for what is drawn


def label(name: str) -> str:
    r"""A name as matplotlib draws it: no formula between dollars, in every legend, on one line.

    >>> label("_a$b$")
    ' _a\\$b\\$'
    """
    text = printable(name)
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST - 1]}…"
    hidden = " " if text.startswith("_") else ""  # legends leave such labels out
    return hidden + text.replace("$", r"\$")


@contextmanager
def any_letters() -> Iterator[None]:
    """Letters that the font lacks are drawn as boxes, without a word about it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")
        yield
