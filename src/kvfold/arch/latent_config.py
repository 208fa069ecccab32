"""The ``config.json`` of a model that is stored with latent attention. No torch."""

from math import pi
from typing import Any

from kvfold.arch.config import CONFIG
from kvfold.arch.family import MIXTURES, Family
from kvfold.arch.latent import Layout
from kvfold.arch.sizes import Config
from kvfold.errors import CheckpointError, UnsupportedError
from kvfold.geometry import LatentGeometry

_SEE = "fold it to fewer KV heads instead: --kv-heads"
_KEPT = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "max_position_embeddings", "rms_norm_eps",
)  # fmt: skip
_KEPT_IF_THERE = (
    "initializer_range", "use_cache", "pad_token_id", "bos_token_id", "eos_token_id",
    "attention_dropout", "dtype", "torch_dtype", "transformers_version",
)  # fmt: skip
# In every layer of DeepSeek-V3's there is one MLP: nothing of its experts is used. There are two
# of them, as llama.cpp asks for more experts than groups.
_ALL_DENSE = {
    "n_routed_experts": 2, "n_shared_experts": 1, "num_experts_per_tok": 1, "n_group": 1,
    "topk_group": 1, "routed_scaling_factor": 1.0, "norm_topk_prob": True, "moe_layer_freq": 1,
    "num_nextn_predict_layers": 0,
}  # fmt: skip


# YaRN that scales by 1 changes no frequency. vLLM rotates DeepSeek's queries wrongly on CPUs where
# it is not said (0.32, without compilation): another operator does it then.
_YARN = {"rope_type": "yarn", "factor": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0}


def check_latent(family: Family, config: Config) -> None:
    """Refuse a model that no layout of latent attention can say.

    Raises:
        UnsupportedError: with the reason.
    """
    reason = _why_not(family, config)
    if reason:
        raise UnsupportedError(
            f"this {family.name} model cannot be stored with latent attention: {reason}", _SEE
        )


def why_no_latent(family: Family) -> str:
    """Why no model of the family can be stored so; nothing where some can."""
    if any(each.of_experts for each in family.renamed):
        return MIXTURES
    if family.qk_norm:
        return (
            "it normalises keys after their projection (QK-norm), and what is behind a norm "
            "cannot be absorbed into a latent"
        )
    return family.no_latent


def _why_not(family: Family, config: Config) -> str:
    never = why_no_latent(family)
    if never:
        return never
    if config.get("mlp_bias"):
        return "its MLPs have biases, for which the target has no place"
    if config.get("use_sliding_window", True) and config.get("sliding_window"):
        return "its layers see a window (sliding_window), and the target's see everything"
    if config.get("layer_types") and set(config["layer_types"]) != {"full_attention"}:
        return "some of its layers see a window, and the target's see everything"
    return _why_no_rotary(config)


def _why_no_rotary(config: Config) -> str:
    kind = _rope_type(config)
    if kind not in ("default", "llama3"):
        return f"its rotary frequencies are scaled ({kind}), which the target cannot repeat"
    return ""


def latent_config(
    config: Config, geometry: LatentGeometry, layout: Layout, rope_parameters: dict[str, Any]
) -> dict[str, Any]:
    """The config of the folded model."""
    missing = [key for key in _KEPT if config.get(key) is None]
    if missing:
        raise CheckpointError(f"config.json has no {missing[0]}", CONFIG.hint)
    made = {key: config[key] for key in _KEPT}
    made |= {key: config[key] for key in _KEPT_IF_THERE if key in config}
    made |= {
        "model_type": layout.model_type,
        "architectures": [layout.architecture],
        "num_key_value_heads": geometry.num_heads,
        "kv_lora_rank": geometry.kv_lora_rank,
        "q_lora_rank": geometry.q_lora_rank or None,
        "qk_rope_head_dim": geometry.qk_rope_head_dim,
        "qk_nope_head_dim": geometry.qk_nope_head_dim,
        "v_head_dim": geometry.v_head_dim,
        "hidden_act": config.get("hidden_act", "silu"),
        "attention_bias": layout.bias,
        "rope_interleave": True,
        "rope_parameters": rope_parameters,
    }
    if layout.model_type == "deepseek_v3":
        made |= _ALL_DENSE | {
            "first_k_dense_replace": geometry.num_layers,
            "moe_intermediate_size": config["intermediate_size"],
        }
    return made


def rope_of(
    config: Config, rotary_dim: int, kept: int, stride: int, size: int, layout: Layout
) -> dict[str, Any]:
    """Rotary parameters with which a rotary key of ``size`` turns by the kept frequencies first.

    The source's are theta^(-j/F), F = ``rotary_dim`` / 2. Every ``stride``-th of them are the
    first of a key of ``size`` with theta^(stride size / rotary_dim) in place of theta.

    Args:
        kept: how many frequencies.

    Raises:
        UnsupportedError: where some of them are scaled, and the layout has no way to say it.
    """
    theta = _theta(config)
    made = {"rope_type": "default", "rope_theta": theta ** (stride * size / rotary_dim)}
    if layout.yarn:
        made |= _YARN | {"original_max_position_embeddings": config["max_position_embeddings"]}
    if _rope_type(config) == "default":
        return made
    scaling = _scaling(config)
    lowest = theta ** (-2 * stride * (kept - 1) / rotary_dim)
    original = scaling["original_max_position_embeddings"]
    if 2 * pi / lowest < original / scaling["high_freq_factor"]:
        return made  # Llama 3 scales none of those that are kept
    if not layout.scaled_rotary:
        raise UnsupportedError(
            f"Llama 3's scaling changes some of the {kept} rotary frequencies that are kept, which "
            f"{layout.model_type} cannot say in every engine",
            "--layout youtu, or a smaller rotary size",
        )
    return {**scaling, **made, "rope_type": "llama3"}


def _scaling(config: Config) -> dict[str, Any]:
    """Of transformers 5's key or of the older one."""
    return dict(config.get("rope_parameters") or config.get("rope_scaling") or {})


def _rope_type(config: Config) -> str:
    scaling = _scaling(config)
    return str(scaling.get("rope_type") or scaling.get("type") or "default")


def _theta(config: Config) -> float:
    return float(_scaling(config).get("rope_theta") or config.get("rope_theta") or 10_000.0)
