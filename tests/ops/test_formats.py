"""Cache formats: what encoding may cost, what it must not, and how pages lay rows out."""

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfold.errors import InputError
from kvfold.kernels.layout import Layout
from kvfold.ops.format import Format
from kvfold.ops.formats import FORMATS, decode, encode, format_of
from kvfold.ops.formats.nl4 import LEVELS
from kvfold.ops.rotation import rotate
from tests.toolbox.attention_cases import noise

NAMES = list(FORMATS)
GROUP = FORMATS["int4"].group
SCALED = [name for name, fmt in FORMATS.items() if not fmt.plain]
DIMS = (1, 8, 13, 32, 59, 80, 576)

rows_of = st.builds(
    lambda dim, seed, exponent, spread: (
        noise(3, dim, seed=seed) * 2.0**exponent * (noise(3, dim, seed=seed + 1) * spread).exp()
    ),
    dim=st.integers(1, 100),
    seed=st.integers(0, 10**6),
    exponent=st.integers(-60, 60),
    spread=st.sampled_from([0.0, 1.0, 4.0]),
)


def through(rows: torch.Tensor, fmt: Format) -> torch.Tensor:
    return decode(*encode(rows, fmt), fmt, rows.shape[-1])


def scales_of(rows: torch.Tensor, fmt: Format) -> torch.Tensor:
    """Each number's scale, in float64."""
    _, scales = encode(rows, fmt)
    size = fmt.group if fmt.grouped else rows.shape[-1]
    return scales.double().repeat_interleave(size, -1)[..., : rows.shape[-1]]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dim", DIMS)
def test_shapes(name: str, dim: int) -> None:
    fmt = FORMATS[name]
    data, scales = encode(noise(2, 3, dim), fmt)
    assert data.dtype == torch.uint8
    assert data.shape == (2, 3, fmt.row_bytes(dim))
    assert scales.dtype == torch.bfloat16
    assert scales.shape == (2, 3, fmt.groups(dim))
    assert decode(data, scales, fmt, dim).shape == (2, 3, dim)
    assert decode(*encode(noise(0, dim), fmt), fmt, dim).shape == (0, dim)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(rows_of)
def test_int8_is_within_half_a_scale(rows: torch.Tensor) -> None:
    """Rounding to the nearest code; 2^-22 is for dividing and multiplying in float32."""
    scale = scales_of(rows, FORMATS["int8"])
    error = (through(rows, FORMATS["int8"]).double() - rows.double()).abs()
    assert bool((error <= scale * (0.5 + 127 * 2**-22)).all())


@settings(max_examples=100, deadline=None, derandomize=True)
@given(rows_of)
def test_int4_is_within_half_a_scale(rows: torch.Tensor) -> None:
    """But within a whole one where a number is nearly the negative of its group's largest."""
    scale = scales_of(rows, FORMATS["int4"])
    error = (through(rows, FORMATS["int4"]).double() - rows.double()).abs()
    clipped = rows.double() / scale > 7.5
    allowed = scale.abs() * torch.where(clipped, 1.0, 0.5) * (1 + 2**-18)
    assert bool((error <= allowed).all())


@settings(max_examples=100, deadline=None, derandomize=True)
@given(rows_of)
def test_nl4_takes_the_nearest_level(rows: torch.Tensor) -> None:
    """But for a number that is nearly the negative of its group's largest, the highest one."""
    scale = scales_of(rows, FORMATS["nl4"])[..., None]
    levels = torch.tensor(LEVELS, dtype=torch.float64)
    nearest = (rows.double()[..., None] - levels * scale).abs().amin(-1)
    error = (through(rows, FORMATS["nl4"]).double() - rows.double()).abs()
    assert bool((error <= nearest + scale[..., 0].abs() * 2**-15).all())


def test_nl4_loses_less_than_int4_in_as_many_bytes() -> None:
    """A tenth of normally distributed numbers' squared error, more where tails are heavier."""
    normal = noise(500, 128)
    for rows, share in ((normal, 0.9), (normal * normal.abs(), 0.8)):
        errors = [(through(rows, FORMATS[name]) - rows).square().sum() for name in ("nl4", "int4")]
        assert float(errors[0] / errors[1]) < share
    assert FORMATS["nl4"].bits_each(128) == FORMATS["int4"].bits_each(128)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(rows_of)
def test_fp8_is_within_half_a_unit_in_the_last_place(rows: torch.Tensor) -> None:
    """Three bits after the leading one: 2^-4 of the number, or half of 2^-9 scales."""
    scale = scales_of(rows, FORMATS["fp8"])
    error = (through(rows, FORMATS["fp8"]).double() - rows.double()).abs()
    allowed = torch.maximum(rows.double().abs() * 2**-4, scale * 2**-10)
    assert bool((error <= allowed * (1 + 2**-18)).all())


