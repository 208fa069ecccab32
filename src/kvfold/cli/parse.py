"""Words become requests: click's options, made from what a request declares of itself."""

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, TypeVar

import click

from kvfold.cli.options import Comma, Location, Number, Source, explained
from kvfold.numbers import Real, Whole, Wholes
from kvfold.requests import Choice, Flag, Kind, Listed, Made, Model, Option, Place, Request, Several
from kvfold.requests import options_of as declared_by

R = TypeVar("R", bound=Request)
Callback = Callable[..., Any]
_OFF = "_off"


def asks(kind: type[Request]) -> Callable[[Callback], Callback]:
    """Give a command the arguments and options of a request; it is called with ``request``."""

    def decorate(run: Callback) -> Callback:
        @wraps(run)
        def command(**values: Any) -> Any:
            own = {name: values.pop(name) for name in list(values) if _is_of(kind, name)}
            return run(request=read_request(kind, own), **values)

        made: Callback = command
        for name, option in reversed(declared_by(kind).items()):
            made = _parameters(name, option)(made)
        return made

    return decorate


def read_request(kind: type[R], values: Mapping[str, Any]) -> R:
    """The request that a command's parameters make.

    Raises:
        InputError: for what is wrong with them.
    """
    given: dict[str, Any] = {}
    for name, option in declared_by(kind).items():
        value = values[name]
        if isinstance(option.kind, Several) and not value and not option.is_required:
            value = option.default  # click gives an empty tuple for nothing
        if option.off is not None:
            value = option.off.choose(value, values[name + _OFF])
        given[name] = value
    return kind(**given)


def _is_of(kind: type[Request], name: str) -> bool:
    return name.removesuffix(_OFF) in declared_by(kind)


def _parameters(name: str, option: Option) -> Callable[[Callback], Callback]:
    """click's parameters for one option: itself, and the flag that switches it off."""

    def decorate(run: Callback) -> Callback:
        if option.is_argument:
            return _argument(name, option)(run)
        off = option.off
        if off is not None:
            run = click.option(off.name, name + _OFF, is_flag=True, help=off.help)(run)
        return _option(name, option)(run)

    return decorate


def _argument(name: str, option: Option) -> Callable[[Callback], Callback]:
    several = isinstance(option.kind, Several)
    return click.argument(
        name,
        metavar=option.metavar or option.name,
        type=_type_of(option.kind),
        nargs=-1 if several else 1,
        required=option.is_required,
    )


def _option(name: str, option: Option) -> Callable[[Callback], Callback]:
    if isinstance(option.kind, Flag):
        return click.option(option.name, name, is_flag=True, help=option.help)
    several = isinstance(option.kind, Several)
    shown = not (option.is_required or several or option.default is None)
    return click.option(
        option.name,
        name,
        type=_type_of(option.kind),
        multiple=several,
        required=option.is_required,
        default=_words(option) if shown else None,
        show_default=shown,
        metavar=option.metavar,
        help=explained(option.help, option.kind) or None,
    )


def _words(option: Option) -> str:
    """A default as a person would type it."""
    kind, value = option.kind, option.default
    return kind.brief(value) if isinstance(kind, Whole | Wholes) else kind.written(value)


def _type_of(kind: Kind) -> Any:
    if isinstance(kind, Several):
        return _type_of(kind.each)
    if isinstance(kind, Made):
        return _type_of(kind.of)
    if isinstance(kind, Whole | Real | Wholes):
        return Number(kind)
    if isinstance(kind, Choice):
        return click.Choice(list(kind.known))
    if isinstance(kind, Listed):
        return Comma(kind)
    if isinstance(kind, Place):
        return Location()
    return Source() if isinstance(kind, Model) else None
