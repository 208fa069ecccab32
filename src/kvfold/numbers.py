"""The one place where numbers from people become numbers. No torch.

A kind of number has a range. ``read`` takes the words of a command line, ``check`` the argument
of a call; both take nothing else, name the option in what they complain of, and give the range.
No NaN and no infinity, no bools, no halves of a head. The ranges end far beyond any real use:
they are there so that no slip of a key becomes a loop without end.
"""

import math
import numbers
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction

from kvfold.errors import InputError
from kvfold.names import shown

_DECIMAL = {"k": 10**3, "M": 10**6, "G": 10**9}
_BINARY = {"Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30}
_UNITS = {unit.lower(): size for unit, size in {"": 1, **_DECIMAL, **_BINARY}.items()}
_WHOLE = re.compile(r"([+-]?[0-9]+(?:\.[0-9]+)?)\s*([kmg]i?)?(b?)", re.IGNORECASE)
_REAL = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)(e[+-]?[0-9]+)?", re.IGNORECASE)
_LONGEST = 64  # characters: every number in range is shorter
MOST_VALUES = 64  # of a comma list


@dataclass(frozen=True)
class Whole:
    """A whole number from ``least`` to ``most``.

    k, M and G are 1,000, 1,000² and 1,000³, whatever is counted; Ki, Mi and Gi are 1,024, 1,024²
    and 1,024³. A B after them says bytes and changes nothing (GB, GiB); where bytes are not what
    is counted, it stands for a billion.

    Attributes:
        what: said in place of the range. counts: ``tokens``, ``bytes``, or nothing in particular.

    >>> CONTEXT.read("8k", "--context"), CONTEXT.read("8Ki", "--context")
    (8000, 8192)
    """

    least: int
    most: int
    hint: str = "for instance 512, 8k (8,000), 8Ki (8,192) or 1M (1,000,000)"
    what: str = ""
    counts: str = ""

    @property
    def span(self) -> str:
        """The range in a few characters, for ``--help``."""
        return f"{brief(self.least)}..{brief(self.most)}"

    @property
    def units(self) -> str:
        """What the letters after a number stand for, for ``--help``; often nothing."""
        return {"tokens": "k 1,000, Ki 1,024", "bytes": "M MB, Mi MiB"}.get(self.counts, "")

    def written(self, value: int) -> str:
        """The words that give a value, whatever units come to mean."""
        return str(value)

    def brief(self, value: int) -> str:
        """A value as a person would type it."""
        return brief(value)

    def read(self, text: str, name: str) -> int:
        """The number that a text says.

        Raises:
            InputError: if it says none, or one out of range.
        """
        found = _WHOLE.fullmatch(text.strip()) if len(text) <= _LONGEST else None
        unit = self._unit((found[2] or "").lower(), bool(found[3])) if found else None
        value = Fraction(found[1]) * unit if found and unit else Fraction(1, 2)
        if value.denominator != 1:
            raise self._refusal(text, name)
        return self.check(int(value), name, text)

    def check(self, value: object, name: str, text: str | None = None) -> int:
        """The number itself, an ``int``.

        Raises:
            InputError: if it is none, or out of range.
        """
        whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
        number = int(value) if whole else 0  # type: ignore[call-overload]
        if not whole or not self.least <= number <= self.most:
            raise self._refusal(value if text is None else text, name)
        return number

    def _unit(self, unit: str, has_b: bool) -> int | None:
        """What a unit stands for here; None for one that makes no sense."""
        if has_b and self.counts != "bytes":
            return None if unit else _DECIMAL["G"]
        return _UNITS[unit]

    def _refusal(self, value: object, name: str) -> InputError:
        bounds = f"a whole number, at least {self.least:,}, at most {self.most:,}"
        return InputError(f"{name} {shown(value)}: expected {self.what or bounds}", self.hint)


