"""The limits of the kernels, as their interface states them (see ``cpu/kernel.h``)."""

import re
from pathlib import Path

_STATED = re.compile(r"^ *KVF_(MAX_\w+|BLOCK) = (\d+)", re.MULTILINE)
_LIMITS = {
    name: int(number)
    for name, number in _STATED.findall(
        (Path(__file__).parent / "cpu" / "kernel.h").read_text("utf-8")
    )
}

MAX_DIM = _LIMITS["MAX_DIM"]  # numbers of a head
MAX_PARTS = _LIMITS["MAX_PARTS"]  # stores that one call reads
MAX_TOKENS = _LIMITS["MAX_TOKENS"]  # queries per sequence that the kernels are meant for
BLOCK = _LIMITS["BLOCK"]  # tokens of a packed block
