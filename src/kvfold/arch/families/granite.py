"""Granite: blocks' outputs are scaled before they join the residual stream."""

from kvfold.arch.family import MIXTURES, Family, Multipliers
from kvfold.arch.parameters import Renamed

_MULTIPLIERS = Multipliers("embedding_multiplier", "attention_multiplier", "logits_scaling")
_MIXTURE = "block_sparse_moe"
FAMILIES = (
    Family(("granite",), residual_scale="residual_multiplier", multipliers=_MULTIPLIERS),
    Family(
        ("granitemoe",),
        "experts",
        renamed=(
            Renamed(f"{_MIXTURE}.router.weight", (f"{_MIXTURE}.router.layer.weight",)),
            Renamed(f"{_MIXTURE}.experts.gate_up_proj", (f"{_MIXTURE}.input_linear.weight",)),
            Renamed(f"{_MIXTURE}.experts.down_proj", (f"{_MIXTURE}.output_linear.weight",)),
        ),
        mlp_output=None,
        residual_scale="residual_multiplier",
        multipliers=_MULTIPLIERS,
        no_latent=MIXTURES,
    ),
)
