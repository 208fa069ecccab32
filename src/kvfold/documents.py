"""The one reader of JSON: every document that kvfold takes in comes through here. No torch.

Documents are written by others, by older versions and by runs that were killed. A
:class:`Document` says what is expected of one (a schema, checked strictly by pydantic: ``"2"`` is
no number) and how large it may be. Whatever is wrong becomes one error that names the file, the
key, the value and what was expected. Files are opened without ever waiting: a FIFO, a device or a
folder of the name is refused.
"""

import json
import math
import os
import re
import stat
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from io import BufferedReader
from pathlib import Path, PurePosixPath
from reprlib import Repr
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

from kvfold.errors import CheckpointError, InputError

if TYPE_CHECKING:
    from pydantic import TypeAdapter, ValidationError

T = TypeVar("T")
Key = str | int

MEGABYTE = 1 << 20
DEEPEST = 64  # levels of nesting; real documents have fewer than ten
_MOST_VALUES = 8_000_000  # a shard of 100,000 tensors has a tenth of them
_MOST_DIGITS = 100  # tokenizers write int(1e30) for "no limit"
# A string (closed or not), or a bracket: enough to follow nesting without parsing.
_BRACKETS = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"?|[\[{]|[\]}]', re.DOTALL)
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_short = Repr()
_short.maxstring = _short.maxother = 60
_short.maxlong = 24


@dataclass(frozen=True)
class Document(Generic[T]):
    """What is expected of one kind of document.

    Attributes:
        schema: a type that pydantic checks strictly. hint: what to do about a wrong one.
        largest: bytes of a document (of a line, where there are lines).
        error: raised for what is wrong inside; files that cannot be opened are InputErrors.
        surrogates: strings may be names of files, whose bytes need not be UTF-8.
        infinite: keys whose value may be infinite; elsewhere neither NaN nor infinity is taken.

    >>> Document(dict[str, int], "fix it").parse(b'{"a": "2"}', "a.json")
    Traceback (most recent call last):
    ...
    kvfold.errors.CheckpointError: a.json: a is '2'; expected a whole number
    """

    schema: type[T]
    hint: str
    largest: int = 16 * MEGABYTE
    error: type[InputError] = CheckpointError
    infinite: tuple[str, ...] = ()
    surrogates: bool = False

    def read(self, path: Path) -> T:
        """The document in a file.

        Raises:
            InputError: if the file cannot be read, or (as ``error``) holds something else.
        """
        return self.parse(read_bytes(path, self.largest, self.hint), str(path))

    def parse(self, data: bytes, name: str) -> T:
        """The document in ``data``, which messages call ``name``."""
        try:
            value = _parsed(data)
            _check_values(
                value, self.infinite, not self.surrogates and bool(_SURROGATE.search(data))
            )
        except _WrongError as wrong:
            raise self.error(f"{name}{wrong}", self.hint) from wrong
        return self.check(value, name)

    def check(self, value: Any, name: str) -> T:
        """A value that is in memory already; it is returned as it is, its keys in their order."""
        from pydantic import ValidationError

        try:
            _adapter(cast(Hashable, self.schema)).validate_python(value, strict=True)
            return value  # nothing is converted in strict mode
        except ValidationError as error:
            raise self.error(f"{name}{_first_wrong(error, value)}", self.hint) from error

    def lines(self, path: Path, *, torn: bool = False) -> Iterator[tuple[int, T]]:
        """The documents of a file that holds one per line, with their line numbers from 1 on.

        Args:
            torn: leave out a last line that was never finished, as a killed run leaves it.
        """
        with open_regular(path, self.hint) as file:
            for number, line in enumerate(self._raw_lines(file, path), 1):
                if not line.strip():
                    continue
                if torn and not line.endswith(b"\n"):
                    return
                yield number, self.parse(line, f"{path} line {number}")

    def _raw_lines(self, file: BufferedReader, path: Path) -> Iterator[bytes]:
        number = 0
        while line := file.readline(self.largest + 1):
            number += 1
            if len(line) > self.largest:
                raise self.error(
                    f"{path} line {number} is longer than {self.largest / MEGABYTE:,.0f} MiB",
                    self.hint,
                )
            yield line


