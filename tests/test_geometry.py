"""Arithmetic about heads and bytes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfold.errors import InputError
from kvfold.geometry import AttentionGeometry, divisors

sizes = st.integers(1, 64)


@given(kv_heads=st.integers(1, 32), group_size=st.integers(1, 8), layers=sizes, head_dim=sizes)
def test_folding_divides_the_cache(
    kv_heads: int, group_size: int, layers: int, head_dim: int
) -> None:
    heads = kv_heads * group_size
    geometry = AttentionGeometry(layers, heads, kv_heads, head_dim, head_dim, 99)
    for fewer in divisors(kv_heads):
        folded = geometry.with_kv_heads(fewer)
        assert folded.group_size * fewer == heads
        ratio = kv_heads // fewer
        assert geometry.kv_bytes_per_token() == ratio * folded.kv_bytes_per_token()
        assert geometry.attention_parameters() >= folded.attention_parameters()


@given(st.integers(1, 500))
def test_divisors(number: int) -> None:
    assert divisors(number) == [n for n in range(1, number + 1) if number % n == 0]


def test_known_models() -> None:
    llama2_7b = AttentionGeometry(32, 32, 32, 128, 128, 4096)
    assert llama2_7b.kv_bytes_per_token() == 2 * 32 * 32 * 128 * 2
    assert llama2_7b.kind == "MHA"
    smollm2 = AttentionGeometry(30, 9, 3, 64, 64, 576)
    assert (smollm2.kind, smollm2.kv_bytes_per_token()) == ("GQA", 23040)
    assert smollm2.with_kv_heads(1).kind == "MQA"
    assert smollm2.kv_bytes_per_token(bits=8) == 11520


@pytest.mark.parametrize("bad", [0, -1, 2, 4, 6])
def test_impossible_folds(bad: int) -> None:
    with pytest.raises(InputError) as error:
        AttentionGeometry(30, 9, 3, 64, 64, 576).with_kv_heads(bad)
    assert "1, 3" in error.value.hint


def test_kv_heads_must_divide_heads() -> None:
    with pytest.raises(InputError, match="does not divide"):
        AttentionGeometry(1, 9, 2, 64, 64, 576)
