"""What a config says about a model's layers: enough to count bytes and FLOPs.

Reads every architecture kvfold folds and, with the same few names, common ones that it only
reads: mixtures of experts, multi-head latent attention (DeepSeek), models without KV-head fields.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kvfold.arch.config import CONFIG
from kvfold.errors import CheckpointError

Config = Mapping[str, Any]
FULL, SLIDING, LATENT = "full", "sliding", "latent"


@dataclass(frozen=True)
class Layer:
    """One layer's attention.

    Attributes:
        kind: ``full``, ``sliding``, or ``latent`` (MLA, arXiv 2405.04434: one compressed vector
            of ``latent`` numbers a token, for all heads).
        window: tokens kept by a sliding layer.
    """

    kind: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    window: int | None = None
    latent: int = 0

    def kv_numbers(self, shards: int = 1) -> int:
        """Numbers a token adds to the cache of one of ``shards`` GPUs.

        KV heads are shared out; where there are fewer than GPUs, each has a copy of one. A latent
        vector cannot be shared out.
        """
        if self.kind == LATENT:
            return self.latent
        return -(-self.num_kv_heads // shards) * (self.head_dim + self.v_head_dim)

    def kept(self, context: int) -> int:
        """Tokens in the cache at a context, all of which a decoding step attends to."""
        return min(context, self.window) if self.kind == SLIDING and self.window else context


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
        """How many layers there are of each kind."""
        kinds = [layer.kind for layer in self.layers]
        return {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}

    @property
    def foldable(self) -> bool:
        """Whether the number of KV heads means anything here."""
        return all(layer.kind != LATENT for layer in self.layers)

    def with_kv_heads(self, count: int) -> "Model":
        """The model folded to ``count`` KV heads; k and v projections shrink with them."""
        layers = tuple(
            layer if layer.kind == LATENT else replace(layer, num_kv_heads=count)
            for layer in self.layers
        )
        saved = sum(
            (old.num_kv_heads - new.num_kv_heads) * (old.head_dim + old.v_head_dim)
            for old, new in zip(self.layers, layers, strict=True)
        )
        weights = saved * self.hidden_size
        bytes_each = self.weight_bytes / self.parameters
        return replace(
            self,
            layers=layers,
            parameters=self.parameters - weights,
            active_parameters=self.active_parameters - weights,
            weight_bytes=self.weight_bytes - round(weights * bytes_each),
        )


def read_model(
    config: Config, name: str, parameters: int | None = None, weight_bytes: int | None = None
) -> Model:
    """A model from its config and, if they are known, its weights' count and bytes.

    Raises:
        CheckpointError: if the config lacks a size that everything depends on.
    """
    CONFIG.check(dict(config), "config.json")
    text = config.get("text_config") or config
    heads = _number(text, "num_attention_heads", "n_head", "n_heads", "num_heads")
    hidden = _number(text, "hidden_size", "n_embd", "d_model")
    layers = _layers(text, heads, hidden)
    inner = _mean(text, "intermediate_size") or _optional(
        text, "n_inner", "ffn_dim", "ffn_hidden_size"
    )
    model = Model(
        name=name,
        model_type=str(text.get("model_type", config.get("model_type", "unknown"))),
        layers=layers,
        hidden_size=hidden,
        intermediate_size=inner or 4 * hidden,
        vocab_size=_optional(text, "vocab_size") or 0,
        parameters=0,
        active_parameters=0,
        weight_bytes=0,
        estimated=False,
        max_context=_optional(text, "max_position_embeddings", "n_positions", "max_seq_len"),
    )
    every, active = _parameters(text, model)
    keys_and_values = hidden * sum(layer.kv_numbers() for layer in layers)
    if parameters is not None and parameters <= keys_and_values:  # packed, or not its weights
        parameters, weight_bytes = None, None
    total = every if parameters is None else parameters
    return replace(
        model,
        parameters=total,
        estimated=parameters is None,
        active_parameters=round(total * active / every),
        weight_bytes=2 * total if weight_bytes is None else weight_bytes,
    )


def _layers(config: Config, heads: int, hidden: int) -> tuple[Layer, ...]:
    count = _number(config, "num_hidden_layers", "n_layer", "n_layers", "num_layers")
    head_dim = _optional(config, "head_dim", "kv_channels") or hidden // heads
    if head_dim < 1:
        raise CheckpointError(
            f"config.json has {heads} heads and a hidden size of {hidden}; expected at least that",
            CONFIG.hint,
        )
    if config.get("kv_lora_rank"):
        rope = _number(config, "qk_rope_head_dim")
        size = _number(config, "qk_nope_head_dim") + rope
        latent = _number(config, "kv_lora_rank") + rope
        value = _number(config, "v_head_dim")
        return (Layer(LATENT, heads, heads, size, value, latent=latent),) * count
    kv_heads = _kv_heads(config, heads)
    windows = _windows(config, count)
    return tuple(
        Layer(SLIDING if window else FULL, heads, kv_heads, head_dim, head_dim, window)
        for window in windows
    )


def _kv_heads(config: Config, heads: int) -> int:
    found = _optional(config, "num_key_value_heads", "num_kv_heads", "multi_query_group_num")
    if config.get("multi_query") and not config.get("new_decoder_architecture"):
        return 1
    if found and heads % found:
        raise CheckpointError(
            f"config.json has {found} KV heads for {heads} query heads; expected a divisor",
            CONFIG.hint,
        )
    return found or heads


def _windows(config: Config, count: int) -> list[int | None]:
    """The window of every layer, None for full attention."""
    window = _optional(config, "sliding_window", "attention_chunk_size")
    kinds = config.get("layer_types")
    if kinds:
        _check_length("layer_types", kinds, count)
        return [window if kind != "full_attention" else None for kind in kinds[:count]]
    pattern = _optional(config, "sliding_window_pattern")
    if window and pattern:  # every pattern-th layer is full
        return [None if (index + 1) % pattern == 0 else window for index in range(count)]
    if config.get("model_type") == "gemma2":
        return [window if index % 2 == 0 else None for index in range(count)]
    if config.get("model_type") in _LLAMA4:  # layers without rotary embeddings see everything
        step = _optional(config, "no_rope_layer_interval") or 4
        rotary = config.get("no_rope_layers") or [(i + 1) % step for i in range(count)]
        _check_length("no_rope_layers", rotary, count)
        return [window if uses else None for uses in rotary[:count]]
    uses = config.get("use_sliding_window", True)
    return [window if uses else None] * count


def _check_length(key: str, values: Sequence[Any], count: int) -> None:
    if len(values) < count:
        raise CheckpointError(
            f"config.json: {key} has {len(values)} entries; expected {count}, one per layer",
            CONFIG.hint,
        )


def _parameters(config: Config, model: Model) -> tuple[int, int]:
    """Parameters by the config's sizes, and those that one token meets."""
    attention = sum(
        _attention_parameters(config, layer, model.hidden_size) for layer in model.layers
    )
    matrices = 2 if config.get("model_type") in _TWO_MATRICES else 3
    dense = matrices * model.hidden_size * model.intermediate_size
    experts = _optional(config, "num_local_experts", "n_routed_experts", "num_experts") or 0
    size = _optional(config, "moe_intermediate_size") or model.intermediate_size
    one = matrices * model.hidden_size * size
    chosen = _optional(config, "num_experts_per_tok", "top_k") or 1
    shared = _optional(config, "n_shared_experts", "num_shared_experts") or 0
    count = len(model.layers)
    first = min(_optional(config, "first_k_dense_replace") or 0, count)
    sparse = count - first if experts else 0
    if config.get("model_type") in _LLAMA4:
        sparse, shared = count // (_optional(config, "interleave_moe_layer_step") or 1), 1
        dense = matrices * model.hidden_size * (_optional(config, "intermediate_size_mlp") or 0)
    tied = bool(config.get("tie_word_embeddings", False))
    words = model.vocab_size * model.hidden_size * (1 if tied else 2)
    every = attention + words + (count - sparse) * dense + sparse * (experts + shared) * one
    active = attention + words + (count - sparse) * dense + sparse * (chosen + shared) * one
    return every, active


