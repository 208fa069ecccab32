"""gpt-oss."""

from kvfold.arch.family import Family

FAMILIES = (
    Family(
        ("gpt_oss",),
        "sinks, biases, sliding layers; experts",
        sinks="sinks",
        mlp_output=None,
        no_latent="its attention has sinks, for which the target has no place",
    ),
)
