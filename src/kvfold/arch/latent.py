"""Multi-head latent attention as checkpoints store it: its weights, and their names. No torch."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvfold.arch.projections import Load, Shapes
from kvfold.arch.sizes import Config, Sizes, optional, required
from kvfold.errors import UnsupportedError
from kvfold.geometry import AttentionGeometry, LatentGeometry

if TYPE_CHECKING:
    import torch


def latent_geometry(config: Config, sizes: Sizes) -> LatentGeometry:
    """The geometry of a config of DeepSeek's kind.

    Raises:
        CheckpointError: if it lacks a size.
    """
    rotary = required(config, "qk_rope_head_dim")
    return LatentGeometry(
        sizes.num_layers,
        sizes.num_heads,
        sizes.num_heads,
        required(config, "qk_nope_head_dim") + rotary,
        required(config, "v_head_dim"),
        sizes.hidden_size,
        required(config, "kv_lora_rank"),
        rotary,
        optional(config, "q_lora_rank") or 0,
    )


@dataclass
class LatentWeights:
    """The projections of one layer (arXiv 2405.04434), as they are stored.

    Attributes:
        q: ``[Hq, N + P, C]``, the rotary part last, pairs (2j, 2j + 1).
        kv_a: ``[rank + P, C]``, the latent before its norm and the rotary key.
        norm: ``[rank]``, the weight of the latent's RMS norm.
        kv_b: ``[Hq, N + Dv, rank]``, keys and values of the latent.
        o: ``[Hq, C, Dv]``.
        kv_a_bias: ``[rank + P]``; o_bias: ``[C]``; None where there is none.
        q_a: ``[Q, C]``; q_norm: ``[Q]``: with them q is ``[Hq, N + P, Q]``, of the queries' own
            latent; None where queries are one projection.
    """

    q: "torch.Tensor"
    kv_a: "torch.Tensor"
    norm: "torch.Tensor"
    kv_b: "torch.Tensor"
    o: "torch.Tensor"
    kv_a_bias: "torch.Tensor | None" = None
    o_bias: "torch.Tensor | None" = None
    q_a: "torch.Tensor | None" = None
    q_norm: "torch.Tensor | None" = None


@dataclass(frozen=True)
class LatentProjections:
    """DeepSeek's names.

    Attributes:
        bias: whether there are biases, where a checkpoint's names do not tell.
        fixed: what fitting leaves as it is: norms that only undo what is known, and their like.
    """

    o: str = "o_proj"
    bias: bool = False
    fixed: tuple[str, ...] = ("kv_a_layernorm", "q_a_proj", "q_a_layernorm")

    def shapes(self, prefix: str, geometry: AttentionGeometry, names: set[str]) -> Shapes:
        """Every tensor of a layer, with its shape."""
        g = _latent(geometry)
        rows = g.num_heads * g.head_dim
        kv_a = g.kv_lora_rank + g.qk_rope_head_dim
        weights: Shapes = {
            "kv_a_proj_with_mqa.weight": (kv_a, g.hidden_size),
            "kv_a_layernorm.weight": (g.kv_lora_rank,),
            "kv_b_proj.weight": (
                g.num_heads * (g.qk_nope_head_dim + g.v_head_dim),
                g.kv_lora_rank,
            ),
            "o_proj.weight": (g.hidden_size, g.num_heads * g.v_head_dim),
        }
        if g.q_lora_rank:
            weights |= {
                "q_a_proj.weight": (g.q_lora_rank, g.hidden_size),
                "q_a_layernorm.weight": (g.q_lora_rank,),
                "q_b_proj.weight": (rows, g.q_lora_rank),
            }
        else:
            weights = {"q_proj.weight": (rows, g.hidden_size)} | weights
        biases: Shapes = {
            "kv_a_proj_with_mqa.bias": (kv_a,),
            "o_proj.bias": (g.hidden_size,),
        }
        if g.q_lora_rank:
            biases["q_a_proj.bias"] = (g.q_lora_rank,)
        has = {name: shape for name, shape in biases.items() if f"{prefix}.{name}" in names}
        every = weights | (biases if self.bias else has)
        return {f"{prefix}.{name}": shape for name, shape in every.items()}

    def read(
        self, prefix: str, geometry: AttentionGeometry, load: Load, names: set[str]
    ) -> "LatentWeights":
        """Load one layer's weights."""
        g = _latent(geometry)

        def maybe(name: str) -> "torch.Tensor | None":
            return load(f"{prefix}.{name}") if f"{prefix}.{name}" in names else None

        q = "q_b_proj" if g.q_lora_rank else "q_proj"
        o = load(f"{prefix}.o_proj.weight")
        return LatentWeights(
            q=load(f"{prefix}.{q}.weight").unflatten(0, (g.num_heads, g.head_dim)),
            kv_a=load(f"{prefix}.kv_a_proj_with_mqa.weight"),
            norm=load(f"{prefix}.kv_a_layernorm.weight"),
            kv_b=load(f"{prefix}.kv_b_proj.weight").unflatten(0, (g.num_heads, -1)),
            o=o.unflatten(1, (g.num_heads, g.v_head_dim)).transpose(0, 1),
            kv_a_bias=maybe("kv_a_proj_with_mqa.bias"),
            o_bias=maybe("o_proj.bias"),
            q_a=maybe("q_a_proj.weight"),
            q_norm=maybe("q_a_layernorm.weight"),
        )

    def write(self, prefix: str, weights: "LatentWeights") -> "dict[str, torch.Tensor]":
        """The inverse of :meth:`read`."""
        w = weights
        tensors = {
            "q_proj.weight" if w.q_a is None else "q_b_proj.weight": w.q.flatten(0, 1),
            "kv_a_proj_with_mqa.weight": w.kv_a,
            "kv_a_layernorm.weight": w.norm,
            "kv_b_proj.weight": w.kv_b.flatten(0, 1),
            "o_proj.weight": w.o.transpose(0, 1).flatten(1),
            "q_a_proj.weight": w.q_a,
            "q_a_layernorm.weight": w.q_norm,
            "kv_a_proj_with_mqa.bias": w.kv_a_bias,
            "o_proj.bias": w.o_bias,
        }
        return {f"{prefix}.{name}": each for name, each in tensors.items() if each is not None}


