"""OLMo."""

from kvfold.arch.family import LAYER_NORMS, Family, unless
from kvfold.arch.parameters import EXPERTS
from kvfold.arch.projections import NormedProjections

_CLIPPED = unless("clip_qkv", "it clips q, k and v (clip_qkv), which no gauge keeps")
_WIDE_NORM = "its norms of queries and keys over all heads have no place in the target"

FAMILIES = (
    Family(
        ("olmo",),
        "norms without weights",
        refuse=_CLIPPED,
        no_latent=LAYER_NORMS,
    ),
    Family(
        ("olmo2", "olmo3"),
        "QK-norm over all heads",
        projections=NormedProjections(),
        post_norm=True,
        no_latent=_WIDE_NORM,
    ),
    Family(
        ("olmoe",),
        "QK-norm over all heads, mixture of experts",
        projections=NormedProjections(),
        renamed=EXPERTS,
        mlp_output=None,
        refuse=_CLIPPED,
    ),
    Family(
        ("flex_olmo",),
        "QK-norm over all heads, mixture of experts",
        projections=NormedProjections(),
        renamed=EXPERTS,
        mlp_output=None,
        post_norm=True,
    ),
)
