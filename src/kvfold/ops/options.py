"""What attention can be asked for, in the one form that every path and kernel reads."""

from typing import NamedTuple

import torch

#: What people give: keys up to a query's own, itself included, or keys before and after its own.
Window = int | tuple[int | None, int | None]


class Options(NamedTuple):
    """What hides, bends and biases scores; ``kernels.checks.check_options`` makes and checks it.

    None is "none" everywhere: no limit, no softcap, no tensor; ``scale`` None is ``D ** -0.5``.
    A tuple, as making a frozen dataclass would take a twentieth of a step's fixed cost.

    Attributes:
        left, right: how many keys before and after its own position a query sees. Causal is
            ``right=0``; a causal window of w tokens is ``left=w - 1, right=0``.
        sinks: first keys that ``left`` does not hide.
        start, lengths: int ``[B]``, the keys of a sequence. Where they are stored with their
            lengths, as in a cache, the latter are given beside this.
        mask: boolean or additive, broadcastable to ``[B, Hq, T, S]``.
        alibi_slopes: ``[Hq]``. sink_logits: ``[Hq]``, of a key that everyone sees, without value.
    """

    left: int | None = None
    right: int | None = None
    sinks: int = 0
    start: torch.Tensor | None = None
    lengths: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    scale: float | None = None
    softcap: float | None = None
    alibi_slopes: torch.Tensor | None = None
    sink_logits: torch.Tensor | None = None

    @property
    def causal(self) -> bool:
        """Whether a query sees no later keys than its own."""
        return self.right == 0


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


def reach(causal: bool, window: Window | None) -> tuple[int | None, int | None]:
    """How many keys before and after its own a query sees.

    >>> reach(True, None), reach(True, 3), reach(False, (3, -1))
    ((None, 0), (2, 0), (3, None))
    """
    if window is None:
        left = right = None
    elif isinstance(window, tuple | list):
        left, right = (None if x == -1 else x for x in window)
    else:
        left, right = window - 1, 0
    return left, 0 if causal else right


def limit(keys: int | None) -> int:
    """``left`` or ``right`` as kernels take it: -1 is none, and sums with it do not overflow."""
    return -1 if keys is None else min(keys, 1 << 30)
