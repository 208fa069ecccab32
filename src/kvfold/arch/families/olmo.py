"""OLMo 2 and 3."""

from kvfold.arch.family import Family

FAMILIES = (
    Family(
        ("olmo2", "olmo3"),
        unfoldable="its QK-norm runs over all heads at once, so heads cannot be folded apart",
    ),
)
