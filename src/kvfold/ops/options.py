"""What attention can be asked for, in the one form that every path and kernel reads."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Options:
    """What hides, bends and biases scores; ``kernels.checks.check_options`` makes and checks it.

    None is "none" everywhere: no limit, no softcap, no tensor; ``scale`` None is ``D ** -0.5``.

    Attributes:
        left, right: how many keys before and after its own position a query sees. Causal is
            ``right=0``; a causal window of w tokens is ``left=w - 1, right=0``.
        sinks: first keys that ``left`` does not hide.
        start, lengths: int ``[B]``, the keys of a sequence. Where they are stored with their
            lengths, as in a cache, the latter are given beside this.
        mask: boolean or additive, broadcastable to ``[B, Hq, T, S]``.
        alibi_slopes: ``[Hq]``.
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

    @property
    def causal(self) -> bool:
        """Whether a query sees no later keys than its own."""
        return self.right == 0

    @property
    def window(self) -> int | None:
        """How many keys up to its own a query sees."""
        return None if self.left is None else self.left + 1


def reach(causal: bool, window: int | None) -> tuple[int | None, int | None]:
    """How many keys before and after its own a query sees.

    >>> reach(True, None), reach(True, 3), reach(False, None)
    ((None, 0), (2, 0), (None, None))
    """
    return None if window is None else window - 1, 0 if causal else None
