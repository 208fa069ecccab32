"""AFM of Arcee."""

from kvfold.arch.family import Family

FAMILIES = (
    Family(
        ("arcee",),
        "no gates",
        mlp_matrices=2,
        no_latent="its MLPs have no gates, which those of the target have",
    ),
)
