"""StableLM."""

from kvfold.arch.family import LAYER_NORMS, NORM_PER_HEAD, Family, Rotary, unless

FAMILIES = (
    Family(
        ("stablelm",),
        "partial rotary",
        rotary=Rotary(default_factor=0.25),
        refuse=unless("qk_layernorm", NORM_PER_HEAD),
        no_latent=LAYER_NORMS,
    ),
)
