"""What a config says of a decoder, whether it can be folded or not. No torch.

Declared architectures are read by their declaration; others by the names and habits that most
configs share.
"""

from dataclasses import dataclass
from typing import Any

from kvfold.arch.config import CONFIG
from kvfold.arch.experts import Experts
from kvfold.arch.families import described_as
from kvfold.arch.layers import Layer, cached_layers, layer_types, read_layers, window_of
from kvfold.arch.sizes import Config, optional


@dataclass(frozen=True)
class Decoder:
    """Enough to count bytes and FLOPs.

    Attributes:
        mlp_matrices: of each MLP: 3 with a gate, 2 without.
        tied: the output embedding is the input's.
    """

    model_type: str
    layers: tuple[Layer, ...]
    hidden_size: int
    intermediate_size: int
    mlp_matrices: int
    experts: Experts
    vocab_size: int
    tied: bool
    max_context: int | None

    def kv_bytes_per_token(self, bits: int = 16) -> int:
        """Bytes that a token adds to the cache of one sequence, over all layers."""
        return sum(layer.kv_numbers() for layer in self.layers) * bits // 8


def describe(config: Config) -> Decoder:
    """The decoder of a ``config.json``: of its text half, if it has one.

    Raises:
        CheckpointError: if it lacks a size that everything depends on, or contradicts itself.
    """
    CONFIG.check(dict(config), "config.json")
    text = config.get("text_config") or config
    model_type = str(text.get("model_type", config.get("model_type", "unknown")))
    family = described_as({"model_type": model_type})
    sizes = family.sizes(text)
    inner = _intermediate_size(text) or 4 * sizes.hidden_size
    return Decoder(
        model_type=model_type,
        layers=read_layers(text, sizes, family.unlisted_layers),
        hidden_size=sizes.hidden_size,
        intermediate_size=inner,
        mlp_matrices=family.mlp_matrices,
        experts=family.experts(text, sizes.num_layers, inner),
        vocab_size=optional(text, "vocab_size") or 0,
        tied=bool(text.get("tie_word_embeddings", False)),
        max_context=optional(text, "max_position_embeddings", "n_positions", "max_seq_len"),
    )


def learned_positions(config: Config) -> int | None:
    """How many positions a model has learned, if it cannot go beyond; rotary ones have no end."""
    text = config.get("text_config") or config
    return optional(text, *described_as(text).learned_positions)


def typed_layers(config: Config, count: int) -> list[tuple[str, int | None]]:
    """transformers' word for the attention of each layer that has a cache, and its window."""
    types = layer_types(config, count, described_as(config).unlisted_layers)
    own = cached_layers(config, count)
    return [(layer_type, window_of(config, layer_type)) for layer_type in types[:own]]


def _intermediate_size(config: Config) -> int | None:
    """Where it differs from layer to layer, the mean."""
    value: Any = config.get("intermediate_size")
    if isinstance(value, list):
        return round(sum(value) / len(value))
    return optional(config, "intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size")
