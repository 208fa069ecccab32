"""GPT-2, and GPTBigCode: GPT-2 with one KV head for all, and MLPs that are not transposed."""

from typing import Any

from kvfold.arch.family import Family, Rotary
from kvfold.arch.projections import FusedProjections
from kvfold.arch.sizes import Config, ConfigKeys
from kvfold.errors import UnsupportedError

_LEARNED = "its positions are learned, and the target's keys are rotated"
_KEYS = ConfigKeys("n_embd", "n_head", None, "n_layer")


def _to_bigcode(config: Config, num_kv_heads: int) -> dict[str, Any]:
    """GPT-2 has no KV-head field; GPTBigCode is GPT-2 with one shared head."""
    if num_kv_heads != 1:
        raise UnsupportedError(
            f"gpt2 cannot be stored with {num_kv_heads} KV heads: only 1 (as GPTBigCode)",
            "use --kv-heads 1",
        )
    dropped = {"reorder_and_upcast_attn", "scale_attn_by_inverse_layer_idx"}
    kept = {key: value for key, value in config.items() if key not in dropped}
    return kept | {
        "model_type": "gpt_bigcode",
        "architectures": ["GPTBigCodeForCausalLM"],
        "multi_query": True,
        "activation_function": config.get("activation_function", "gelu_new"),
    }


def _why_not(config: Config) -> str | None:
    if config.get("scale_attn_by_inverse_layer_idx"):
        return (
            "GPTBigCode cannot scale scores by the layer number (scale_attn_by_inverse_layer_idx)"
        )
    return "it has cross-attention" if config.get("add_cross_attention") else None


def _is_mlp(name: str) -> bool:
    return name.endswith((".mlp.c_fc.weight", ".mlp.c_proj.weight"))


def _is_causal_mask(name: str) -> bool:
    """Older files hold them; models compute them."""
    return name.endswith((".attn.bias", ".attn.masked_bias"))


FAMILIES = (
    Family(
        ("gpt2",),
        "to 1 KV head only, stored as GPTBigCode",
        layer="transformer.h.{layer}",
        attention="attn",
        mlp_output="mlp.c_proj",
        no_latent=_LEARNED,
        mlp_matrices=2,
        projections=FusedProjections("c_attn", "c_proj", transposed=True),
        rotary=Rotary(default_factor=0.0),
        keys=_KEYS,
        refuse=_why_not,
        target=_to_bigcode,
        target_projections=FusedProjections("c_attn", "c_proj"),
        rewrite=lambda name, tensor: tensor.T.contiguous() if _is_mlp(name) else tensor,
        rewritten_shape=lambda name, shape: shape[::-1] if _is_mlp(name) else shape,
        dropped=_is_causal_mask,
    ),
    Family(
        ("gpt_bigcode",),
        "what gpt2 folds to; already one KV head",
        layer="transformer.h.{layer}",
        attention="attn",
        mlp_output="mlp.c_proj",
        no_latent=_LEARNED,
        mlp_matrices=2,
        projections=FusedProjections("c_attn", "c_proj"),
        rotary=Rotary(default_factor=0.0),
        keys=_KEYS,
        refuse=lambda config: (
            None if config.get("multi_query", True) else "its heads are stored interleaved"
        ),
        target=lambda config, num_kv_heads: dict(config),
        dropped=_is_causal_mask,
    ),
)
