"""What kvfold reads of a ``config.json``, and within what bounds. No torch.

Bounds are far beyond any model there is: they keep a damaged or hostile number from becoming the
length of a loop. Keys that are not named here are allowed and kept.
"""

from typing import Annotated, Any

from annotated_types import Ge, Gt, Le, MaxLen, MinLen
from typing_extensions import TypedDict

from kvfold.documents import Document, open_ended

MOST_LAYERS = 10_000
MOST_HEADS = 65_536

Layers = Annotated[int, Ge(1), Le(MOST_LAYERS)]
Heads = Annotated[int, Ge(1), Le(MOST_HEADS)]
HeadSize = Annotated[int, Ge(1), Le(65_536)]
Width = Annotated[int, Ge(1), Le(1 << 22)]
Rank = Annotated[int, Ge(0), Le(1 << 22)]
Words = Annotated[int, Ge(0), Le(1 << 26)]
Positions = Annotated[int, Ge(0), Le(1 << 40)]
Count = Annotated[int, Ge(0), Le(1_000_000)]
Share = Annotated[float, Ge(0), Le(1)]


@open_ended
class RopeParameters(TypedDict, total=False):
    """Of rotary embedding; for all layers alike or below the names of their kinds."""

    rope_theta: Annotated[float, Gt(0)] | None
    partial_rotary_factor: Share | None


@open_ended
class Config(TypedDict, total=False):
    """A ``config.json``: the keys that folding and planning read, of every architecture.

    None stands where transformers itself takes it for "as usual".
    """

    model_type: str | None
    text_config: "Config | None"
    # How many heads, how large.
    num_attention_heads: Heads
    n_head: Heads
    n_heads: Heads
    num_heads: Heads
    num_key_value_heads: Heads | None
    num_kv_heads: Heads | None
    multi_query_group_num: Heads | None
    multi_query: bool | None
    new_decoder_architecture: bool | None
    head_dim: HeadSize | None
    kv_channels: HeadSize | None
    hidden_size: Width
    n_embd: Width
    n_embed: Width
    d_model: Width
    intermediate_size: Width | Annotated[list[Width], MinLen(1), MaxLen(MOST_LAYERS)] | None
    intermediate_size_mlp: Width | None
    n_inner: Width | None
    ffn_dim: Width | None
    ffn_hidden_size: Width | None
    vocab_size: Words | None
    tie_word_embeddings: bool | None
    # How many layers, and of what kind.
    num_hidden_layers: Layers
    n_layer: Layers
    n_layers: Layers
    num_layers: Layers
    layer_types: Annotated[list[str], MaxLen(MOST_LAYERS)] | None
    no_rope_layers: Annotated[list[int], MaxLen(MOST_LAYERS)] | None
    no_rope_layer_interval: Count | None
    sliding_window: Positions | None
    sliding_window_pattern: Count | str | None  # EXAONE 4 spells a period: LLLG
    num_kv_shared_layers: Count | None
    use_sliding_window: bool | None
    attention_chunk_size: Positions | None
    max_position_embeddings: Positions | None
    n_positions: Positions | None
    max_seq_len: Positions | None
    # Multi-head latent attention.
    kv_lora_rank: Rank | None
    q_lora_rank: Rank | None
    qk_rope_head_dim: Rank | None
    qk_nope_head_dim: Rank | None
    v_head_dim: Rank | None
    # Mixtures of experts.
    num_local_experts: Count | None
    n_routed_experts: Count | None
    num_experts: Count | None
    num_experts_per_tok: Count | None
    top_k: Count | None
    n_shared_experts: Count | None
    num_shared_experts: Count | None
    moe_intermediate_size: Rank | None
    first_k_dense_replace: Count | None
    interleave_moe_layer_step: Count | None
    moe_num_experts: Count | None
    moe_k: Count | None
    moe_num_shared_experts: Count | None
    moe_layer_start_index: Count | None
    moe_layer_end_index: Annotated[int, Ge(-1), Le(MOST_LAYERS)] | None
    moe_layer_interval: Count | None
    # What decides whether and how a model can be folded.
    rope_parameters: RopeParameters | None
    partial_rotary_factor: Share | None
    residual_multiplier: float | None
    qk_layernorm: bool | None
    use_qk_norm: bool | None
    scale_attn_by_inverse_layer_idx: bool | None
    add_cross_attention: bool | None
    quantization_config: dict[str, Any] | None


# Mamba's layers may limit their time step to [0, Infinity].
CONFIG = Document(
    Config,
    "is this the config of a language model? download it again",
    infinite=("time_step_limit",),
)


def plain_config(config: Any) -> dict[str, Any]:
    """transformers' own config object as a ``config.json``, also under the usual names of sizes."""
    found: dict[str, Any] = config.to_dict()
    for usual, own in config.attribute_map.items():
        if own in found:
            found.setdefault(usual, found[own])
    for computed in ("num_hidden_layers", "layer_types"):  # by some, from fields of their own
        found.setdefault(computed, getattr(config, computed, None))
    return found
