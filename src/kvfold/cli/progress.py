"""Progress on stderr: bars on a terminal, nothing elsewhere."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from kvfold.names import printable
from kvfold.progress import no_progress


class Bar(Protocol):
    """A progress callback that can also show a few words."""

    def __call__(self, label: str, done: int, total: int, words: str = "") -> None: ...


def _no_bar(label: str, done: int, total: int, words: str = "") -> None:
    no_progress(label, done, total)


@contextmanager
def progress_bar() -> Iterator[Bar]:
    """Yield a progress callback; one bar per label, with the time it will still take."""
    if not sys.stderr.isatty():
        yield _no_bar
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        TaskID,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as Bars

    tasks: dict[str, TaskID] = {}
    columns = (
        TextColumn("{task.description}", markup=False),  # names may hold brackets
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[words]}", markup=False),
    )
    with Bars(*columns, console=Console(stderr=True)) as bars:

        def update(label: str, done: int, total: int, words: str = "") -> None:
            if label not in tasks:
                tasks[label] = bars.add_task(printable(label), total=total, words="")
            bars.update(tasks[label], completed=done, total=total, words=words)

        yield update
