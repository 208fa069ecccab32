"""Phi: Phi-1 to Phi-2, and the different Phi-3 and Phi-4."""

from kvfold.arch.family import LAYER_NORMS, Family, Rotary, unless
from kvfold.arch.parameters import Renamed
from kvfold.arch.projections import FusedProjections, SeparateProjections

_EXPERT = "block_sparse_moe.experts.{expert}"
FAMILIES = (
    Family(
        ("phi",),
        "partial rotary, biases, parallel MLP",
        projections=SeparateProjections(o="dense"),
        mlp_output="mlp.fc2",
        mlp_matrices=2,
        rotary=Rotary(default_factor=0.5),
        refuse=unless("qk_layernorm", "its QK layer norm subtracts a mean, which no gauge keeps"),
        no_latent=LAYER_NORMS,
    ),
    Family(
        ("phi3",),
        "fused qkv; also Phi-4",
        projections=FusedProjections(),
        split=(("mlp.gate_up_proj.weight", ("mlp.gate_proj.weight", "mlp.up_proj.weight")),),
    ),
    Family(
        ("phimoe",),
        "experts",
        renamed=(
            Renamed("mlp.router.weight", ("block_sparse_moe.gate.weight",)),
            Renamed("mlp.experts.gate_up_proj", (f"{_EXPERT}.w1.weight", f"{_EXPERT}.w3.weight")),
            Renamed("mlp.experts.down_proj", (f"{_EXPERT}.w2.weight",)),
        ),
        mlp_output=None,
        no_latent=LAYER_NORMS,
    ),
)
