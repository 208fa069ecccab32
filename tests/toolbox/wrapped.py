"""Tiny random models of which a language model is a part, beside one that sees."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from tests.toolbox.tiny import VOCABULARY

_TEXT = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8, "pad_token_id": 0,
}  # fmt: skip
_SEEING = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 16, "patch_size": 8,
}  # fmt: skip
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "gemma3": (
        {
            "model_type": "gemma3_text", "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        {"model_type": "siglip_vision_model"},
        {
            "mm_tokens_per_image": 4, "image_token_index": 90,
            "boi_token_index": 91, "eoi_token_index": 92,
        },
    ),
    "llava": (
        {"model_type": "llama"},
        {"model_type": "clip_vision_model", "projection_dim": 32},
        {"image_token_index": 90},
    ),
    "mistral3": (
        {"model_type": "mistral"}, {"model_type": "pixtral"}, {"image_token_index": 90}
    ),
    "internvl": (
        {"model_type": "qwen3"},
        {"model_type": "internvl_vision", "image_size": [16, 16], "patch_size": [8, 8]},
        {"image_token_id": 90},
    ),
    "qwen2_5_vl": (
        {
            "model_type": "qwen2_5_vl_text",
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]},
        },
        {
            "model_type": "qwen2_5_vl", "depth": 1, "num_heads": 2, "out_hidden_size": 32,
            "fullatt_block_indexes": [0],
        },
        {"image_token_id": 90, "video_token_id": 91},
    ),
    "qwen3_vl": (
        {
            "model_type": "qwen3_vl_text",
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1]},
        },
        {
            "model_type": "qwen3_vl", "depth": 1, "num_heads": 2, "out_hidden_size": 32,
            "num_position_embeddings": 16, "deepstack_visual_indexes": [],
        },
        {"image_token_id": 90, "video_token_id": 91},
    ),
    "smolvlm": (
        {"model_type": "llama"}, {"model_type": "smolvlm_vision"}, {"image_token_id": 90}
    ),
}  # fmt: skip


def make(case: str, seed: int = 0, **text: Any) -> Any:
    """A random model of a case, in float32.

    Args:
        text: of its language model's config.
    """
    torch.manual_seed(seed)
    language, seeing, rest = CASES[case]
    config = AutoConfig.for_model(
        case, text_config=_TEXT | language | text, vision_config=_SEEING | seeing, **rest
    )
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()
