"""OLMo."""

from kvfold.arch.family import LAYER_NORMS, Family, unless

FAMILIES = (
    Family(
        ("olmo",),
        "norms without weights",
        refuse=unless("clip_qkv", "it clips q, k and v (clip_qkv), which no gauge keeps"),
        no_latent=LAYER_NORMS,
    ),
    Family(
        ("olmo2", "olmo3"),
        unfoldable="its QK-norm runs over all heads at once, so heads cannot be folded apart",
    ),
)
