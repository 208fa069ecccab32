"""Qwen2 and later."""

from kvfold.arch.family import Family, QKNorm
from kvfold.arch.parameters import EXPERTS

FAMILIES = (
    Family(("qwen2",), "K and V biases"),
    Family(("qwen3",), "QK-norm", qk_norm=QKNorm()),
    Family(
        ("qwen3_moe",),
        renamed=EXPERTS,
        unfoldable="mixture-of-experts layers are not supported",
    ),
)