@settings(max_examples=100, deadline=None, derandomize=True)
@given(rows_of, st.sampled_from(SCALED))
def test_scales_are_the_least_that_overflow_no_code(rows: torch.Tensor, name: str) -> None:
    """Rounded up, by less than bfloat16's spacing, 2^-7."""
    fmt = FORMATS[name]
    top = {"fp8": 448, "int4": 8}.get(name, 127)
    size = fmt.group if fmt.grouped else rows.shape[-1]
    padded = torch.nn.functional.pad(rows, (0, -rows.shape[-1] % size))
    largest = padded.double().unflatten(-1, (-1, size)).abs().amax(-1)
    scales = encode(rows, fmt)[1].double().abs()
    assert bool((largest / scales <= top * (1 + 2**-23)).all())
    assert bool((largest / scales >= top * (1 - 2**-7)).all())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dim", DIMS)
def test_zeros_and_constants(name: str, dim: int) -> None:
    fmt = FORMATS[name]
    assert torch.equal(through(torch.zeros(2, dim), fmt), torch.zeros(2, dim))
    for value in (1.0, -3.0, 448.0, -0.125):
        got = through(torch.full((2, dim), value), fmt)
        # Every number gets the largest code, so only the scale's rounding, 2^-7, can be lost.
        assert bool(((got - value).abs() <= abs(value) * 2**-7).all())
        assert torch.equal(got, got[:, :1].expand_as(got))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("exponent", [-20, 0, 13])
def test_representable_numbers_survive(sign: int, exponent: int) -> None:
    """Codes times a bfloat16 scale, the largest code among them, come back bit for bit."""
    scale = sign * 2.0**exponent * 1.5
    whole = torch.arange(-127, 128).float() * scale
    assert torch.equal(through(whole[None], FORMATS["int8"])[0], whole)
    nibbles = torch.arange(-8, 8).float().repeat(4) * scale
    assert torch.equal(through(nibbles[None], FORMATS["int4"])[0], nibbles)
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    floats = codes[codes.isfinite()] * scale
    assert torch.equal(through(floats[None], FORMATS["fp8"])[0], floats)


@pytest.mark.parametrize("name", ["fp32", "fp16", "bf16"])
def test_unquantized_formats_round_once(name: str) -> None:
    fmt = FORMATS[name]
    assert fmt.plain
    rows = torch.cat([noise(4, 33) * 1e3, torch.tensor([[math.inf, -math.inf, 0.0] * 11])])
    assert torch.equal(through(rows, fmt), rows.to(fmt.dtype).float())
    assert bool(through(torch.full((1, 3), torch.nan), fmt).isnan().all())
    assert through(rows.bfloat16(), fmt).equal(rows.bfloat16().to(fmt.dtype).float())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_visible_and_in_its_row(name: str, value: float) -> None:
    """It must not become an innocent number, nor touch other rows or INT4 groups."""
    fmt = FORMATS[name]
    rows = noise(3, 64)
    rows[1, 40] = value
    got = through(rows, fmt)
    assert not bool(got[1, 40].isfinite())
    assert torch.equal(got[::2], through(rows[::2], fmt))
    if fmt.grouped:
        assert torch.equal(got[1, :32], through(rows[:, :32], fmt)[1])


@pytest.mark.parametrize("name", SCALED)
def test_numbers_of_extreme_size(name: str) -> None:
    """The largest float32 does not overflow; subnormal rows may vanish, but no further."""
    fmt = FORMATS[name]
    largest = torch.finfo(torch.float32).max
    rows = torch.tensor([[largest, -largest / 2, 0.0, largest / 3]], dtype=torch.float32)
    assert bool(through(rows * 0.98, fmt).isfinite().all())
    for tiny in (1e-38, 1e-41, 1e-45):
        rows = torch.tensor([[tiny, -tiny, 0.0]], dtype=torch.float32)
        smallest_scale = 2.0**-133
        assert float((through(rows, fmt) - rows).abs().max()) <= max(tiny / 8, smallest_scale)


def test_int4_nibbles_are_where_the_format_says() -> None:
    """Codes are offset by 8, an even dimension in the low half; the largest number gets 0."""
    row = torch.zeros(1, 32)
    row[0, 0], row[0, 1], row[0, 31] = 8.0, -7.0, 4.0
    data, scales = encode(row, FORMATS["int4"])
    assert scales.tolist() == [[-1.0]]
    assert data[0, 0] == (0 | 15 << 4)
    assert data[0, 15] == (8 | 4 << 4)
    assert data[0, 1] == (8 | 8 << 4)


@pytest.mark.parametrize("size", [1, 2, 32, 64, 512])
def test_rotation_is_orthogonal_symmetric_and_its_own_inverse(size: int) -> None:
    """Float32 sums of log2(size) <= 9 stages."""
    matrix = rotate(torch.eye(2 * size), size)
    torch.testing.assert_close(matrix @ matrix.mT, torch.eye(2 * size), atol=1e-5, rtol=0)
    assert torch.equal(matrix, matrix.mT)
    assert torch.equal(matrix[:size, size:], torch.zeros(size, size))
    assert bool((matrix[:size, :size].abs() == matrix[0, 0]).all())
    x = noise(5, 3, 2 * size)
    torch.testing.assert_close(rotate(rotate(x, size), size), x, atol=1e-5, rtol=0)
    assert rotate(x, 0) is x


