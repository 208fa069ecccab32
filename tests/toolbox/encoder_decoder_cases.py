"""Tiny random encoder-decoder models, and inputs for them."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoModelForSpeechSeq2Seq

from tests.toolbox.tiny import VOCABULARY

_WORDS: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
}
_BART: dict[str, Any] = _WORDS | {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 128,
    "init_std": 0.3,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
}
_T5: dict[str, Any] = _WORDS | {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_heads": 4,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
    "initializer_factor": 3.0,
    "dropout_rate": 0.0,
}
_SIDE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "sliding_window": 16,
    "initializer_range": 0.3,
    "attention_dropout": 0.0,
    "dropout_rate": 0.0,
}
# name of the case -> (model_type, config)
ENCODER_DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bart": ("bart", _BART),
    "mbart": ("mbart", _BART),
    "marian": ("marian", _BART | {"decoder_vocab_size": VOCABULARY}),
    "pegasus": ("pegasus", _BART),
    "blenderbot": ("blenderbot", _BART),
    "m2m_100": ("m2m_100", _BART | {"encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0}),
    # Architectures without sdpa, whose decoders do not say that they are causal:
    "pegasus_x": ("pegasus_x", _BART | {"block_size": 8, "num_global_tokens": 2}),
    "nllb-moe": (
        "nllb-moe",
        _BART | {"num_experts": 4, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0},
    ),
    "t5": ("t5", _T5),
    "mt5": ("mt5", _T5),
    "umt5": ("umt5", _T5),
    "t5gemma": ("t5gemma", _WORDS | {"encoder": _SIDE, "decoder": _SIDE}),
    "whisper": (
        "whisper",
        _BART
        | {
            "num_mel_bins": 8,
            "max_source_positions": 20,
            "max_target_positions": 128,
            "begin_suppress_tokens": None,
            "suppress_tokens": None,
        },
    ),
}


def make_encoder_decoder(case: str, seed: int = 0) -> Any:
    """A random model of a case, in float32."""
    model_type, config = ENCODER_DECODERS[case]
    torch.manual_seed(seed)
    made = AutoConfig.for_model(model_type, **config)
    auto = AutoModelForSpeechSeq2Seq if model_type == "whisper" else AutoModelForSeq2SeqLM
    model = auto.from_config(made, attn_implementation="eager")
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def source_of(model: Any, rows: int = 2, length: int = 13) -> dict[str, torch.Tensor]:
    """What the encoder reads."""
    generator = torch.Generator().manual_seed(11)
    if model.config.model_type == "whisper":
        shape = rows, model.config.num_mel_bins, 2 * model.config.max_source_positions
        return {"input_features": torch.randn(shape, generator=generator)}
    return {"input_ids": torch.randint(3, VOCABULARY, (rows, length), generator=generator)}


def decoder_prompt(rows: int = 2, length: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(12)
    return torch.randint(3, VOCABULARY, (rows, length), generator=generator)
