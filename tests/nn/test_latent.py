"""Multi-head latent attention against transformers' own, which expands every latent."""

from typing import Any

import pytest
import torch

from kvfold.errors import InputError
from kvfold.nn import LatentAttention, Rotary

transformers = pytest.importorskip("transformers")

SIZES: dict[str, Any] = {
    "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4, "kv_lora_rank": 24,
    "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 10, "num_hidden_layers": 1,
    "intermediate_size": 32, "vocab_size": 32, "attn_implementation": "eager",
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 0.7,
    "original_max_position_embeddings": 32,
}  # fmt: skip
CASES = [
    ("deepseek_v2", {"q_lora_rank": None}),
    ("deepseek_v2", {"q_lora_rank": 20, "attention_bias": True}),
    ("deepseek_v3", {"q_lora_rank": 20}),
    ("deepseek_v3", {"q_lora_rank": None, "rope_interleave": False}),
    ("deepseek_v3", {"q_lora_rank": 20, "rope_parameters": YARN}),
    ("youtu", {"q_lora_rank": None, "attention_bias": True}),
    ("youtu", {"q_lora_rank": 20}),
]


def theirs_and_ours(kind: str, options: dict[str, Any]) -> tuple[Any, Any, LatentAttention]:
    """A layer of transformers' with its rotary embedding, and ours with the same weights."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **SIZES | options)
    model = transformers.AutoModel.from_config(config).to(torch.float64).eval()
    layer, turning = model.layers[0].self_attn, model.rotary_emb
    for weight in layer.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    own = LatentAttention(
        config.hidden_size, config.num_attention_heads, kv_lora_rank=config.kv_lora_rank,
        qk_nope_head_dim=config.qk_nope_head_dim, qk_rope_head_dim=config.qk_rope_head_dim,
        v_head_dim=config.v_head_dim, q_lora_rank=config.q_lora_rank,
        bias=bool(config.attention_bias), scale=layer.scaling, dtype=torch.float64,
        rotary=Rotary(
            config.qk_rope_head_dim, interleaved=getattr(config, "rope_interleave", True),
            inv_freq=turning.inv_freq, attention_factor=turning.attention_scaling,
        ),
    )  # fmt: skip
    own.load_state_dict(layer.state_dict())
    return layer, turning, own


def expected(layer: Any, turning: Any, x: torch.Tensor) -> torch.Tensor:
    """What transformers computes, without a cache."""
    tokens = x.shape[1]
    places = turning(x, torch.arange(tokens)[None])
    hidden = torch.full((tokens, tokens), -torch.inf, dtype=x.dtype).triu(1)[None, None]
    out: torch.Tensor = layer(x, position_embeddings=places, attention_mask=hidden)[0]
    return out


@pytest.mark.parametrize(("kind", "options"), CASES)
@torch.no_grad()
def test_equals_transformers_with_and_without_cache(kind: str, options: dict[str, Any]) -> None:
    layer, turning, own = theirs_and_ours(kind, options)
    x = torch.randn(2, 21, 64, dtype=torch.float64)
    theirs = expected(layer, turning, x)
    # Angles are float32 in transformers: at position 20 they are off by 20 * 2**-24.
    close: dict[str, Any] = {"rtol": 0.0, "atol": 1e-5 * float(theirs.abs().max())}
    torch.testing.assert_close(own(x), theirs, **close)
    own, x = own.float(), x.float()
    cache = own.new_cache(2, dtype="fp32", kind="paged", page_size=16)
    parts = [own(part, cache=cache) for part in x.split([7, 1, 1, 11, 1], 1)]
    torch.testing.assert_close(torch.cat(parts, 1).double(), theirs, **close)
    assert cache.lengths == [21, 21]


@torch.no_grad()
def test_padding_on_either_side_changes_nothing() -> None:
    _, _, own = theirs_and_ours("deepseek_v3", {"q_lora_rank": None})
    own = own.float()
    x, more = torch.randn(2, 9, 64), torch.randn(2, 1, 64)
    x[1, 5:] = 7.0
    cache = own.new_cache(2, dtype="fp32")
    first = own(x, lengths=torch.tensor([9, 5]), cache=cache)
    second = own(more, cache=cache)
    assert cache.lengths == [10, 6]
    alone = own(torch.cat([x[1:, :5], more[1:]], 1))
    torch.testing.assert_close(first[1, :5], alone[0, :5], rtol=0, atol=2e-5)
    torch.testing.assert_close(second[1], alone[0, 5:], rtol=0, atol=2e-5)
    left = torch.cat([torch.full((1, 3, 64), 7.0), x[1:, :5], more[1:]], 1)
    start, places = torch.tensor([3]), (torch.arange(9) - 3).clamp(0)
    cache = own.new_cache(1, dtype="fp32")
    parts = [
        own(left[:, :8], start=start, positions=places[:8], cache=cache),
        own(left[:, 8:], start=start, positions=places[8:], cache=cache),
    ]
    torch.testing.assert_close(torch.cat(parts, 1)[0, 3:], alone[0], rtol=0, atol=2e-5)


def test_gradients_equal_transformers() -> None:
    layer, turning, own = theirs_and_ours("youtu", {"q_lora_rank": 20})
    x = torch.randn(1, 9, 64, dtype=torch.float64)
    expected(layer, turning, x).square().sum().backward()
    own(x).square().sum().backward()
    for name, weight in layer.named_parameters():
        found = own.get_parameter(name).grad
        assert found is not None
        close = 1e-5 * float(weight.grad.abs().max())
        torch.testing.assert_close(found, weight.grad, rtol=0, atol=close, msg=name)


def test_what_does_not_fit_is_refused() -> None:
    sizes: dict[str, Any] = {"kv_lora_rank": 24, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8}
    for options, said in (
        ({"qk_rope_head_dim": 7}, "rotary dim=7"),
        ({"rotary": Rotary(4)}, "rotary dim=4 with qk_rope_head_dim=8"),
        ({"norm_eps": 0.0}, "norm_eps"),
        ({"q_lora_rank": 0}, "q_lora_rank=0"),
    ):
        with pytest.raises(InputError, match=said):
            LatentAttention(64, 4, **sizes | options)
    layer = LatentAttention(64, 4, **sizes)
    with torch.no_grad(), pytest.raises(InputError, match="kv_lora_rank"):
        layer(torch.zeros(1, 2, 64), cache=LatentAttention(64, 4, **sizes | {"kv_lora_rank": 8}).new_cache())  # noqa: E501  # fmt: skip
    with pytest.raises(InputError, match="gradient"):
        layer(torch.zeros(1, 2, 64), cache=layer.new_cache())
