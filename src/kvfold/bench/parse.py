"""What is typed at the command line: sizes, and comma lists of them and of names. No torch."""

import difflib
import re
from collections.abc import Callable, Collection
from typing import TypeVar

from kvfold.errors import InputError

T = TypeVar("T")
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmg]?)(?:i?b)?", re.IGNORECASE)


def parse_size(text: str, option: str, least: int = 1) -> int:
    """A whole number, with k, M or G for 1024, 1024² or 1024³.

    Raises:
        InputError: if it is not one, or less than ``least``.

    >>> parse_size("8k", "--context")
    8192
    """
    found = _SIZE.fullmatch(text.strip())
    value = float(found[1]) * _UNITS[found[2].lower()] if found else 0.0
    if found is None or value != int(value):
        raise InputError(
            f"{option} {text}: expected a whole number, perhaps with k or M",
            "for instance 512, 8k (8,192) or 1M (1,048,576)",
        )
    if value < least:
        raise InputError(f"{option} {text}: expected at least {least}", "for instance 1k or 8k")
    return int(value)


def parse_sizes(text: str, option: str, least: int = 1) -> tuple[int, ...]:
    """A comma list of sizes, each once.

    >>> parse_sizes("512,8k", "--context")
    (512, 8192)
    """
    return parse_list(text, option, lambda part: parse_size(part, option, least))


def parse_names(text: str, option: str, known: Collection[str]) -> tuple[str, ...]:
    """A comma list of known names, each once; ``none`` for an empty one.

    Raises:
        InputError: for a name that is not known, with the nearest one as a hint.
    """
    if text.strip() == "none":
        return ()
    return parse_list(text, option, lambda part: check_name(part, option, known))


def check_name(name: str, option: str, known: Collection[str]) -> str:
    """The name, if it is known.

    Raises:
        InputError: if it is not.
    """
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        guess = f"did you mean {near[0]}? " if near else ""
        raise InputError(f"{option} {name}: no such choice", f"{guess}known: {', '.join(known)}")
    return name


def parse_list(text: str, option: str, parse: Callable[[str], T]) -> tuple[T, ...]:
    """What stands between commas, each once.

    Raises:
        InputError: if nothing does.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise InputError(f"{option} is empty", "give one value, or several with commas between")
    return tuple(dict.fromkeys(parse(part) for part in parts))
