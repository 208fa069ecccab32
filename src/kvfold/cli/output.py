"""stdout is data: a table, or with ``--json`` one JSON document."""

import json
from collections.abc import Callable
from typing import Any

import click


def emit(as_json: bool, document: Any, show: Callable[[], None]) -> None:
    """Print ``document`` as JSON, or call ``show`` to print it for people."""
    if as_json:
        click.echo(json.dumps(document, indent=2, ensure_ascii=False))
    else:
        show()
