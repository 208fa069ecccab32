"""Arithmetic about heads and bytes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfold.errors import InputError
from kvfold.geometry import AttentionGeometry, LatentGeometry, divisors
from kvfold.nn import LatentAttention

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


@given(kv_heads=st.integers(1, 8), group_size=st.integers(1, 8), tokens=sizes, context=sizes)
def test_flops_add_up(kv_heads: int, group_size: int, tokens: int, context: int) -> None:
    geometry = AttentionGeometry(3, kv_heads * group_size, kv_heads, 16, 24, 99)
    steps = sum(geometry.decode_flops(context) for _ in range(tokens))
    assert steps == geometry.forward_flops(tokens, context)  # causal masks are not discounted
    assert geometry.forward_flops(tokens) == geometry.forward_flops(tokens, tokens)
    assert geometry.projection_flops(tokens) == 2 * tokens * geometry.attention_parameters()
    cached = geometry.projection_flops(tokens, kv_tokens=0)
    assert cached == 2 * tokens * geometry.query_parameters()


@given(kv_heads=st.integers(1, 32), group_size=st.integers(1, 8))
def test_folding_cuts_parameters_and_bytes_but_not_attention_flops(
    kv_heads: int, group_size: int
) -> None:
    source = AttentionGeometry(2, kv_heads * group_size, kv_heads, 16, 24, 99)
    folded = source.with_kv_heads(1)
    assert source.kv_parameters() == kv_heads * folded.kv_parameters()
    assert source.query_parameters() == folded.query_parameters()
    assert source.attention_flops(1, 1000) == folded.attention_flops(1, 1000)


def test_parameters_of_a_known_model() -> None:
    # Qwen2-0.5B: 24 layers, 14 heads, 2 KV heads, 896 wide; q, k and v have biases.
    qwen = AttentionGeometry(24, 14, 2, 64, 64, 896)
    weights = 896 * 896 * 2 + 128 * 896 * 2
    assert qwen.attention_parameters() == 24 * weights
    assert qwen.attention_parameters(qkv_bias=True) == 24 * (weights + 896 + 128 + 128)
    assert qwen.attention_parameters(qk_norm=True) == 24 * (weights + 2 * 64)
    assert qwen.kv_parameters(bias=True) == 24 * 2 * 128 * 897


@pytest.mark.parametrize("q_lora_rank", [0, 24])
def test_latent_parameters_are_those_of_the_layer(q_lora_rank: int) -> None:
    layer = LatentAttention(
        48, 6, kv_lora_rank=20, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=10,
        q_lora_rank=q_lora_rank or None,
    )  # fmt: skip
    geometry = LatentGeometry(3, 6, 6, 12, 10, 48, 20, 4, q_lora_rank)
    counted = sum(p.numel() for name, p in layer.named_parameters() if "norm" not in name)
    assert geometry.kv_parameters() + geometry.query_parameters() == 3 * counted
    assert geometry.kv_bytes_per_token(8) == 3 * 24
    with pytest.raises(InputError, match="no KV heads"):
        geometry.with_kv_heads(1)
