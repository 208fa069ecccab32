"""Numbers from people: exact, within bounds, and nothing else."""

import math
from fractions import Fraction
from functools import partial
from typing import Any

import click
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvfold import numbers
from kvfold.cli.options import Number
from kvfold.errors import InputError
from kvfold.healing.request import HealRequest
from kvfold.numbers import Real, Whole, Wholes, parts
from kvfold.requests import options_of
from tests.conftest import Kvfold
from tests.toolbox.commands import options

KINDS: dict[str, Whole | Real] = {
    name: kind for name, kind in vars(numbers).items() if isinstance(kind, Whole | Real)
}
WHOLES = {name: kind for name, kind in KINDS.items() if isinstance(kind, Whole)}
NUMERIC = [(words, option) for words, option in options() if isinstance(option.type, Number)]
NASTY = [
    "", " ", "nan", "NaN", "inf", "-inf", "1e999", "-1e999", "9" * 5000, "0x10", "1_000", "١٢",
    "１２", "1,5", "--", "None", "True", "1e3k", "k", "½", "1.5", "+", "\x00", "\ud800", "1 2",
    "-1", str(2**64), str(2**63), "1e-400", "1" + "0" * 60 + "G",
]  # fmt: skip


@pytest.mark.parametrize("name", WHOLES)
@given(data=st.data())
def test_whole_numbers_in_range_are_taken_exactly(name: str, data: Any) -> None:
    kind = WHOLES[name]
    number = data.draw(st.integers(kind.least, kind.most))
    assert kind.read(str(number), "--x") == number
    assert kind.read(f" {number} ", "--x") == number
    assert kind.check(number, "x") == number


SIZES = {"k": 10**3, "M": 10**6, "G": 10**9, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}


@given(st.integers(0, 2**14), st.sampled_from([*SIZES]), st.sampled_from([str.lower, str.upper]))
def test_units_are_decimal_unless_they_say_binary(number: int, unit: str, case: Any) -> None:
    size, written = SIZES[unit], case(unit)
    assert numbers.TOKENS.read(f"{number + 1}{written}", "--x") == size * (number + 1)
    half = Fraction(2 * number + 1, 2)
    assert numbers.TOKENS.read(f"{float(half)}{written}", "--x") == size * half
    for suffix in ("", "b", "B"):
        assert numbers.BYTES.read(f"{number + 1}{written}{suffix}", "--x") == size * (number + 1)


def test_a_billion_tokens_are_no_byte() -> None:
    assert numbers.TOKENS.read("1B", "--tokens") == 10**9
    assert numbers.BYTES.read("12B", "--working-set") == 12
    with pytest.raises(InputError, match="--tokens 1kB"):
        numbers.TOKENS.read("1kB", "--tokens")


@pytest.mark.parametrize("name", WHOLES)
@given(data=st.data())
def test_what_is_shown_is_read_as_the_same(name: str, data: Any) -> None:
    kind = WHOLES[name]
    number = data.draw(
        st.integers(kind.least, kind.most) | st.sampled_from([kind.least, kind.most])
    )
    assert kind.read(kind.brief(number), "--x") == kind.read(kind.written(number), "--x") == number


def test_the_help_of_every_size_says_what_its_units_are() -> None:
    counted = 0
    for words, option in NUMERIC:
        kind = option.type.kind if isinstance(option.type, Number) else None
        if isinstance(kind, Whole | Wholes) and kind.units:
            counted += 1
            said = option.help or ""
            assert "Ki 1,024" in said or "Mi MiB" in said, (words, option)
    assert counted > 15


def test_the_command_line_and_calls_mean_the_same() -> None:
    """10M tokens are the default of healing, however they are asked for."""
    default = options_of(HealRequest)["tokens"].default
    assert numbers.TOKENS.read("10M", "--tokens") == default == 10_000_000


@given(st.integers())
def test_beyond_the_range_is_refused_with_the_range(number: int) -> None:
    kind = numbers.ROUNDS
    if kind.least <= number <= kind.most:
        return
    for take in (
        partial(kind.read, str(number), "--rounds"),
        partial(kind.check, number, "--rounds"),
    ):
        with pytest.raises(InputError, match=r"--rounds .*at least 1, at most 10,000") as caught:
            take()
        assert caught.value.hint
        assert len(caught.value.message) < 200


