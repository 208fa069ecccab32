"""Cohere's Command R."""

from kvfold.arch.family import LAYER_NORMS, NORM_PER_HEAD, Family, Rotary, unless

FAMILIES = (
    Family(
        ("cohere",),
        "interleaved rotary, parallel MLP",
        rotary=Rotary(interleaved=True),
        refuse=unless("use_qk_norm", NORM_PER_HEAD),
        no_latent=LAYER_NORMS,
    ),
)