@dataclass(frozen=True)
class Real:
    """A finite number from ``least`` to ``most``, or above ``least`` with ``above``.

    >>> FRACTION.read("0.05", "--warm-up")
    0.05
    """

    least: float
    most: float
    above: bool = False
    hint: str = "for instance 0.5 or 1e-3"

    @property
    def span(self) -> str:
        """The range in a few characters, for ``--help``."""
        return f"{'>' * self.above}{self.least:g}..{self.most:g}"

    def written(self, value: float) -> str:
        """The words that give a value."""
        return repr(value)

    def read(self, text: str, name: str) -> float:
        """The number that a text says.

        Raises:
            InputError: if it says none, or one out of range.
        """
        good = len(text) <= _LONGEST and _REAL.fullmatch(text.strip())
        return self.check(float(text) if good else math.nan, name, text)

    def check(self, value: object, name: str, text: str | None = None) -> float:
        """The number itself, a ``float``.

        Raises:
            InputError: if it is none, or out of range.
        """
        number = math.nan if isinstance(value, bool) else _float(value)
        if not self.least <= number <= self.most or (self.above and number == self.least):
            raise InputError(
                f"{name} {shown(value if text is None else text)}: expected a number, "
                f"{'above' if self.above else 'at least'} {self.least:g}, at most {self.most:g}",
                self.hint,
            )
        return number


@dataclass(frozen=True)
class Wholes:
    """Some whole numbers of a kind, each once.

    >>> Wholes(CONTEXT).read("512,8Ki", "--context")
    (512, 8192)
    """

    each: Whole

    @property
    def span(self) -> str:
        """The range in a few characters, for ``--help``."""
        return f"{self.each.span},..."

    @property
    def units(self) -> str:
        """What the letters after a number stand for, for ``--help``."""
        return self.each.units

    def written(self, values: Iterable[int]) -> str:
        """The words that give some values."""
        return ",".join(map(self.each.written, values))

    def brief(self, values: Iterable[int]) -> str:
        """Some values as a person would type them."""
        return ",".join(map(self.each.brief, values))

    def read(self, text: str, name: str) -> tuple[int, ...]:
        """The numbers between a text's commas.

        Raises:
            InputError: if there is none, too many of them, or one out of range.
        """
        return self._some((self.each.read(part, name) for part in parts(text, name)), name)

    def check(self, values: object, name: str) -> tuple[int, ...]:
        """The numbers of a sequence.

        Raises:
            InputError: if it is none or empty, or holds one out of range.
        """
        return self._some((self.each.check(value, name) for value in iterated(values, name)), name)

    def _some(self, numbers: Iterable[int], name: str) -> tuple[int, ...]:
        found: dict[int, None] = {}
        for number in numbers:
            found[number] = None
            _check_count(len(found), name)
        if not found:
            raise nothing(name)
        return tuple(found)


def parts(text: str, name: str) -> tuple[str, ...]:
    """What stands between commas, each once.

    Raises:
        InputError: if nothing does, or too much.

    >>> parts("bf16, int8,bf16", "--dtype")
    ('bf16', 'int8')
    """
    found = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not found:
        raise nothing(name)
    _check_count(len(found), name)
    return found


def _float(value: object) -> float:
    """The number as a float, NaN for what is none."""
    try:
        return float(value) if isinstance(value, numbers.Real) else math.nan
    except OverflowError:
        return math.inf


def iterated(values: object, name: str) -> Iterator[object]:
    """The values of a list, a tuple, a generator … but of no string, path or dictionary.

    Raises:
        InputError: for what has none.
    """
    try:
        if isinstance(values, str | bytes | os.PathLike | Mapping):
            raise TypeError
        return iter(values)  # type: ignore[call-overload]
    except TypeError as error:
        raise InputError(
            f"{name} {shown(values)}: expected a list", f"{name}=[...], even of one"
        ) from error


def _check_count(count: int, name: str) -> None:
    if count > MOST_VALUES:
        raise InputError(
            f"{name}: expected at most {MOST_VALUES} values, got more", "run it several times"
        )


def nothing(name: str) -> InputError:
    """What is said of a list without values."""
    return InputError(f"{name} is empty", "give one value, or several with commas between")


def brief(number: int) -> str:
    """As a person would type it.

    >>> brief(1 << 30), brief(50_000), brief(1001)
    ('1Gi', '50k', '1001')
    """
    for unit, size in (*reversed(_DECIMAL.items()), *reversed(_BINARY.items())):
        if number and number % size == 0:
            return f"{number // size}{unit}"
    return str(number)


