"""Llama 4: layers that see a chunk, layers that see everything, and mixtures of experts."""

from kvfold.arch.experts import Experts, usual_experts
from kvfold.arch.family import Family
from kvfold.arch.layers import CHUNKED_TYPE, FULL_TYPE
from kvfold.arch.sizes import Config, check_length, optional


def _layers(config: Config, count: int) -> list[str]:
    """Layers without rotary embeddings see everything."""
    step = optional(config, "no_rope_layer_interval") or 4
    rotary = config.get("no_rope_layers") or [(i + 1) % step for i in range(count)]
    check_length("no_rope_layers", rotary, count)
    return [CHUNKED_TYPE if uses else FULL_TYPE for uses in rotary[:count]]


def _experts(config: Config, layers: int, inner: int) -> Experts:
    """Every layer, or every other …; one expert of such a layer is shared."""
    usual = usual_experts(config, layers, inner)
    return Experts(
        layers=layers // (optional(config, "interleave_moe_layer_step") or 1),
        total=usual.total,
        chosen=usual.chosen,
        shared=1,
        size=usual.size,
        dense_size=optional(config, "intermediate_size_mlp") or 0,
    )


FAMILIES = (
    Family(
        ("llama4_text", "llama4"),
        unlisted_layers=_layers,
        experts=_experts,
        unfoldable="it normalises keys behind their rotary embedding, and is not declared yet",
    ),
)
