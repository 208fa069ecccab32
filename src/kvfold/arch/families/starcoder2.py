"""StarCoder2."""

from kvfold.arch.family import LAYER_NORMS, Family

FAMILIES = (
    Family(
        ("starcoder2",),
        "biases",
        mlp_output="mlp.c_proj",
        mlp_matrices=2,
        no_latent=LAYER_NORMS,
    ),
)
