"""A model as the planner sees it: what its config describes, and how many weights it has."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from kvfold.arch.decoder import Decoder, describe
from kvfold.arch.families import family_of
from kvfold.arch.layers import CHUNKED, LATENT, SLIDING, Layer
from kvfold.arch.target import Latent


@dataclass(frozen=True)
class Model:
    """A decoder as the planner sees it.

    Attributes:
        parameters, active_parameters: all, and those that a token meets (mixtures of experts).
        estimated: whether they are from the config's sizes rather than from the weights.
        weight_bytes: as stored.
    """

    name: str
    model_type: str
    layers: tuple[Layer, ...]
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    parameters: int
    active_parameters: int
    weight_bytes: int
    estimated: bool
    max_context: int | None

    @property
    def num_kv_heads(self) -> int:
        return max(layer.num_kv_heads for layer in self.layers)

    @property
    def num_heads(self) -> int:
        return self.layers[0].num_heads

    @property
    def kinds(self) -> dict[str, int]:
        """How many layers there are of each kind; a chunk is a window that does not move."""
        kinds = [SLIDING if layer.kind == CHUNKED else layer.kind for layer in self.layers]
        return {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}

    @property
    def foldable(self) -> bool:
        """Whether the number of KV heads means anything here."""
        return all(layer.kind != LATENT for layer in self.layers)

    def with_kv_heads(self, count: int) -> "Model":
        """The model folded to ``count`` KV heads; k and v projections shrink with them."""
        layers = tuple(
            replace(layer, num_kv_heads=count) if layer.has_kv_heads else layer
            for layer in self.layers
        )
        saved = sum(
            (old.num_kv_heads - new.num_kv_heads) * (old.head_dim + old.v_head_dim)
            for old, new in zip(self.layers, layers, strict=True)
        )
        return self._with(layers, saved * self.hidden_size)

    def with_latent(self, target: Latent, config: Mapping[str, Any]) -> "Model":
        """The model with latent attention, its projections of other sizes.

        Args:
            config: the model's own.

        Raises:
            InputError: if the cache would grow, or the sizes are none that the model can have.
            UnsupportedError: if its family cannot be stored so.
        """
        family = family_of(config)
        made = target.geometry(family.geometry(config), family, config)
        layer = Layer(
            LATENT, made.num_heads, made.num_heads, made.head_dim, made.v_head_dim,
            latent=made.kv_lora_rank + made.qk_rope_head_dim, rotary=made.qk_rope_head_dim,
            query_rank=made.q_lora_rank,
        )  # fmt: skip
        layers = (layer,) * len(self.layers)
        before, after = (
            sum(_attention_parameters(each, self.hidden_size) for each in every)
            for every in (self.layers, layers)
        )
        return self._with(layers, before - after)

    def _with(self, layers: tuple[Layer, ...], saved: int) -> "Model":
        """With other layers, and so many weights fewer."""
        bytes_each = self.weight_bytes / self.parameters
        return replace(
            self,
            layers=layers,
            parameters=self.parameters - saved,
            active_parameters=self.active_parameters - saved,
            weight_bytes=self.weight_bytes - round(saved * bytes_each),
        )


def read_model(
    config: Mapping[str, Any],
    name: str,
    parameters: int | None = None,
    weight_bytes: int | None = None,
) -> Model:
    """A model from its config and, if they are known, its weights' count and bytes.

    Raises:
        CheckpointError: if the config lacks a size that everything depends on.
    """
    decoder = describe(config)
    every, active = _parameters(decoder)
    keys_and_values = decoder.hidden_size * sum(layer.kv_numbers() for layer in decoder.layers)
    if parameters is not None and parameters <= keys_and_values:  # packed, or not its weights
        parameters, weight_bytes = None, None
    total = every if parameters is None else parameters
    return Model(
        name=name,
        model_type=decoder.model_type,
        layers=decoder.layers,
        hidden_size=decoder.hidden_size,
        intermediate_size=decoder.intermediate_size,
        vocab_size=decoder.vocab_size,
        parameters=total,
        active_parameters=round(total * active / every),
        weight_bytes=2 * total if weight_bytes is None else weight_bytes,
        estimated=parameters is None,
        max_context=decoder.max_context,
    )


def _parameters(decoder: Decoder) -> tuple[int, int]:
    """Parameters by the config's sizes, and those that one token meets."""
    hidden, experts = decoder.hidden_size, decoder.experts
    attention = sum(_attention_parameters(layer, hidden) for layer in decoder.layers)
    words = decoder.vocab_size * hidden * (1 if decoder.tied else 2)
    dense = decoder.mlp_matrices * hidden * experts.dense_size
    one = decoder.mlp_matrices * hidden * experts.size
    outside = attention + words + (len(decoder.layers) - experts.layers) * dense
    every = outside + experts.layers * (experts.total + experts.shared) * one
    active = outside + experts.layers * (experts.chosen + experts.shared) * one
    return every, active


def _attention_parameters(layer: Layer, hidden: int) -> int:
    queries = layer.num_heads * layer.head_dim
    out = layer.num_heads * layer.v_head_dim * hidden
    rank = layer.query_rank
    q = rank * (hidden + queries) if rank else hidden * queries
    if layer.kind != LATENT:  # recurrent ones are about as large
        return q + out + layer.num_kv_heads * (layer.head_dim + layer.v_head_dim) * hidden
    expanded = layer.num_heads * (layer.head_dim - layer.rotary + layer.v_head_dim)
    return q + out + hidden * layer.latent + (layer.latent - layer.rotary) * expanded
