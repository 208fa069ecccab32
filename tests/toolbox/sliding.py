"""Small models whose layers slide."""

from typing import Any

from tests.toolbox.tiny import COMMON, WIDE, build

WINDOW = 16
SLIDING = {
    "mistral": ("mistral", COMMON | WIDE | {"sliding_window": WINDOW}),
    "gemma2": ("gemma2", COMMON | WIDE | {"query_pre_attn_scalar": 16, "sliding_window": WINDOW}),
    "gemma3": (
        "gemma3_text",
        COMMON
        | WIDE
        | {
            "query_pre_attn_scalar": 16,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "cohere2": (
        "cohere2",
        COMMON
        | {
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention"],
            "logit_scale": 1.0,
        },
    ),
    "phi3": ("phi3", COMMON | {"resid_pdrop": 0.0, "sliding_window": WINDOW}),
    "qwen2": (
        "qwen2",
        COMMON | {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    ),
}


def sliding(case: str, seed: int = 0) -> Any:
    return build(*SLIDING[case], seed=seed)
