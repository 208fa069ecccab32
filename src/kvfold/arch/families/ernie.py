"""ERNIE 4.5, dense and with experts."""

from kvfold.arch.experts import Experts
from kvfold.arch.family import Family, Rotary
from kvfold.arch.parameters import EXPERTS, Renamed
from kvfold.arch.sizes import Config, optional

_BIAS = "moe_statics.e_score_correction_bias"


def _experts(config: Config, layers: int, inner: int) -> Experts:
    """From one layer to another, every so-manieth."""
    first, last = config.get("moe_layer_start_index", 1), config.get("moe_layer_end_index", -1)
    every = optional(config, "moe_layer_interval") or 1
    places = range(first or 0, layers if last in (None, -1) else min(last + 1, layers))
    total = optional(config, "moe_num_experts", "num_experts") or 0
    return Experts(
        layers=sum((layer + 1) % every == 0 for layer in places) if total else 0,
        total=total,
        chosen=optional(config, "moe_k", "num_experts_per_tok") or 1,
        shared=optional(config, "moe_num_shared_experts") or 0,
        size=optional(config, "moe_intermediate_size") or inner,
        dense_size=inner,
    )


FAMILIES = (
    Family(("ernie4_5",), "interleaved rotary", rotary=Rotary(interleaved=True)),
    Family(
        ("ernie4_5_moe",),
        "the same; experts",
        renamed=(*EXPERTS, Renamed(f"mlp.gate.{_BIAS}", (f"mlp.{_BIAS}",))),
        mlp_output=None,
        rotary=Rotary(interleaved=True),
        experts=_experts,
    ),
)
