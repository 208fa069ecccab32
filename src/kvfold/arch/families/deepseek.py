"""DeepSeek: multi-head latent attention (arXiv 2405.04434) and mixtures of experts."""

from kvfold.arch.family import Family
from kvfold.arch.parameters import EXPERTS

FAMILIES = (
    Family(
        ("deepseek_v2", "deepseek_v3"),
        renamed=EXPERTS,
        unfoldable="multi-head latent attention already caches one shared latent",
    ),
)