def open_ended(schema: type[T]) -> type[T]:
    """A TypedDict whose documents may hold other keys too; they are kept as they are."""
    setattr(schema, "__pydantic_config__", {"extra": "allow"})  # noqa: B010
    return schema


# -- files ----------------------------------------------------------------------------------


def open_regular(path: Path, hint: str = "") -> BufferedReader:
    """Open a file for reading; refuse whatever else has its name, without waiting for it.

    Raises:
        InputError: naming the path and what is there instead.
    """
    try:
        kind = path.stat().st_mode
        # A FIFO that is put there meanwhile would block without O_NONBLOCK; files ignore it.
        flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
        opened = os.open(path, flags) if stat.S_ISREG(kind) else None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}", hint) from error
    except ValueError as error:  # a NUL in the name
        raise InputError(f"cannot read {str(path)!r}: {error}", hint) from error
    if opened is not None:
        file = os.fdopen(opened, "rb")
        kind = os.fstat(opened).st_mode
        if stat.S_ISREG(kind):
            return file
        file.close()
    raise InputError(f"{path} is {_kind(kind)}; expected a file", hint)


def file_within(folder: Path, name: str, named_by: str) -> Path:
    """The file of a name that another file has given; it must lie in the same folder or below.

    Links may point anywhere inside the folder or, in the hub's cache, to the blobs of the same
    repository (``models--…/snapshots/REVISION/file -> models--…/blobs/…``).

    Args:
        named_by: what named it, for the message.

    Raises:
        CheckpointError: for any other place.
    """
    hint = "put the files that it names beside it; kvfold reads nothing outside a model's folder"
    given = PurePosixPath(name)
    if given.is_absolute() or ".." in given.parts or not given.parts or "\0" in name:
        raise CheckpointError(f"{named_by} names {shortened(name)}; expected a file below it", hint)
    path, root = folder / name, Path(os.path.realpath(folder))
    real = Path(os.path.realpath(folder / name))  # never raises, unlike resolve() in a loop
    of_the_hub = root.parent.name == "snapshots" and real.parent == root.parents[1] / "blobs"
    if not (real.is_relative_to(root) or of_the_hub):
        raise CheckpointError(
            f"{named_by} names {shortened(name)}, which is a link to {real}, outside {folder}", hint
        )
    return path


def read_bytes(path: Path, largest: int, hint: str = "") -> bytes:
    """The bytes of a file of at most so many.

    Raises:
        InputError: if it cannot be read, is no regular file, or is larger.
    """
    with open_regular(path, hint) as file:
        size = os.fstat(file.fileno()).st_size
        try:
            data = file.read(size + 1) if size <= largest else b""
            if size < len(data) <= largest:  # it grows, or is one of /proc's, that have no size
                data += file.read(largest + 1 - len(data))
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror}", hint) from error
    if max(size, len(data)) > largest:
        raise InputError(
            f"{path} is too large; expected at most {largest / MEGABYTE:,.0f} MiB", hint
        )
    return data


def _kind(mode: int) -> str:
    kinds = {
        stat.S_ISDIR: "a folder",
        stat.S_ISFIFO: "a FIFO",
        stat.S_ISSOCK: "a socket",
        stat.S_ISCHR: "a device",
        stat.S_ISBLK: "a device",
    }
    return next((words for test, words in kinds.items() if test(mode)), "no regular file")


# -- parsing --------------------------------------------------------------------------------


class _WrongError(ValueError):
    """What is wrong with a document, to be said after its name."""


def _parsed(data: bytes) -> Any:
    """Any JSON value, within the limits on depth and number that protect the parser."""
    if data.startswith(b"\xef\xbb\xbf"):
        raise _WrongError(" starts with a byte-order mark; expected plain UTF-8")
    values = data.count(b",") + data.count(b"[") + data.count(b"{")
    if values > _MOST_VALUES:
        raise _WrongError(f" holds too many values; expected at most {_MOST_VALUES:,}")
    _check_depth(data)
    try:
        return json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_object,
            parse_int=_integer,
            parse_float=float,
        )
    except UnicodeDecodeError as error:
        raise _WrongError(f" is not UTF-8 (byte {error.start})") from error
    except json.JSONDecodeError as error:
        where = f"line {error.lineno} column {error.colno}"
        raise _WrongError(f" is not valid JSON: {error.msg} ({where})") from error


