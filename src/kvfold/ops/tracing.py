"""What ``torch.compile`` is told as it traces, so that one graph serves all sizes."""

import torch


def constant(number: float) -> float:
    """The number, which ``torch.compile`` takes as a constant even where all is dynamic.

    PyTorch's own attention has no symbols for scales; keys of dictionaries never are symbols.
    """
    if not torch.compiler.is_compiling():
        return number
    return next(iter({number: None}))


def decided(condition: bool) -> bool:
    """The condition, which ``torch.compile`` decides as it traces, where it would be a symbol."""
    return True if condition else False  # noqa: SIM210
