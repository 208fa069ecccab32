"""Phi: Phi-1 to Phi-2, and the different Phi-3 and Phi-4."""

from kvfold.arch.family import LAYER_NORMS, Family, Rotary, unless
from kvfold.arch.projections import FusedProjections, SeparateProjections

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
)
