"""stdout is data: a table, or with ``--json`` one JSON document."""

from collections.abc import Callable
from typing import Any

import click

from kvfold.names import json_text, printable


def emit(as_json: bool, document: Any, show: Callable[[], None]) -> None:
    """Print ``document`` as JSON, or call ``show`` to print it for people."""
    if as_json:
        click.echo(json_text(document))
    else:
        show()


def say(line: str, err: bool = False) -> None:
    """Print a line that may hold names: nothing in it is obeyed by a terminal."""
    click.echo(printable(line), err=err)