# -- every kind of number that kvfold takes -----------------------------------------------------

# PyTorch takes 64 bits; one bit is left for what is added to a seed, layer by layer.
SEED = Whole(0, 2**63 - 1, "any whole number; 0 is the default")

TOKENS = Whole(1, 1 << 50, counts="tokens")
CONTEXT = Whole(1, 1 << 30, counts="tokens")
WINDOW = Whole(16, 1 << 30, "512 is usual", counts="tokens")
EVAL_WINDOW = Whole(2, 1 << 30, "512 is usual", counts="tokens")
NEEDLE = Whole(64, 1 << 24, "512 and 2Ki (2,048) are usual", counts="tokens")
LOOK_TOKENS = Whole(1, 1 << 20, "4096 is usual", counts="tokens")
CALIBRATION = Whole(1024, 1 << 40, "50,000 is good; --no-calibration uses none", counts="tokens")
HELD_OUT = Whole(0, 1 << 40, "16Ki (16,384) is usual", counts="tokens")
LIMIT = Whole(1, 1 << 30, "for instance 100")
ANSWER = Whole(1, 4096, "32 is the default", counts="tokens")

BATCH = Whole(1, 1 << 20, "for instance 1 or 8")
MICRO_BATCH = Whole(1, 1 << 16, "1 is the default; more needs more memory")
HEADS = Whole(1, 1 << 16, "for instance 32")
# The divisors of the source's number are what can be had; geometry knows and names them.
KV_HEADS = Whole(
    -(1 << 16), 1 << 16, "`kvfold inspect SRC` lists them", "a divisor of the source's KV heads"
)
HEAD_DIM = Whole(1, 1024, "64 and 128 are usual")
LATENT_SIZE = Whole(1, 1 << 16, "160+32 is a latent of 160 numbers and a rotary key of 32")
LAYER = Whole(0, 1 << 14, "layers are counted from 0")
LORA_RANK = Whole(0, 1 << 14, "for instance 8; 0 trains the weights themselves")

ROUNDS = Whole(1, 10_000, "9 is the default")
STARTS = Whole(1, 1000, "for instance 6")
STEPS = Whole(1, 1 << 16, "16 is the default")
FIT_STEPS = Whole(1, 1 << 20, "150 is the default; more lose less and take longer")
OUTPUT = Whole(2, 1 << 16, "64 is the default; the first comes with the prompt", counts="tokens")
THREADS = Whole(1, 1024, "as many as there are cores is the default")
GPUS = Whole(1, 1 << 16, "for instance 2")
KEEP = Whole(1, 10_000, "2 is the default")
BYTES = Whole(1, 1 << 50, "for instance 512Mi (MiB) or 1G (GB)", counts="bytes")
SHARD_BYTES = Whole(1, 1 << 50, "5G (5,000,000,000) is the default", counts="bytes")

GIGABYTES = Real(0, 1e9, above=True, hint="GB, for instance 80")
BANDWIDTH = Real(0, 1e9, above=True, hint="GB/s, for instance 3350")
FLOPS = Real(0, 1e9, above=True, hint="TFLOP/s, for instance 989")
FRACTION = Real(0, 1, hint="for instance 0.05")
RATE = Real(0, 1, hint="5e-4 for small models, 5e-5 for large ones")
CLIP = Real(0, 1e9, hint="1 is the default; 0 does not clip")
TEMPERATURE = Real(0.01, 100, hint="1 is the default")
BUDGET = Real(0, 1, above=True, hint="for instance 0.25")
SHARE = Real(0, 1e9, above=True, hint="a weight above 0, for instance NAME=2")
WEIGHT = Real(0, 1e9, hint="0 is the default")
KL = Real(0, 1e9, hint="nats per token, for instance 0.1")
RATIO = Real(0, 1e9, hint="for instance 1.05")
NEAR = Real(0, 1e9, hint="a difference of two logits, for instance 1e-3")
SECONDS = Real(0, 1e9, above=True, hint="seconds, for instance 600")
