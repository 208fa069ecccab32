"""EXAONE 4."""

from kvfold.arch.family import Family, QKNorm, WindowedRotary

FAMILIES = (
    Family(
        ("exaone4",),
        "QK-norm, rotary in layers with a window; blocks' outputs are normalised",
        rotary=WindowedRotary(),
        qk_norm=QKNorm(),
        post_norm=True,
    ),
)
