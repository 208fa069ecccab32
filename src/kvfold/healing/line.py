"""How much of what training changed is kept: what does best on held-out text.

On the line from the folded model's weights a to the trained ones b, a + s (b - a): s = 0 is among
the shares, so that no model is worse for having been healed, by what is measured; between the ends
models are often better on other kinds of text (WiSE-FT, arXiv 2109.01903); beyond them the line
goes on in the direction in which few tokens have not gone far enough.
"""

from collections.abc import Callable, Iterable
from math import inf, isfinite

import torch

STEP, MOST = 0.25, 2.0


def best_share(measure: Callable[[float], float]) -> tuple[float, dict[float, float]]:
    """The share s for which ``measure(s)`` is least, and all that was measured.

    From 1 in steps of a quarter to where it gets no better; and 0.

    >>> best_share(lambda share: (share - 0.6) ** 2)[0]
    0.5
    """

    def at(share: float) -> float:
        value = measure(share)
        return value if isfinite(value) else inf

    found = {1.0: at(1.0)}
    for step in (STEP, -STEP):
        share = 1.0
        while 0 <= share + step <= MOST:
            share += step
            found[share] = at(share)
            if not found[share] < found[share - step]:
                break
        if min(found, key=found.__getitem__) != 1.0:
            break  # what lies the other way is worse still
    if 0.0 not in found:
        found[0.0] = at(0.0)
    return min(found, key=found.__getitem__), found


class Line:
    """The weights of a model, from what they are now to what they will be.

    Args:
        parameters: what is trained; of sharded ones this process's part. Their present values are
            kept in the CPU's memory.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        self._parameters = list(parameters)
        self._start = [_kept(parameter) for parameter in self._parameters]
        self._end: list[torch.Tensor] = []

    def end(self) -> None:
        """The present values are the line's other end."""
        self._end = [_kept(parameter) for parameter in self._parameters]

    @torch.no_grad()
    def go(self, share: float) -> None:
        """Set the weights to those at so much of the way: at 0 and 1 to the very bits."""
        for parameter, start, end in zip(self._parameters, self._start, self._end, strict=True):
            _own(parameter).copy_(torch.lerp(start, end, share))


def _own(parameter: torch.nn.Parameter) -> torch.Tensor:
    """What this process holds of it."""
    data = parameter.detach()
    local: torch.Tensor = data.to_local() if hasattr(data, "to_local") else data
    return local


def _kept(parameter: torch.nn.Parameter) -> torch.Tensor:
    return _own(parameter).to("cpu", copy=True)
