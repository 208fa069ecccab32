"""Names of files, models and texts as people see them: on a terminal, in JSON, in a message.

A name on Linux is any bytes but NUL and ``/``: line breaks, terminal escapes and bytes that are
not UTF-8 included (Python holds those as lone surrogates). No torch.
"""

import json
import unicodedata
from typing import Any

_LONGEST = 60  # characters of a value that a message repeats
# Control, format (which turn text around), surrogate, line and paragraph separator.
_UNSEEN = ("Cc", "Cf", "Cs", "Zl", "Zp")


def printable(text: str) -> str:
    r"""The text with everything that is not seen written as an escape.

    >>> printable("a\x1b[31m b")
    'a\\x1b[31m b'
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(_escaped(character) for character in text)


def _escaped(character: str) -> str:
    if unicodedata.category(character) not in _UNSEEN:
        return character
    return character.encode("unicode_escape", "backslashreplace").decode("ascii")


def shown(value: object) -> str:
    """A value as a message repeats it: on one line and not for ever.

    >>> shown("9" * 100)
    '9999999999…9999999999 (100 characters)'
    """
    if isinstance(value, str):
        text = value
    elif value is None or isinstance(value, bool | float | complex):
        text = repr(value)
    elif isinstance(value, int):
        text = str(value) if abs(value) < 10**_LONGEST else "a number of many digits"
    else:
        text = f"a {type(value).__name__}"
    text = printable(text)
    if len(text) <= _LONGEST:
        return text or "(empty)"
    return f"{text[:10]}…{text[-10:]} ({len(text):,} characters)"


def json_text(document: Any, indent: int | None = 2) -> str:
    """JSON that reads well and can always be printed: what is not seen is escaped.

    >>> json_text("naïve \x9b", indent=None)
    '"naïve \\\\u009b"'
    """
    text = json.dumps(document, indent=indent, ensure_ascii=False)
    if text.isascii() and "\x7f" not in text:
        return text
    return "".join(c if c == "\n" or c.isprintable() else _json_escape(c) for c in text)


def _json_escape(character: str) -> str:
    units = character.encode("utf-16-be", "surrogatepass").hex()
    return "".join(f"\\u{units[at : at + 4]}" for at in range(0, len(units), 4))
