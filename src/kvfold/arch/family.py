"""What one architecture declares. No torch."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvfold.arch.config import CONFIG
from kvfold.arch.experts import ReadExperts, usual_experts
from kvfold.arch.latent import latent_geometry
from kvfold.arch.layers import FULL_TYPE, Unlisted, all_alike, layer_types
from kvfold.arch.parameters import Renamed
from kvfold.arch.projections import Projections, SeparateProjections
from kvfold.arch.sizes import Config, ConfigKeys, Sizes, optional
from kvfold.errors import CheckpointError
from kvfold.geometry import AttentionGeometry

if TYPE_CHECKING:
    import torch

LAYER_NORMS = "its layer norms subtract a mean, for which the target has no place"
MIXTURES = "its MLPs are mixtures of experts, and every layer of the target has one MLP"
NORM_PER_HEAD = "its QK-norm has its own weights for each head, which a shared head cannot keep"


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
class WindowedRotary(Rotary):
    """Rotary where layers see a window; of a model that has such, the others are without."""

    def dim(self, config: Config, head_dim: int, layer: int) -> int:
        """See :meth:`Rotary.dim`."""
        windows = optional(config, "sliding_window") is not None
        if windows and layer_types(config, layer + 1, all_alike)[layer] == FULL_TYPE:
            return 0
        return super().dim(config, head_dim, layer)


@dataclass(frozen=True)
class Multipliers:
    """Config keys of factors that other architectures do not have.

    Attributes:
        embeddings: multiplies embedded tokens. scores: scales scores, in place of
            head_dim^-1/2. logits: divides the output.
    """

    embeddings: str
    scores: str
    logits: str


@dataclass(frozen=True)
class QKNorm:
    """RMS norms over ``head_dim`` after the q and k projections; weight + ``offset`` multiplies.

    Attributes:
        switch: config key that says whether there are any; always, without one.
    """

    q: str = "q_norm.weight"
    k: str = "k_norm.weight"
    offset: float = 0.0
    switch: str = ""

    def of(self, config: Config) -> "QKNorm | None":
        """Itself, unless a config switches it off."""
        return self if not self.switch or config.get(self.switch) else None


@dataclass(frozen=True)
class Family:
    """One architecture: where its attention lies and what it can express.

    Attributes:
        model_types: values of ``model_type`` that share this layout.
        layer, attention: module paths; ``{layer}`` is the layer number.
        renamed: tensors below a layer that checkpoints store otherwise than transformers' module
            has them, such as experts one by one.
        tuples: layers return tuples, hidden states first.
        offer: makes transformers' module take attention implementations of a name, if it does not.
        sinks: a logit per query head that takes attention away, below ``attention``, if any.
        mlp_output: the MLP's last linear layer below ``layer``, if there is just one.
        post_norm: the attention's output is normalised before it joins the residual stream.
        residual_scale: config key of the factor on each block's output, if any.
        keys: what its configs call its sizes.
        learned_positions: config keys of how many positions it has learned, if it has.
        default_head_dim: where neither the config nor hidden / heads gives it.
        unlisted_layers: which layers slide, where the config does not list their types.
        mlp_matrices: of each MLP: 3 with a gate, 2 without.
        experts: which layers have mixtures of experts, and of how many.
        unfoldable: why no model of the family can be folded, if so. instead: what to do then.
        refuse: returns why a config of this family cannot be folded, or ``None``.
        target: returns the folded config, where setting the number of KV heads is not enough.
        target_projections: how the folded model stores its projections, if otherwise.
        rewrite, rewritten_shape: a tensor that is not attention in the folded model's form.
        dropped: tensors the folded model has no place for.
        split: tensors that hold several of the usual ones' rows, and the names of those.
        multipliers: config keys of other factors, if any.
        no_latent: why no model of the family can be stored with latent attention, if so.
        opens: whether a model is what folds are stored as: it is opened, run and healed like
            others, and cannot be folded again.
    """

    model_types: tuple[str, ...]
    notes: str = ""
    layer: str = "model.layers.{layer}"
    attention: str = "self_attn"
    renamed: tuple[Renamed, ...] = ()
    tuples: bool = False
    offer: Callable[[str], None] = lambda implementation: None
    sinks: str = ""
    mlp_output: str | None = "mlp.down_proj"
    projections: Projections = SeparateProjections()
    rotary: Rotary = Rotary()
    qk_norm: QKNorm | None = None
    keys: ConfigKeys = ConfigKeys()
    post_norm: bool = False
    residual_scale: str | None = None
    learned_positions: tuple[str, ...] = ("n_positions",)
    default_head_dim: int | None = None
    unlisted_layers: Unlisted = all_alike
    mlp_matrices: int = 3
    experts: ReadExperts = usual_experts
    unfoldable: str = ""
    instead: str = ""
    refuse: Callable[[Config], str | None] = lambda config: None
    target: Callable[[Config, int], dict[str, Any]] | None = None
    target_projections: Projections | None = None
    rewrite: "Callable[[str, torch.Tensor], torch.Tensor] | None" = None
    rewritten_shape: Callable[[str, tuple[int, ...]], tuple[int, ...]] = lambda name, shape: shape
    dropped: Callable[[str], bool] = lambda name: False
    split: tuple[tuple[str, tuple[str, ...]], ...] = ()
    multipliers: Multipliers | None = None
    no_latent: str = ""
    opens: Callable[[Config], bool] = lambda config: False

    @property
    def name(self) -> str:
        return self.model_types[0]

    @property
    def base(self) -> str:
        """The attribute of transformers' module that holds everything but the output embedding."""
        return self.layer.partition(".")[0]

    def residual_factor(self, config: Config) -> float:
        """On a block's output when it joins the residual stream."""
        return float(config.get(self.residual_scale, 1.0)) if self.residual_scale else 1.0

    def decoder_layers(self) -> re.Pattern[str]:
        """Matches the paths of decoder layers in a module, whatever is wrapped around it."""
        return re.compile(rf"(^|\.){self._any_layer}$")

    def attention_parameters(self) -> re.Pattern[str]:
        """Finds the parameters of attention modules among a module's names."""
        return re.compile(rf"(^|\.){self._any_layer}\.{re.escape(self.attention)}\.")

    @property
    def _any_layer(self) -> str:
        return re.escape(self.layer).replace(re.escape("{layer}"), r"\d+")

    def sizes(self, config: Config) -> Sizes:
        """Head counts and sizes of a config that is within bounds.

        Raises:
            CheckpointError: if a size is missing.
        """
        return Sizes.read(config, self.keys, self.default_head_dim)

    def normalises(self, config: Config) -> QKNorm | None:
        """The norms of queries and keys in a model of this config."""
        return self.qk_norm and self.qk_norm.of(config)

    def rotary_dim(self, config: Config, geometry: AttentionGeometry) -> int:
        """Rotating dimensions of a head, in the layer that has the most."""
        layers = range(geometry.num_layers)
        return max(self.rotary.dim(config, geometry.head_dim, layer) for layer in layers)

    def geometry(self, config: Config) -> AttentionGeometry:
        """Head counts and sizes from a ``config.json``, for folding.

        Raises:
            CheckpointError: if a size is missing or not a number.
        """
        CONFIG.check(dict(config), "config.json")
        sizes = self.sizes(config)
        rotary = config.get("no_rope_layers")
        if rotary and len(rotary) != sizes.num_layers:
            raise CheckpointError(
                f"config.json: no_rope_layers has {len(rotary)} entries; expected "
                f"{sizes.num_layers}, one per layer",
                CONFIG.hint,
            )
        if config.get("kv_lora_rank"):
            return latent_geometry(config, sizes)
        size = sizes.head_dim
        return AttentionGeometry(
            sizes.num_layers, sizes.num_heads, sizes.num_kv_heads, size, size, sizes.hidden_size
        )

    def folded_config(self, config: Config, num_kv_heads: int) -> dict[str, Any]:
        """The config of the folded model; a copy, everything else untouched."""
        if self.target is not None:
            return self.target(config, num_kv_heads)
        kv_heads = {self.keys.num_kv_heads: num_kv_heads} if self.keys.num_kv_heads else {}
        return {**config, **kv_heads}


def unless(key: str, reason: str) -> Callable[[Config], str | None]:
    """A ``Family.refuse``: where ``key`` is set, for this reason."""
    return lambda config: reason if config.get(key) else None
