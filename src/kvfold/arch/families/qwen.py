"""Qwen2 and later."""

from kvfold.arch.family import Family, QKNorm
from kvfold.arch.parameters import EXPERTS

FAMILIES = (
    Family(("qwen2",), "K and V biases"),
    Family(("qwen3",), "QK-norm", qk_norm=QKNorm()),
    Family(("qwen2_moe",), "K and V biases; experts", renamed=EXPERTS, mlp_output=None),
    Family(("qwen3_moe",), "QK-norm; experts", renamed=EXPERTS, mlp_output=None, qk_norm=QKNorm()),
)