def _check_depth(data: bytes) -> None:
    if data.count(b"[") + data.count(b"{") <= DEEPEST:
        return
    depth = 0
    for match in _BRACKETS.finditer(data):
        first = data[match.start()]
        if first in b"[{":
            depth += 1
            if depth > DEEPEST:
                raise _WrongError(f" is nested too deeply; expected at most {DEEPEST} levels")
        elif first in b"]}":
            depth -= 1


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise _WrongError(f": the key {_word(twice)} stands twice in one object")
    return found


def _integer(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise _WrongError(f": a number of {len(digits)} digits; expected at most {_MOST_DIGITS}")
    return int(digits)


def _check_values(value: Any, infinite: tuple[str, ...], surrogates: bool) -> None:
    """Refuse numbers that are none and, where there may be some, strings that are no text."""
    stack: list[tuple[tuple[Any, ...], Any]] = [((), value)]
    while stack:
        path, found = stack.pop()
        if isinstance(found, float) and not math.isfinite(found):
            raise _WrongError(f": {_place(_keys(path))} is {found}; expected a finite number")
        if surrogates and isinstance(found, str):
            _check_text(found, path)
        if isinstance(found, dict):
            if surrogates:
                for key in found:
                    _check_text(key, path)
            stack += [((path, k), v) for k, v in found.items() if k not in infinite]
        elif isinstance(found, list):
            stack += [((path, i), v) for i, v in enumerate(found)]


def _check_text(text: str, path: tuple[Any, ...]) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _WrongError(
            f": {_place(_keys(path))} holds half a surrogate pair; expected text"
        ) from error


# -- words ----------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def _adapter(schema: Hashable) -> "TypeAdapter[Any]":
    from pydantic import TypeAdapter

    return TypeAdapter(cast(Any, schema))


def _first_wrong(error: "ValidationError", document: Any) -> str:
    first = error.errors(include_url=False, include_context=False)[0]
    if first["type"] == "missing":
        return (
            f": {_place([*_real_keys(first['loc'][:-1], document), first['loc'][-1]])} is missing"
        )
    before, _, after = first["msg"].removeprefix("Input should be ").partition(" should have ")
    expected = (after or before).partition(" after validation")[0]
    for theirs, ours in _WORDS.items():
        expected = expected.replace(theirs, ours)
    place = _place(_real_keys(first["loc"], document))
    return f": {place} is {shortened(first['input'])}; expected {expected}"


def _real_keys(location: tuple[Key, ...], document: Any) -> list[Key]:
    """Of pydantic's location the keys of the document, without the names of its types."""
    keys: list[Key] = []
    for key in location:
        inside = (isinstance(document, dict) and key in document) or (
            isinstance(document, list) and isinstance(key, int) and key < len(document)
        )
        if inside:
            keys.append(key)
            document = document[key]
    return keys


_WORDS = {
    "greater than or equal to": "at least",
    "less than or equal to": "at most",
    "a valid ": "a ",
    "a integer": "a whole number",
    "a dictionary": "a JSON object",
    "a list": "a JSON list",
}


def shortened(value: Any) -> str:
    """A value as it stands in a message: in full if it is short."""
    literals = {None: "null", True: "true", False: "false"}
    known = value is None or isinstance(value, bool)
    return literals[value] if known else _short.repr(value)


def _keys(path: tuple[Any, ...]) -> list[Key]:
    keys: list[Key] = []
    while path:
        path, key = path
        keys.append(key)
    return keys[::-1]


def _place(keys: list[Key]) -> str:
    """A key path in words: ``rope_parameters.rope_theta``, ``layer_types[3]``."""
    words = ""
    for key in keys:
        words += f"[{key}]" if isinstance(key, int) else f".{_word(key)}"
    return words.removeprefix(".") or "the document"


def _word(key: str) -> str:
    return key if key.isprintable() and 0 < len(key) <= 80 else shortened(key)
