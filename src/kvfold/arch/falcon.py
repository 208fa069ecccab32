"""Falcon's attention as a module that takes an implementation from outside.

transformers' own repeats keys and values for all heads before it does anything with them.
"""

from typing import Any

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.falcon.modeling_falcon import (
    FALCON_ATTENTION_CLASSES,
    FalconAttention,
    apply_rotary_pos_emb,
)


class _GroupedAttention(FalconAttention):  # type: ignore[misc]
    """Of the newer decoder: for each KV head its queries, its key and its value."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.num_key_value_groups = self.num_heads // self.num_kv_heads

    def forward(
        self,
        hidden_states: torch.Tensor,
        *,
        attention_mask: torch.Tensor | None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """``[B, T, C]`` -> ``[B, T, C]``; without a cache."""
        fused = self.query_key_value(hidden_states)
        groups = fused.unflatten(-1, (self.num_kv_heads, -1, self.head_dim))
        query = groups[..., :-2, :].flatten(2, 3).transpose(1, 2)
        key, value = (groups[..., part, :].transpose(1, 2) for part in (-2, -1))
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        out, _ = attend(self, query, key, value, attention_mask, scaling=self.inv_norm_factor)
        return self.dense(out.flatten(2)), None


def offer(implementation: str) -> None:
    """Let models be built with an attention implementation of that name."""
    FALCON_ATTENTION_CLASSES[implementation] = _GroupedAttention
