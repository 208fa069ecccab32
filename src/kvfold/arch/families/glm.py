"""GLM-4, of which half of each head rotates; of 0414 what blocks put out is normalised, too."""

from kvfold.arch.family import Family, QKNorm, Rotary
from kvfold.arch.parameters import EXPERTS

_GATE = (("mlp.gate_up_proj.weight", ("mlp.gate_proj.weight", "mlp.up_proj.weight")),)
FAMILIES = (
    Family(
        ("glm",),
        "partial interleaved rotary, Q, K and V biases",
        rotary=Rotary(default_factor=0.5, interleaved=True),
        split=_GATE,
    ),
    Family(
        ("glm4",),
        "as glm; blocks' outputs are normalised",
        rotary=Rotary(default_factor=0.5, interleaved=True),
        post_norm=True,
        split=_GATE,
        no_latent="its blocks' outputs are normalised, for which the target has no place",
    ),
    Family(
        ("glm4_moe",),
        "GLM-4.5 to 4.7: partial rotary, in some QK-norm; experts",
        renamed=EXPERTS,
        mlp_output=None,
        rotary=Rotary(default_factor=0.5),
        qk_norm=QKNorm(switch="use_qk_norm"),
    ),
)
