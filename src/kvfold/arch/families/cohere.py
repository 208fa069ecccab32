"""Cohere's Command R, Command R7B and Command A."""

from kvfold.arch.family import LAYER_NORMS, NORM_PER_HEAD, Family, Rotary, WindowedRotary, unless

FAMILIES = (
    Family(
        ("cohere",),
        "interleaved rotary, parallel MLP",
        rotary=Rotary(interleaved=True),
        refuse=unless("use_qk_norm", NORM_PER_HEAD),
        no_latent=LAYER_NORMS,
    ),
    Family(
        ("cohere2",),
        "interleaved rotary in layers with a window",
        rotary=WindowedRotary(interleaved=True),
        no_latent=LAYER_NORMS,
    ),
)
