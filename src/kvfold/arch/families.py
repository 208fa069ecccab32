"""Architectures, one declaration each. No torch.

To add an architecture, append one :class:`Family` to ``FAMILIES`` (and a tiny config to
``tests/toolbox/tiny.py``, which makes every test run over it). Anything special about a model is a
field here, never an ``if`` somewhere else.
"""

import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvfold.arch.config import CONFIG
from kvfold.arch.projections import FusedProjections, Projections, SeparateProjections
from kvfold.errors import CheckpointError, UnsupportedError
from kvfold.geometry import AttentionGeometry

if TYPE_CHECKING:
    import torch

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Rotary:
    """Which dimensions of a head rotate, and which of them form pairs.

    Attributes:
        default_factor: fraction of ``head_dim`` that rotates where the config is silent.
        interleaved: pairs are (2j, 2j + 1) if true, else (j, j + r/2) as in Llama.
    """

    default_factor: float = 1.0
    interleaved: bool = False

    def dim(self, config: Config, head_dim: int, layer: int) -> int:
        """Number of rotating dimensions (r) of a head of ``layer``."""
        per_layer = config.get("no_rope_layers")  # SmolLM3: 0 marks a layer without rotary
        if per_layer and not per_layer[layer]:
            return 0
        return int(head_dim * self.factor(config))

    def factor(self, config: Config) -> float:
        parameters = config.get("rope_parameters") or {}
        if "partial_rotary_factor" in parameters:
            return float(parameters["partial_rotary_factor"])
        value = config.get("partial_rotary_factor")
        return self.default_factor if value is None else float(value)


@dataclass(frozen=True)
class QKNorm:
    """RMS norms over ``head_dim`` after the q and k projections; weight + ``offset`` multiplies."""

    q: str = "q_norm.weight"
    k: str = "k_norm.weight"
    offset: float = 0.0


@dataclass(frozen=True)
class ConfigKeys:
    """The names an architecture's ``config.json`` gives to its sizes."""

    hidden_size: str = "hidden_size"
    num_heads: str = "num_attention_heads"
    num_kv_heads: str | None = "num_key_value_heads"
    num_layers: str = "num_hidden_layers"