@pytest.mark.parametrize("dim", DIMS)
def test_rotation_covers_the_stored_row(dim: int) -> None:
    for name in NAMES:
        size = FORMATS[name].rotation(dim)
        if not FORMATS[name].rotates_keys:
            assert size == 0
            continue
        assert size >= GROUP
        assert size & (size - 1) == 0
        assert FORMATS[name].stored_dim(dim) % size == 0


def test_rotation_saves_keys_with_outliers() -> None:
    """What it is for: one large dimension no longer costs the others of its group."""
    keys = noise(64, 128)
    keys[:, 5] *= 50
    size = FORMATS["int4"].rotation(128)
    plain = through(keys, FORMATS["int4"])
    rotated = rotate(through(rotate(keys, size), FORMATS["int4"]), size)
    others = torch.arange(128) != 5
    group = others & (torch.arange(128) < GROUP)

    def error(got: torch.Tensor) -> float:
        return float((got - keys)[:, group].square().mean())

    assert error(rotated) < error(plain) / 2


@pytest.mark.parametrize("name", ["int3", "INT8", "", "float"])
def test_unknown_formats(name: str) -> None:
    with pytest.raises(InputError, match=f"'{name}'") as error:
        format_of(name)
    assert "int8" in error.value.hint


def test_formats_of_torch_dtypes() -> None:
    assert format_of(torch.bfloat16).name == "bf16"
    with pytest.raises(InputError, match=r"torch\.int8"):
        format_of(torch.int8)


def packed_by_hand(rows: torch.Tensor, layout: Layout) -> torch.Tensor:
    """One page's bytes from encoded rows ``[page_size, row_bytes]``, number by number.

    As ``kernels/cpu/layout.h`` describes: keys [dim / STEP][16 tokens][STEP]; values
    [dim / 16][16 / STEP][16 dims][STEP tokens], or [16 tokens][dim] where STEP is 1.
    """
    name, padded = layout.fmt.name, layout.padded
    step = layout.fmt.step
    size = max(1, layout.fmt.bits // 8)
    page = torch.zeros(layout.page_bytes, dtype=torch.uint8)
    for token in range(layout.page_size):
        block, slot = divmod(token, 16)
        for d in range(layout.fmt.stored_dim(layout.dim)):
            if layout.key:
                at = (d // step * 16 + slot) * step + d % step
            elif step == 1:
                at = slot * padded + d
            else:
                at = ((d // 16 * (16 // step) + slot // step) * 16 + d % 16) * step + slot % step
            at += block * 16 * padded
            if layout.fmt.bits != 4:
                page[at * size : (at + 1) * size] = rows[token, d * size : (d + 1) * size]
                if name == "int8" and layout.key:
                    page[at] ^= 0x80
                continue
            # A step's first four numbers are in the low halves of four bytes.
            code = int(rows[token, d // 2]) >> (d % 2 * 4) & 15
            byte, half = at // 8 * 4 + at % 4, at % 8 // 4
            page[byte] |= code << (4 * half)
    return page


@pytest.mark.parametrize("key", [True, False])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dim", [1, 13, 32, 59])
def test_layout_unpacks_what_is_packed_by_hand(name: str, dim: int, key: bool) -> None:
    fmt = FORMATS[name]
    layout = Layout(fmt, dim, 32, packed=True, key=key)
    rows = torch.stack([encode(noise(32, dim, seed=s), fmt)[0] for s in (1, 2)])
    pages = torch.stack([packed_by_hand(r, layout) for r in rows])
    assert pages.shape == (2, layout.page_bytes)
    assert torch.equal(layout.rows(pages), rows)
    plain = Layout(fmt, dim, 7, packed=False, key=key)
    assert torch.equal(plain.rows(rows[:, :7].flatten(1)), rows[:, :7])


@pytest.mark.parametrize("name", SCALED)
def test_layout_of_scales(name: str) -> None:
    """Packed [block][group][16 tokens], otherwise [token][group]."""
    fmt = FORMATS[name]
    groups = fmt.groups(80)
    page = torch.arange(32 * groups)
    got = Layout(fmt, 80, 32, packed=True, key=True).scales(page)
    assert got.shape == (32, groups)
    for token in (0, 5, 16, 31):
        for group in range(groups):
            assert got[token, group] == (token // 16 * groups + group) * 16 + token % 16
    plain = Layout(fmt, 80, 32, packed=False, key=True).scales(page)
    assert torch.equal(plain, page.unflatten(0, (32, groups)))


def test_codes_number_the_formats_and_copies_are_the_format() -> None:
    """Kernels know a format by its code; copied caches hold copies of their formats."""
    assert [fmt.code for fmt in FORMATS.values()] == list(range(len(FORMATS)))
    for fmt in FORMATS.values():
        for twin in (copy.deepcopy(fmt), pickle.loads(pickle.dumps(fmt))):
            assert twin == fmt
            rows = noise(2, 40)
            assert torch.equal(encode(rows, twin)[0], encode(rows, fmt)[0])
