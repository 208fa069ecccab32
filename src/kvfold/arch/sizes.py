"""How many heads a model has and how wide they are, by whatever name its config has for it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvfold.arch.config import CONFIG
from kvfold.errors import CheckpointError

Config = Mapping[str, Any]


@dataclass(frozen=True)
class ConfigKeys:
    """The names that an architecture's ``config.json`` gives to its sizes.

    Attributes:
        num_kv_heads: None where the config has no field that always holds. Then the flag
            ``multi_query`` says one, and else ``maybe_kv_heads`` how many, or there are as many
            as query heads.
    """

    hidden_size: str = "hidden_size"
    num_heads: str = "num_attention_heads"
    num_kv_heads: str | None = "num_key_value_heads"
    num_layers: str = "num_hidden_layers"
    maybe_kv_heads: tuple[str, ...] = ()


# What others call them: for architectures that are not declared.
_HIDDEN_SIZE = ("hidden_size", "n_embd", "n_embed", "d_model")
_NUM_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
_NUM_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_HEAD_DIM = ("head_dim", "kv_channels")
UNDECLARED = ConfigKeys(
    num_kv_heads=None,
    maybe_kv_heads=("num_key_value_heads", "num_kv_heads", "multi_query_group_num"),
)


@dataclass(frozen=True)
class Sizes:
    """What every decoder has."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int

    @classmethod
    def read(cls, config: Config, keys: ConfigKeys, default_head_dim: int | None) -> "Sizes":
        """Of a config that is within bounds.

        Raises:
            CheckpointError: if it lacks a size, or has more heads than there is room for.
        """
        heads = required(config, keys.num_heads, *_NUM_HEADS)
        hidden = required(config, keys.hidden_size, *_HIDDEN_SIZE)
        head_dim = optional(config, *_HEAD_DIM) or default_head_dim or hidden // heads
        if head_dim < 1:
            raise CheckpointError(
                f"config.json has {heads} heads and a hidden size of {hidden}; expected at least "
                "that",
                CONFIG.hint,
            )
        layers = required(config, keys.num_layers, *_NUM_LAYERS)
        return cls(layers, heads, _kv_heads(config, keys, heads), head_dim, hidden)


def _kv_heads(config: Config, keys: ConfigKeys, heads: int) -> int:
    if keys.num_kv_heads is not None:
        return optional(config, keys.num_kv_heads) or heads
    # Falcon's flag says one, unless its newer layout is used.
    if config.get("multi_query") and not config.get("new_decoder_architecture"):
        return 1
    return optional(config, *keys.maybe_kv_heads) or heads


def optional(config: Config, *names: str) -> int | None:
    """The first of ``names`` that has a whole number above 0."""
    for name in names:
        value = config.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


def required(config: Config, *names: str) -> int:
    """The same.

    Raises:
        CheckpointError: if there is none.
    """
    found = optional(config, *names)
    if found is None:
        raise CheckpointError(f"config.json has no {names[0]}", CONFIG.hint)
    return found


def check_length(key: str, values: "list[Any]", count: int) -> None:
    """Refuse a list that should have an entry for each of ``count`` layers, and has fewer.

    Raises:
        CheckpointError: naming both numbers.
    """
    if len(values) < count:
        raise CheckpointError(
            f"config.json: {key} has {len(values)} entries; expected {count}, one per layer",
            CONFIG.hint,
        )
