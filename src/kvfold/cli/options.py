"""click's types for what kvfold takes: numbers and paths, checked when they are read."""

from pathlib import Path
from typing import Any

import click

from kvfold import arguments
from kvfold.numbers import Real, Whole, Wholes
from kvfold.requests import Listed


class Number(click.ParamType):  # type: ignore[type-arg]  # generic in new versions only
    """A kind of number (``kvfold.numbers``); ``--help`` shows its range."""

    name = "number"

    def __init__(self, kind: Whole | Real | Wholes) -> None:
        self.kind = kind

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | float | tuple[int, ...]:
        """The number; a default may be one already."""
        name = _name(param)
        if isinstance(value, str):
            return self.kind.read(value, name)
        return self.kind.check(value, name)

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        """The range; click shows it after the option's name."""
        return self.kind.span


def explained(help: str, kind: object) -> str:
    """A number's help, with what the letters after it stand for.

    >>> explained("Of a text.  [default: 4]", Whole(1, 9, counts="tokens"))
    'Of a text (k 1,000, Ki 1,024).  [default: 4]'
    """
    units = kind.units if isinstance(kind, Whole | Wholes) else ""
    if not units:
        return help
    said, gap, default = help.partition("  [")
    return f"{said.rstrip('.')} ({units}).{gap}{default}"


class Comma(click.ParamType):  # type: ignore[type-arg]
    """Words with commas between."""

    name = "text"

    def __init__(self, kind: Listed) -> None:
        self.kind = kind

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[Any, ...]:
        """The words; a default may be some already."""
        name = _name(param)
        return self.kind.read(value, name) if isinstance(value, str) else tuple(value)


class Location(click.ParamType):  # type: ignore[type-arg]
    """A path of a file or folder that is there or will be (``kvfold.arguments``)."""

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """The path, ``~`` expanded."""
        return arguments.location(value, _name(param))


class NewFolder(Location):
    """A folder that a command makes."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """The path, ``~`` expanded."""
        return arguments.new_folder(value, _name(param))


class Source(click.ParamType):  # type: ignore[type-arg]
    """A model: a folder, a hub name or a file."""

    name = "source"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The words as they were given."""
        return arguments.source(value, _name(param))


def _name(param: click.Parameter | None) -> str:
    """What a person calls a parameter: ``--context``, ``OUT``."""
    if isinstance(param, click.Option):
        return max(param.opts, key=len)
    return str(param.metavar or param.name).strip("[].") if param else "value"
