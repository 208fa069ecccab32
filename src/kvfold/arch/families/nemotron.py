"""Nemotron and Minitron."""

from kvfold.arch.family import LAYER_NORMS, Family, Rotary

FAMILIES = (
    Family(
        ("nemotron",),
        "partial rotary, no gates",
        mlp_matrices=2,
        rotary=Rotary(default_factor=0.5),
        no_latent=LAYER_NORMS,
    ),
)
