"""Numbers as click's types: every numeric option of every command is one of these."""

from typing import Any

import click

from kvfold.numbers import Real, Whole, Wholes


class Number(click.ParamType):  # type: ignore[type-arg]  # generic in new versions only
    """A kind of number (``kvfold.numbers``); ``--help`` shows its range."""

    name = "number"

    def __init__(self, kind: Whole | Real | Wholes) -> None:
        self.kind = kind

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | float | tuple[int, ...]:
        """The number; a default may be one already."""
        name = param.opts[0] if param else "number"
        if isinstance(value, str):
            return self.kind.read(value, name)
        return self.kind.check(value, name)

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        """The range; click shows it after the option's name."""
        return self.kind.span
