"""Functions that take ``**options`` say which: in their signature and in their documentation."""

import inspect
import textwrap
from collections.abc import Callable
from typing import Any, TypeVar, Unpack, get_args, get_origin

from kvfold.ops.options import Option, declared

F = TypeVar("F", bound=Callable[..., Any])
#: The line of a docstring in whose place the options are described.
_PLACE = "options: of attention; see the signature."
_WIDTH = 100


def with_options(function: F) -> F:
    """Let ``inspect.signature`` and ``help`` show each of ``**options: Unpack[...]``.

    The function is the same one, called as fast as before.
    """
    options = _options_of(function)
    signature = inspect.signature(function)
    own = list(signature.parameters.values())
    positional = [p for p in own if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    beside = [p for p in own if p.kind is inspect.Parameter.KEYWORD_ONLY]
    each = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=option.default)
        for name, option in options.items()
    ]
    shown = signature.replace(parameters=[*positional, *each, *beside])
    function.__signature__ = shown  # type: ignore[attr-defined]
    if function.__doc__:
        function.__doc__ = _described(function.__doc__, options)
    return function


def _options_of(function: Callable[..., Any]) -> dict[str, Option]:
    for annotation in function.__annotations__.values():
        origin: object = get_origin(annotation)
        if origin is Unpack:
            return declared(get_args(annotation)[0])
    raise TypeError(f"{function} takes no **options: Unpack[...]")


def _described(doc: str, options: dict[str, Option]) -> str:
    lines = []
    for line in doc.splitlines():
        if line.strip() != _PLACE:
            lines.append(line)
            continue
        indent = line[: len(line) - len(line.lstrip())]
        for name, option in options.items():
            text = f"{name}: {option.says}"
            lines += textwrap.wrap(
                text, _WIDTH, initial_indent=indent, subsequent_indent=indent + "    ",
                break_long_words=False, break_on_hyphens=False,
            )  # fmt: skip
    return "\n".join(lines)
