"""DeepSeek and Youtu: multi-head latent attention (arXiv 2405.04434), with and without experts."""

from kvfold.arch.family import Family
from kvfold.arch.latent import LatentProjections
from kvfold.arch.parameters import EXPERTS
from kvfold.arch.sizes import Config

_UNFOLDABLE = "multi-head latent attention already caches one shared latent"


def _all_dense(config: Config) -> bool:
    """Whether no layer has experts: what ``convert --latent`` writes."""
    return int(config.get("first_k_dense_replace") or 0) >= int(config["num_hidden_layers"])


FAMILIES = (
    Family(
        ("deepseek_v3",),
        renamed=EXPERTS,
        projections=LatentProjections(),
        unfoldable=_UNFOLDABLE,
        opens=_all_dense,
    ),
    Family(("deepseek_v2",), renamed=EXPERTS, unfoldable=_UNFOLDABLE),
    Family(
        ("youtu",),
        projections=LatentProjections(),
        unfoldable=_UNFOLDABLE,
        opens=lambda config: True,
    ),
)
