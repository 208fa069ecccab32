"""Granite: blocks' outputs are scaled before they join the residual stream."""

from kvfold.arch.family import Family, Multipliers

FAMILIES = (
    Family(
        ("granite",),
        residual_scale="residual_multiplier",
        multipliers=Multipliers("embedding_multiplier", "attention_multiplier", "logits_scaling"),
    ),
)
