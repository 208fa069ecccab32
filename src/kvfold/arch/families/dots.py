"""dots.llm1."""

from kvfold.arch.family import Family, QKNorm
from kvfold.arch.parameters import EXPERTS

FAMILIES = (
    Family(("dots1",), "QK-norm; experts", renamed=EXPERTS, mlp_output=None, qk_norm=QKNorm()),
)
