"""What ``kernel.h`` says, for ctypes: its constants, and the fields of its structs.

It reads the plain C that the interface is written in, and nothing else: numbers of fixed size,
pointers, structs and arrays of a stated length.
"""

import ctypes
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_NUMBERS: dict[str, type[Any]] = {
    "int32_t": ctypes.c_int32,
    "int64_t": ctypes.c_int64,
    "float": ctypes.c_float,
}
_STRUCT = re.compile(r"\bstruct (\w+) \{(.*?)\};", re.DOTALL)
_FIELD = re.compile(r"(?:const )?(\w+)(\*?) (\w+(?:, \w+)*)(?:\[(\w+)\])?")


def _without_comments(text: str) -> str:
    return re.sub(r"//.*", "", text)


_TEXT = _without_comments((Path(__file__).parent / "kernel.h").read_text("utf-8"))
_STRUCTS = dict(_STRUCT.findall(_TEXT))
#: Every constant that is given a number: ``KVF_MAX_DIM`` …
CONSTANTS = {name: int(n) for name, n in re.findall(r"\b(KVF_\w+) = (\d+)", _TEXT)}


def fields_of(
    struct: str, structs: Mapping[str, type[Any]] | None = None, text: str | None = None
) -> list[tuple[str, type[Any]]]:
    """The fields of a struct, as ``ctypes.Structure`` takes them.

    Args:
        structs: the structs among its fields.
        text: C to read in place of ``kernel.h``.

    >>> [name for name, _ in fields_of("A", text="struct A { const float* x, y; int64_t n[2]; };")]
    ['x', 'y', 'n']
    """
    known = {**_NUMBERS, **(structs or {})}
    found = _STRUCTS if text is None else dict(_STRUCT.findall(_without_comments(text)))
    fields = []
    for line in filter(None, map(str.strip, found[struct].split(";"))):
        read = _FIELD.fullmatch(line)
        if read is None or not (read[2] or read[1] in known):
            raise ValueError(f"{struct} in kernel.h has a field of an unknown kind: {line}")
        base = ctypes.c_void_p if read[2] else known[read[1]]
        for name in read[3].split(", "):
            fields.append((name, base * _length(read[4]) if read[4] else base))
    return fields


def _length(stated: str) -> int:
    return int(stated) if stated.isdigit() else CONSTANTS[stated]
