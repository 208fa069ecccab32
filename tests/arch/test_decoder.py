"""What configs describe, against what transformers itself makes of them."""

from collections.abc import Iterator
from typing import Any

import pytest
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from kvfold.arch.config import plain_config
from kvfold.arch.decoder import describe
from kvfold.arch.families import BY_TYPE, FAMILIES
from kvfold.arch.layers import CHUNKED, FULL, LATENT, RECURRENT, SLIDING
from kvfold.errors import CheckpointError

# Whose configs say nothing of attention heads, or only layer by layer.
NOT_DESCRIBED = {"blt", "falcon_mamba", "mamba", "prophetnet", "rwkv"}
PER_LAYER = {"dots3_note", "dots3_note_text"}


def causal_configs() -> Iterator[Any]:
    """The default config of every architecture that transformers has for causal models."""
    for kind in MODEL_FOR_CAUSAL_LM_MAPPING:
        if kind.model_type not in PER_LAYER:
            try:
                yield kind()
            except Exception:  # some have no defaults that fit together
                continue


def test_every_causal_model_of_transformers_is_described() -> None:
    """Declared or not: as many layers and heads as transformers' config says."""
    seen = set()
    for config in causal_configs():
        text = config.get_text_config(decoder=True)
        try:
            decoder = describe(plain_config(text))
        except CheckpointError:
            assert config.model_type in NOT_DESCRIBED
            continue
        seen.add(config.model_type)
        assert len(decoder.layers) == text.num_hidden_layers, config.model_type
        layer = decoder.layers[0]
        if layer.kind == RECURRENT:
            continue
        assert layer.num_heads == text.num_attention_heads, config.model_type
        own = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        if layer.kind != LATENT and config.model_type != "falcon":
            assert layer.num_kv_heads == own, config.model_type
    assert len(seen) > 100
    assert {"gpt_neox", "opt", "gptj", "falcon", "qwen3_moe", "mixtral", "deepseek_v3"} <= seen


def test_windows_are_those_of_transformers_own_cache() -> None:
    compared = 0
    for config in causal_configs():
        text = config.get_text_config(decoder=True)
        if not getattr(text, "layer_types", None) or config.model_type in NOT_DESCRIBED:
            continue
        decoder = describe(plain_config(text))
        try:
            layers = DynamicCache(config=text).layers
        except (KeyError, ValueError):  # needs layers that its own module makes, or more entries
            continue
        for own, layer in zip(layers, decoder.layers, strict=False):  # the last may share one
            if layer.shared:
                assert not isinstance(own, DynamicLayer), config.model_type
            elif type(own).__name__ == "LinearAttentionLayer":
                assert layer.kind == RECURRENT, config.model_type
            elif type(own) in (DynamicLayer, DynamicSlidingWindowLayer):
                assert layer.kind != RECURRENT, config.model_type
                window = own.sliding_window if own.is_sliding else None
                assert layer.window == window, config.model_type
                compared += 1
    assert compared > 1000


@pytest.mark.parametrize(
    ("config", "kinds"),
    [
        ({"model_type": "gemma2", "sliding_window": 8}, [SLIDING, FULL] * 3),
        ({"model_type": "llama", "sliding_window": 8}, [SLIDING] * 6),
        ({"model_type": "qwen2", "sliding_window": 8, "use_sliding_window": False}, [FULL] * 6),
        ({"sliding_window": 8, "sliding_window_pattern": 3}, [SLIDING, SLIDING, FULL] * 2),
        ({"model_type": "llama4", "attention_chunk_size": 8},
         [CHUNKED, CHUNKED, CHUNKED, FULL, CHUNKED, CHUNKED]),
        ({"layer_types": ["linear_attention", "full_attention"] * 3}, [RECURRENT, FULL] * 3),
        ({"layer_types": ["sliding_attention", "full_attention"] * 3}, [FULL] * 6),
        ({"kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 6},
         [LATENT] * 6),
    ],
)  # fmt: skip
def test_kinds_of_layers(config: dict[str, Any], kinds: list[str]) -> None:
    sizes = {"hidden_size": 48, "num_attention_heads": 6, "num_hidden_layers": 6}
    decoder = describe({**sizes, **config})
    assert [layer.kind for layer in decoder.layers] == kinds
    assert all(layer.kv_numbers() == 0 for layer in decoder.layers if layer.kind == RECURRENT)


def test_layers_that_share_keep_nothing() -> None:
    config = {"hidden_size": 48, "num_attention_heads": 6, "num_hidden_layers": 3}
    whole, last = describe(config), describe({**config, "num_kv_shared_layers": 1})
    assert [layer.shared for layer in last.layers] == [False, False, True]
    assert 3 * last.kv_bytes_per_token() == 2 * whole.kv_bytes_per_token()


def test_lists_that_are_too_short_are_told() -> None:
    config = {"hidden_size": 48, "num_attention_heads": 6, "num_hidden_layers": 3}
    with pytest.raises(CheckpointError, match="layer_types has 1 entries"):
        describe({**config, "layer_types": ["full_attention"]})


def test_architectures_are_found_by_themselves() -> None:
    assert {family.name for family in FAMILIES} < set(BY_TYPE)
    assert sum(len(family.model_types) for family in set(BY_TYPE.values())) == len(BY_TYPE)