@dataclass(frozen=True)
class Family:
    """One architecture: where its attention lies and what it can express.

    Attributes:
        model_types: values of ``model_type`` that share this layout.
        layer, attention: module paths; ``{layer}`` is the layer number.
        mlp_output: the MLP's last linear layer below ``layer``, if there is just one.
        post_norm: the attention's output is normalised before it joins the residual stream.
        residual_scale: config key of the factor on each block's output, if any.
        default_head_dim: where neither the config nor hidden / heads gives it.
        refuse: returns why a config of this family cannot be folded, or ``None``.
        target: returns the folded config, where setting the number of KV heads is not enough.
        target_projections: how the folded model stores its projections, if otherwise.
        rewrite, rewritten_shape: a tensor that is not attention in the folded model's form.
        dropped: tensors the folded model has no place for.
    """

    model_types: tuple[str, ...]
    notes: str = ""
    layer: str = "model.layers.{layer}"
    attention: str = "self_attn"
    mlp_output: str | None = "mlp.down_proj"
    projections: Projections = SeparateProjections()
    rotary: Rotary = Rotary()
    qk_norm: QKNorm | None = None
    keys: ConfigKeys = ConfigKeys()
    post_norm: bool = False
    residual_scale: str | None = None
    default_head_dim: int | None = None
    refuse: Callable[[Config], str | None] = lambda config: None
    target: Callable[[Config, int], dict[str, Any]] | None = None
    target_projections: Projections | None = None
    rewrite: "Callable[[str, torch.Tensor], torch.Tensor] | None" = None
    rewritten_shape: Callable[[str, tuple[int, ...]], tuple[int, ...]] = lambda name, shape: shape
    dropped: Callable[[str], bool] = lambda name: False

    @property
    def name(self) -> str:
        return self.model_types[0]

    @property
    def base(self) -> str:
        """The attribute of transformers' module that holds everything but the output embedding."""
        return self.layer.partition(".")[0]

    def decoder_layers(self) -> re.Pattern[str]:
        """Matches the paths of decoder layers in a module, whatever is wrapped around it."""
        return re.compile(rf"(^|\.){self._any_layer}$")

    def attention_parameters(self) -> re.Pattern[str]:
        """Finds the parameters of attention modules among a module's names."""
        return re.compile(rf"(^|\.){self._any_layer}\.{re.escape(self.attention)}\.")

    @property
    def _any_layer(self) -> str:
        return re.escape(self.layer).replace(re.escape("{layer}"), r"\d+")

    def geometry(self, config: Config) -> AttentionGeometry:
        """Head counts and sizes from a ``config.json``.

        Raises:
            CheckpointError: if a size is missing or not a number.
        """
        keys = self.keys
        CONFIG.check(dict(config), "config.json")
        heads = _integer(config, keys.num_heads)
        hidden = _integer(config, keys.hidden_size)
        kv_key = keys.num_kv_heads
        kv_heads = _integer(config, kv_key, heads) if kv_key else self._implied_kv_heads(config)
        head_dim = _integer(config, "head_dim", self.default_head_dim or hidden // heads)
        layers = _integer(config, keys.num_layers)
        rotary = config.get("no_rope_layers")
        if rotary and len(rotary) != layers:
            raise CheckpointError(
                f"config.json: no_rope_layers has {len(rotary)} entries; expected {layers}, one "
                "per layer",
                CONFIG.hint,
            )
        return AttentionGeometry(layers, heads, kv_heads, head_dim, head_dim, hidden)

    def _implied_kv_heads(self, config: Config) -> int:
        return 1 if config.get("multi_query") else _integer(config, self.keys.num_heads)

    def folded_config(self, config: Config, num_kv_heads: int) -> dict[str, Any]:
        """The config of the folded model; a copy, everything else untouched."""
        if self.target is not None:
            return self.target(config, num_kv_heads)
        kv_heads = {self.keys.num_kv_heads: num_kv_heads} if self.keys.num_kv_heads else {}
        return {**config, **kv_heads}


def _integer(config: Config, key: str, default: int | None = None) -> int:
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, int):  # missing: what is there has been checked
        raise CheckpointError(f"config.json has no {key}", CONFIG.hint)
    return value


def _unless(key: str, reason: str) -> Callable[[Config], str | None]:
    return lambda config: reason if config.get(key) else None


_PER_HEAD_NORM = "its QK-norm has its own weights for each head, which a shared head cannot keep"


def _gpt2_target(config: Config, num_kv_heads: int) -> dict[str, Any]:
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


def _is_gpt2_mlp(name: str) -> bool:
    return name.endswith((".mlp.c_fc.weight", ".mlp.c_proj.weight"))