def _attention_parameters(config: Config, layer: Layer, hidden: int) -> int:
    queries = layer.num_heads * layer.head_dim
    out = layer.num_heads * layer.v_head_dim * hidden
    rank = _optional(config, "q_lora_rank")
    q = rank * (hidden + queries) if rank else hidden * queries
    if layer.kind != LATENT:
        return q + out + layer.kv_numbers() * hidden
    compressed = _number(config, "kv_lora_rank")
    expanded = _number(config, "qk_nope_head_dim") + layer.v_head_dim
    return q + out + hidden * layer.latent + compressed * layer.num_heads * expanded


_LLAMA4 = ("llama4", "llama4_text")
_TWO_MATRICES = (
    "gpt2", "gpt_bigcode", "gpt_neox", "gptj", "opt", "bloom", "falcon", "mpt", "phi",
    "starcoder2", "gpt_neo",
)  # fmt: skip


def _optional(config: Config, *names: str) -> int | None:
    for name in names:
        value = config.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


def _mean(config: Config, name: str) -> int | None:
    """A size that some architectures give layer by layer."""
    value = config.get(name)
    return round(sum(value) / len(value)) if isinstance(value, list) else _optional(config, name)


def _number(config: Config, *names: str) -> int:
    found = _optional(config, *names)
    if found is None:
        raise CheckpointError(
            f"config.json has no {names[0]}", "is this the config of a language model?"
        )
    return found