def _latent(geometry: AttentionGeometry) -> LatentGeometry:
    if not isinstance(geometry, LatentGeometry):
        raise UnsupportedError("these projections are those of latent attention", "a bug of kvfold")
    return geometry


@dataclass(frozen=True)
class Layout:
    """A stock architecture that a latent is stored as.

    Attributes:
        bias: whether the latent's projection and the output's have biases, so that a constant in
            the latent is exact.
        untied: whether the output embedding is written out.
        two_steps: whether queries are projected in two steps, of which the first changes nothing.
        yarn: whether rotary parameters are those of YaRN, which scales by 1.
        scaled_rotary: whether it can say Llama 3's scaling of rotary frequencies.
        engines: what opens it without code of its own.
    """

    model_type: str
    architecture: str
    engines: str
    bias: bool = False
    untied: bool = False
    two_steps: bool = False
    yarn: bool = False
    scaled_rotary: bool = False


LAYOUTS = {
    "deepseek_v3": Layout(
        "deepseek_v3", "DeepseekV3ForCausalLM", "transformers, vLLM", untied=True, yarn=True
    ),
    "portable": Layout(
        "deepseek_v3",
        "DeepseekV3ForCausalLM",
        "transformers, vLLM, llama.cpp",
        untied=True,
        two_steps=True,
        yarn=True,
    ),
    "youtu": Layout("youtu", "YoutuForCausalLM", "transformers", bias=True, scaled_rotary=True),
}