@pytest.mark.parametrize("text", NASTY, ids=ascii)
def test_nasty_words_are_numbers_in_range_or_refused(text: str) -> None:
    for kind in KINDS.values():
        _in_range_or_refused(kind, partial(kind.read, text, "--x"))


@given(st.sampled_from(list(KINDS.values())), st.text())
def test_any_words_are_numbers_in_range_or_refused(kind: Whole | Real, text: str) -> None:
    _in_range_or_refused(kind, lambda: kind.read(text, "--x"))


@pytest.mark.parametrize(
    "value",
    [None, True, False, "4", b"4", [4], (4,), {4}, 4.5, math.nan, math.inf, -math.inf, 1j, object,
     10**400, -(10**400), Fraction(1, 3), torch.tensor(4), np.array([4]), np.nan, np.bool_(True)],
    ids=ascii,
)  # fmt: skip
def test_any_object_is_a_number_in_range_or_refused(value: object) -> None:
    number = isinstance(value, float | int | Fraction) and not isinstance(value, bool)
    for kind in KINDS.values():
        _in_range_or_refused(kind, partial(kind.check, value, "x"))
        if not number:
            with pytest.raises(InputError, match="x "):
                kind.check(value, "x")


def _in_range_or_refused(kind: Whole | Real, take: Any) -> None:
    try:
        found = take()
    except InputError as error:
        assert error.hint  # noqa: PT017
        assert len(error.message) < 250  # noqa: PT017
    else:
        assert type(found) is (int if isinstance(kind, Whole) else float)
        assert kind.least <= found <= kind.most


def test_numpy_numbers_are_numbers() -> None:
    assert numbers.CONTEXT.check(np.int64(4), "x") == 4
    assert numbers.FRACTION.check(np.float32(0.5), "x") == 0.5
    assert numbers.FRACTION.check(1, "x") == 1.0


def test_seeds_are_what_torch_takes_with_a_layer_added() -> None:
    for seed in (numbers.SEED.least, numbers.SEED.most):
        torch.Generator().manual_seed(seed + numbers.LAYER.most)


def test_lists_end() -> None:
    many = ",".join(map(str, range(1, 10**5)))
    for take in (
        lambda: Wholes(numbers.CONTEXT).read(many, "--context"),
        lambda: Wholes(numbers.CONTEXT).check(iter(range(1, 10**9)), "--context"),
        lambda: parts(many, "--dtype"),
    ):
        with pytest.raises(InputError, match="at most 64 values"):
            take()
    for empty in ("", ",", " , ,"):
        with pytest.raises(InputError, match="empty"):
            parts(empty, "--dtype")


def test_no_option_reads_numbers_by_itself() -> None:
    for words, option in options():
        assert not isinstance(option.type, click.types.IntParamType | click.types.FloatParamType), (
            words,
            option.name,
        )
    assert len(NUMERIC) > 40


@pytest.mark.parametrize(("words", "option"), NUMERIC, ids=lambda each: str(each))
def test_options_refuse_before_anything_else(
    words: tuple[str, ...], option: click.Option, kvfold: Kvfold
) -> None:
    """A number is looked at before any file: exit 2, the option's name, its range, a hint."""
    required = ["SRC", "OUT"][: sum(isinstance(p, click.Argument) for p in _params(words))]
    more = [each for p in _params(words) if p.required and p.name != option.name
            and isinstance(p, click.Option) for each in (p.opts[0], "1")]  # fmt: skip
    for value in ("nan", "9" * 40, "1e999", "-9" * 9, "", "12x"):
        run = kvfold(*words, *required, *more, f"{option.opts[0]}={value}")
        assert run.code == 2, run.err
        assert run.err.startswith(f"error: {option.opts[0]} "), run.err
        assert "\nhint: " in run.err
        assert value == "" or any(word in run.err for word in ("at least", "above", "divisor"))


def _params(words: tuple[str, ...]) -> list[click.Parameter]:
    from tests.toolbox.commands import command_of

    return command_of(words).params


def test_help_shows_ranges(kvfold: Kvfold) -> None:
    out = kvfold("bench", "attention", "--help").out
    assert "--rounds 1..10k" in out
    assert "--context 1..1Gi,..." in out