FAMILIES = (
    Family(("llama", "mistral"), "also SmolLM, Yi, Vicuna, TinyLlama … (same layout)"),
    Family(("smollm3",), "layers without rotary get full K gauges"),
    Family(("qwen2",), "K and V biases"),
    Family(("qwen3",), "QK-norm", qk_norm=QKNorm()),
    Family(("gemma",), default_head_dim=256),
    Family(("gemma2",), "logit softcap, sliding layers", post_norm=True, default_head_dim=256),
    Family(
        ("gemma3_text",),
        "QK-norm, sliding layers",
        qk_norm=QKNorm(offset=1.0),
        post_norm=True,
        default_head_dim=256,
    ),
    Family(("granite",), residual_scale="residual_multiplier"),
    Family(
        ("phi",),
        "partial rotary, biases, parallel MLP",
        projections=SeparateProjections(o="dense"),
        mlp_output="mlp.fc2",
        rotary=Rotary(default_factor=0.5),
        refuse=_unless("qk_layernorm", "its QK layer norm subtracts a mean, which no gauge keeps"),
    ),
    Family(("phi3",), "fused qkv; also Phi-4", projections=FusedProjections()),
    Family(("starcoder2",), "biases", mlp_output="mlp.c_proj"),
    Family(
        ("stablelm",),
        "partial rotary",
        rotary=Rotary(default_factor=0.25),
        refuse=lambda config: _PER_HEAD_NORM if config.get("qk_layernorm") else None,
    ),
    Family(
        ("cohere",),
        "interleaved rotary, parallel MLP",
        rotary=Rotary(interleaved=True),
        refuse=_unless("use_qk_norm", _PER_HEAD_NORM),
    ),
    Family(
        ("gpt2",),
        "to 1 KV head only, stored as GPTBigCode",
        layer="transformer.h.{layer}",
        attention="attn",
        mlp_output="mlp.c_proj",
        projections=FusedProjections("c_attn", "c_proj", transposed=True),
        rotary=Rotary(default_factor=0.0),
        keys=ConfigKeys("n_embd", "n_head", None, "n_layer"),
        refuse=lambda config: (
            "GPTBigCode cannot scale scores by the layer number (scale_attn_by_inverse_layer_idx)"
            if config.get("scale_attn_by_inverse_layer_idx")
            else "it has cross-attention"
            if config.get("add_cross_attention")
            else None
        ),
        target=_gpt2_target,
        target_projections=FusedProjections("c_attn", "c_proj"),
        rewrite=lambda name, tensor: tensor.T.contiguous() if _is_gpt2_mlp(name) else tensor,
        rewritten_shape=lambda name, shape: shape[::-1] if _is_gpt2_mlp(name) else shape,
        dropped=lambda name: name.endswith((".attn.bias", ".attn.masked_bias")),  # causal masks
    ),
    Family(
        ("gpt_bigcode",),
        "what gpt2 folds to; already one KV head",
        layer="transformer.h.{layer}",
        attention="attn",
        mlp_output="mlp.c_proj",
        projections=FusedProjections("c_attn", "c_proj"),
        rotary=Rotary(default_factor=0.0),
        keys=ConfigKeys("n_embd", "n_head", None, "n_layer"),
        refuse=lambda config: (
            None if config.get("multi_query", True) else "its heads are stored interleaved"
        ),
        target=lambda config, num_kv_heads: dict(config),
    ),
)

# Architectures people will try, with the reason they cannot be folded and what to do.
REFUSALS = {
    "gpt_neox": ("it has no KV-head field: q, k and v of each head are one fused block", ""),
    "gptj": ("it has no KV-head field", ""),
    "gpt_neo": ("it has no KV-head field", ""),
    "opt": ("it has no KV-head field", ""),
    "bloom": ("it has no KV-head field, and ALiBi ties each head to its own slope", ""),
    "mpt": ("stock MPT has no KV-head field", ""),
    "falcon": ("its fused qkv layout differs by version and has no general KV-head field", ""),
    "olmo2": ("its QK-norm runs over all heads at once, so heads cannot be folded apart", ""),
    "olmo3": ("its QK-norm runs over all heads at once, so heads cannot be folded apart", ""),
    "deepseek_v2": ("multi-head latent attention already caches one shared latent", ""),
    "deepseek_v3": ("multi-head latent attention already caches one shared latent", ""),
    "mixtral": ("mixture-of-experts layers are not supported", ""),
    "qwen3_moe": ("mixture-of-experts layers are not supported", ""),
    "gemma3": (
        "it is the image-and-text wrapper",
        "save its text half first: Gemma3ForCausalLM.from_pretrained(SRC).save_pretrained(TEXT)",
    ),
    "mamba": ("it has no attention", ""),
    "bert": ("it is an encoder; kvfold folds decoders, which keep a KV cache", ""),
    "t5": ("it is an encoder-decoder; kvfold folds decoder-only models", ""),
}


def family_of(config: Config) -> Family:
    """The family of a config.

    Raises:
        UnsupportedError: naming the architecture, why it cannot be folded, and what to do.
    """
    model_type = config.get("model_type")
    known = {name: family for family in FAMILIES for name in family.model_types}
    see = "`kvfold families` lists what can be folded"
    if model_type in REFUSALS:
        reason, hint = REFUSALS[model_type]
        raise UnsupportedError(f"model_type {model_type} cannot be folded: {reason}", hint or see)
    if model_type not in known:
        near = difflib.get_close_matches(str(model_type), known, n=1)
        guess = f"did you mean {near[0]}? " if near else ""
        raise UnsupportedError(f"unknown model_type {model_type!r} in config.json", guess + see)
    family = known[model_type]
    reason_or_none = family.refuse(config)
    if reason_or_none:
        raise UnsupportedError(f"this {model_type} model cannot be folded: {reason_or_none}", see)
    return family
