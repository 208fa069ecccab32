"""What a caller gives besides numbers, checked: paths, names, words, flags, callbacks. No torch.

One function for each kind of argument, for the command line and for Python calls alike. Each
names the argument in what it complains of.
"""

import difflib
import os
from collections.abc import Callable, Collection, Iterable
from inspect import signature
from pathlib import Path
from typing import Any, TypeVar

from kvfold.errors import InputError
from kvfold.names import shown
from kvfold.numbers import iterated

T = TypeVar("T")
_LONGEST_NAME = 200  # bytes, of the 255 that most file systems allow
_MANY = 10_000  # sources, texts …: nobody gives more in one call


def location(value: object, name: str) -> Path:
    """A path that the system can be asked about, ``~`` expanded; nothing need be there.

    Raises:
        InputError: for what is no path, or one that no file can have.
    """
    path = _path(value, name)
    try:
        path.stat()
    except FileNotFoundError:
        pass
    except OSError as error:
        raise _unreachable(path, name, error) from error
    return path


def new_folder(value: object, name: str) -> Path:
    """A folder that can be made or replaced, with room in its name for the working folder's.

    Raises:
        InputError: saying what is in the way.
    """
    path = location(value, name)
    whole = path.absolute()
    if whole.name in ("", ".."):
        raise InputError(f"{name} {shown(str(path))}: expected a folder's name", "name it")
    if len(os.fsencode(whole.name)) > _LONGEST_NAME:
        raise InputError(
            f"{name} {shown(whole.name)}: its name is too long",
            f"use at most {_LONGEST_NAME} bytes",
        )
    above = next(parent for parent in whole.parents if parent.exists())
    if not os.access(above, os.W_OK | os.X_OK):
        raise InputError(
            f"{name} {shown(str(path))}: {shown(str(above))} cannot be written to",
            "choose a folder that you may write to",
        )
    return path


def source(value: object, name: str) -> str:
    """A folder, file or hub name, as it was given.

    Raises:
        InputError: for what can be none of them.
    """
    path = _path(value, name)
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass  # perhaps a name on the hub
    except OSError as error:
        raise _unreachable(path, name, error) from error
    return str(value)


def _path(value: object, name: str) -> Path:
    text = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    if not isinstance(text, str):
        raise InputError(f"{name} {shown(value)}: expected a path", "a string or a pathlib.Path")
    if not text:
        raise InputError(f"{name} is empty", "give a path or a name")
    if "\0" in text:
        raise InputError(f"{name} {shown(text)}: a path holds no NUL", "give another path")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise InputError(
            f"{name} {shown(text)}: there is no such user", "write the folder out, or ./~name"
        ) from error


def _unreachable(path: Path, name: str, error: OSError) -> InputError:
    return InputError(
        f"{name} {shown(str(path))}: {error.strerror or error}", "give a path that can be opened"
    )


def several(values: object, name: str, each: Callable[[object, str], T]) -> tuple[T, ...]:
    """Every value of a sequence, checked by ``each``.

    Raises:
        InputError: for a string or anything else that is no sequence, or a value that is wrong.

    >>> several(["mean", "pca"], "methods", text)
    ('mean', 'pca')
    """
    found: list[T] = []
    for value in iterated(values, name):
        if len(found) == _MANY:
            raise InputError(f"{name}: expected at most {_MANY:,}, got more", "give fewer")
        found.append(each(value, name))
    return tuple(found)


def text(value: object, name: str) -> str:
    """A string.

    Raises:
        InputError: for anything else.
    """
    if not isinstance(value, str):
        raise InputError(f"{name} {shown(value)}: expected a string", "put it in quotes")
    return value


def choice(value: object, name: str, known: Collection[str]) -> str:
    """One of the names that are known.

    Raises:
        InputError: for any other, with the nearest one as a hint.

    >>> choice("pca", "--method", ["mean", "pca"])
    'pca'
    """
    if not isinstance(value, str) or value not in known:
        near = difflib.get_close_matches(value, known, n=1) if isinstance(value, str) else []
        guess = f"did you mean {near[0]}? " if near else ""
        raise InputError(f"{name} {shown(value)}: no such choice", f"{guess}known: {_list(known)}")
    return value


def flag(value: object, name: str) -> bool:
    """True or False.

    Raises:
        InputError: for anything else.
    """
    if not isinstance(value, bool):
        raise InputError(f"{name} {shown(value)}: expected True or False", f"{name}=True")
    return value


def callback(value: Any, name: str, takes: int = 3) -> None:
    """Something that can be called with so many arguments.

    Raises:
        InputError: for anything else.
    """
    try:
        if not callable(value):
            raise TypeError
        signature(value).bind(*[None] * takes)
    except ValueError:  # some of C's functions do not tell
        pass
    except TypeError as error:
        raise InputError(
            f"{name} {shown(value)}: expected a function of {takes} arguments",
            "leave it out for none",
        ) from error


def check_options(given: Iterable[str], known: Collection[str]) -> None:
    """Refuse keyword arguments that a function does not have.

    Raises:
        InputError: for the first of them, with the nearest name as a hint.
    """
    for name in given:
        choice(name, "option", known)


def _list(known: Collection[str]) -> str:
    return ", ".join(known)
