"""The layers of a decoder: what each keeps of the tokens it has seen. No torch."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from kvfold.arch.config import CONFIG
from kvfold.arch.sizes import Config, Sizes, check_length, optional, required
from kvfold.errors import CheckpointError

FULL, SLIDING, CHUNKED, LATENT, RECURRENT = "full", "sliding", "chunked", "latent", "recurrent"

# transformers' words in a config's ``layer_types``.
FULL_TYPE, SLIDING_TYPE, CHUNKED_TYPE = "full_attention", "sliding_attention", "chunked_attention"
_KINDS = {FULL_TYPE: FULL, SLIDING_TYPE: SLIDING, CHUNKED_TYPE: CHUNKED}
_RECURRENT_TYPES = {"linear_attention", "mamba", "recurrent", "conv", "moe"}

# The type of every one of so many layers, where a config does not list them.
Unlisted = Callable[[Config, int], list[str]]


@dataclass(frozen=True)
class Layer:
    """One layer's attention.

    Attributes:
        kind: ``full``; ``sliding``: the last ``window`` tokens; ``chunked``: the tokens of the
            same stretch of ``window``; ``latent`` (MLA, arXiv 2405.04434): one compressed vector
            of ``latent`` numbers a token, for all heads, ``rotary`` of them rotated and apart;
            ``recurrent``: no keys and values, or a state of one size.
        query_rank: of queries that are made in two steps, the size between; else 0.
        shared: it attends to the keys and values of an earlier layer.
    """

    kind: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    window: int | None = None
    latent: int = 0
    rotary: int = 0
    query_rank: int = 0
    shared: bool = False

    @property
    def has_kv_heads(self) -> bool:
        """Whether the number of KV heads decides what it keeps."""
        return self.kind not in (LATENT, RECURRENT)

    def kv_numbers(self, shards: int = 1) -> int:
        """Numbers a token adds to the cache of one of ``shards`` GPUs.

        KV heads are shared out; where there are fewer than GPUs, each has a copy of one. A latent
        vector cannot be shared out.
        """
        if self.shared:
            return 0
        if not self.has_kv_heads:
            return self.latent
        return -(-self.num_kv_heads // shards) * (self.head_dim + self.v_head_dim)

    def kept(self, context: int) -> int:
        """Tokens in the cache at a context, all of which a decoding step attends to."""
        if self.kind == RECURRENT:
            return 0
        return context if self.window is None else min(context, self.window)


def layer_types(config: Config, count: int, unlisted: Unlisted) -> list[str]:
    """transformers' word for every layer's attention: listed, by a period, or by ``unlisted``.

    Raises:
        CheckpointError: if the config lists fewer than ``count``.
    """
    listed = config.get("layer_types")
    if listed:
        check_length("layer_types", listed, count)
        return list(listed[:count])
    period = optional(config, "sliding_window_pattern")
    if period:
        return [FULL_TYPE if (i + 1) % period == 0 else SLIDING_TYPE for i in range(count)]
    return unlisted(config, count)


def all_alike(config: Config, count: int) -> list[str]:
    """Sliding if the config has a window that is used."""
    sliding = config.get("use_sliding_window", True)
    return [SLIDING_TYPE if sliding else FULL_TYPE] * count


def every_other(config: Config, count: int) -> list[str]:
    """The first, the third … slide (Gemma 2)."""
    return [FULL_TYPE if index % 2 else SLIDING_TYPE for index in range(count)]


def window_of(config: Config, layer_type: str) -> int | None:
    """Tokens that a layer of a type looks back on; None for all of them."""
    if layer_type == FULL_TYPE:
        return None
    names = ["sliding_window", "attention_chunk_size"]
    return optional(config, *(reversed(names) if layer_type == CHUNKED_TYPE else names))


def read_layers(config: Config, sizes: Sizes, unlisted: Unlisted) -> tuple[Layer, ...]:
    """The attention of every layer.

    Raises:
        CheckpointError: if the config lacks a size, or contradicts itself.
    """
    types = layer_types(config, sizes.num_layers, unlisted)
    read = _latent if config.get("kv_lora_rank") else _layer
    layers = [
        _recurrent(sizes) if layer_type in _RECURRENT_TYPES else read(config, sizes, layer_type)
        for layer_type in types
    ]
    own = cached_layers(config, sizes.num_layers)
    return (*layers[:own], *(replace(layer, shared=True) for layer in layers[own:]))


def cached_layers(config: Config, count: int) -> int:
    """How many of so many layers keep keys and values: the last may share (Gemma 3n)."""
    return count - min(optional(config, "num_kv_shared_layers") or 0, count)


def _layer(config: Config, sizes: Sizes, layer_type: str) -> Layer:
    heads, kv_heads, size = sizes.num_heads, sizes.num_kv_heads, sizes.head_dim
    if heads % kv_heads:
        raise CheckpointError(
            f"config.json has {kv_heads} KV heads for {heads} query heads; expected a divisor",
            CONFIG.hint,
        )
    window = window_of(config, layer_type)
    # Of attention that is not named above, its window says enough.
    kind = FULL if window is None else _KINDS.get(layer_type, SLIDING)
    rank = optional(config, "q_lora_rank") or 0
    return Layer(kind, heads, kv_heads, size, size, window, query_rank=rank)


def _recurrent(sizes: Sizes) -> Layer:
    size = sizes.head_dim
    return Layer(RECURRENT, sizes.num_heads, sizes.num_kv_heads, size, size)


def _latent(config: Config, sizes: Sizes, layer_type: str) -> Layer:
    rotary = required(config, "qk_rope_head_dim")
    return Layer(
        LATENT,
        sizes.num_heads,
        sizes.num_heads,
        head_dim=required(config, "qk_nope_head_dim") + rotary,
        v_head_dim=required(config, "v_head_dim"),
        latent=required(config, "kv_lora_rank") + rotary,
        rotary=rotary,
        query_rank=optional(config, "q_lora_rank") or 0,
    )
