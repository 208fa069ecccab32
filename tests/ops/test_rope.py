"""Rotary embedding: what turning must and must not change."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from kvfold.errors import InputError
from kvfold.ops.rope import Rotary, following

EPS = torch.finfo(torch.float64).eps


def turned(rotary: Rotary, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    return rotary.apply(x, *rotary.cos_sin(positions, x.dtype))


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@settings(max_examples=25, deadline=None)
@given(
    pairs=st.integers(1, 9),
    rest=st.integers(0, 3),
    interleaved=st.booleans(),
    shift=st.integers(0, 10**6),
)
def test_scores_depend_on_distance_only(
    pairs: int, rest: int, interleaved: bool, shift: int
) -> None:
    rotary = Rotary(2 * pairs, interleaved=interleaved)
    q, k = numbers(2, 1, 3, 5, 2 * pairs + rest)
    positions = torch.arange(5)
    here = turned(rotary, q, positions) @ turned(rotary, k, positions).mT
    there = turned(rotary, q, positions + shift) @ turned(rotary, k, positions + shift).mT
    # An angle near `shift` is known to shift * eps; a score changes by its size times that.
    size = (q.norm(dim=-1)[..., None] * k.norm(dim=-1)[..., None, :]).max()
    assert (here - there).abs().max() <= 4 * EPS * (shift + 10) * size


@settings(max_examples=25, deadline=None)
@given(pairs=st.integers(1, 9), rest=st.integers(0, 3), interleaved=st.booleans())
def test_turning_is_a_rotation_of_the_first_dimensions(
    pairs: int, rest: int, interleaved: bool
) -> None:
    dim = 2 * pairs
    rotary = Rotary(dim, interleaved=interleaved)
    x = numbers(2, 3, 4, dim + rest)
    out = turned(rotary, x, torch.arange(4))
    assert torch.equal(out[..., dim:], x[..., dim:])
    assert torch.equal(out[:, :, 0], x[:, :, 0])  # position 0
    torch.testing.assert_close(out.norm(dim=-1), x.norm(dim=-1), rtol=8 * EPS, atol=0)


def test_a_pair_is_a_complex_number() -> None:
    rotary, x = Rotary(8, base=100.0, interleaved=True), numbers(1, 2, 5, 8)
    angles = torch.arange(5.0, dtype=torch.float64)[:, None] * torch.tensor(
        [100 ** (-j / 4) for j in range(4)], dtype=torch.float64
    )
    z = torch.view_as_complex(x.unflatten(-1, (4, 2)).contiguous())
    expected = torch.view_as_real(z * torch.polar(torch.ones_like(angles), angles)).flatten(-2)
    torch.testing.assert_close(turned(rotary, x, torch.arange(5)), expected, rtol=0, atol=32 * EPS)


def test_interleaved_is_half_split_with_its_dimensions_permuted() -> None:
    x = numbers(2, 3, 4, 10)
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7, 8, 9])  # even ones, odd ones, the rest
    at = torch.tensor([[3, 1, 4, 1], [5, 9, 2, 6]])
    by_pairs = turned(Rotary(8, interleaved=True), x, at)
    assert torch.equal(by_pairs[..., order], turned(Rotary(8), x[..., order], at))


def test_equals_transformers() -> None:
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, rope_theta=5e5)
    x, positions = numbers(1, 4, 7, 16).float(), torch.arange(7)
    cos, sin = LlamaRotaryEmbedding(config)(x, positions[None])
    expected, _ = apply_rotary_pos_emb(x, x, cos, sin)
    out = turned(Rotary(16, base=5e5), x, positions)
    # Their angles, up to 6, are float32: two roundings, and as many in the product.
    bound = (2 * 6 + 4) * torch.finfo(torch.float32).eps * x.abs().max()
    assert (out - expected).abs().max() <= bound


def test_given_frequencies_replace_the_base() -> None:
    plain = Rotary(8, base=700.0)
    given_ = Rotary(8, inv_freq=plain.frequencies())
    assert given_ == Rotary(8, inv_freq=tuple(plain.frequencies().tolist()))
    assert torch.equal(given_.frequencies(), plain.frequencies())
    halved = Rotary(8, inv_freq=plain.frequencies() / 2)
    x = numbers(1, 1, 6, 8)
    far, near = turned(halved, x, 2 * torch.arange(6)), turned(plain, x, torch.arange(6))
    torch.testing.assert_close(far, near, rtol=0, atol=64 * EPS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_is_rounded_once(dtype: torch.dtype) -> None:
    rotary, x = Rotary(16), numbers(1, 2, 9, 16).to(dtype)
    positions = torch.arange(10**5, 10**5 + 9)
    out = rotary.apply(x, *rotary.cos_sin(positions))
    assert out.dtype == dtype
    exact = turned(rotary, x.double(), positions)
    # Half a unit of the result, and float32 arithmetic on a pair before it.
    unit = torch.finfo(dtype).eps / 2 + 3 * torch.finfo(torch.float32).eps
    assert (out.double() - exact).abs().max() <= unit * math.sqrt(2) * x.double().abs().max()


def test_following_positions() -> None:
    assert following(3, []).tolist() == [0, 1, 2]
    assert following(3, [0, 0]).tolist() == [0, 1, 2]
    assert following(1, [4, 9]).tolist() == [[4], [9]]


@pytest.mark.parametrize(
    "options",
    [
        {"dim": 3},
        {"dim": 0},
        {"dim": 4, "base": 0.0},
        {"dim": 4, "base": math.inf},
        {"dim": 4, "inv_freq": torch.ones(4)},
        {"dim": 4, "inv_freq": (1.0, math.nan)},
    ],
)
def test_bad_options(options: dict[str, object]) -> None:
    with pytest.raises(InputError, match=r"rotary|inv_freq"):
        Rotary(**options)  # type: ignore[arg-type]


def test_heads_smaller_than_what_turns() -> None:
    with pytest.raises(InputError, match="dim=8 is more than the head's 4"):
        turned(Rotary(8), numbers(1, 1, 2, 4), torch.arange(2))
