"""Gemma: heads wider than hidden size / heads, and norms after each block."""

from kvfold.arch.family import Family, QKNorm
from kvfold.arch.layers import every_other

_NORMS = "its norms add 1 to their weights and its embeddings are scaled, unlike the target's"
FAMILIES = (
    Family(("gemma",), default_head_dim=256, no_latent=_NORMS),
    Family(
        ("gemma2",),
        "logit softcap, sliding layers",
        post_norm=True,
        no_latent="its scores and logits have a softcap, for which the target has no place",
        default_head_dim=256,
        unlisted_layers=every_other,
    ),
    Family(
        ("gemma3_text",),
        "QK-norm, sliding layers",
        qk_norm=QKNorm(offset=1.0),
        post_norm=True,
        default_head_dim=256,
    ),
)
