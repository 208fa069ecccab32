"""Some of a layer's inputs, on which folded queries and keys are tried: what attention they make.

Energies say little about keys: of two that keep as much, one may change where attention goes, and
the other only scores of tokens that nobody attends to; and a key that has turned too far fails at
a distance only. So both are measured: in windows as they are, and with their keys moved away.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from kvfold.fold.pairs import Pairs

WINDOWS = 2
TOKENS = 512  # of each, at most
DISTANCES = (0, 3584)  # that keys are further away than in their windows


@dataclass(frozen=True)
class Projected:
    """Rows that make queries ``[g, R, D, X]`` and keys, ``[g, D, X]`` or shared ``[D, X]``."""

    q: torch.Tensor
    k: torch.Tensor


class Attention(NamedTuple):
    """Of all heads, ``[g, R, T, T]``, and its logarithms."""

    weights: torch.Tensor
    logs: torch.Tensor


@dataclass(frozen=True)
class Sample:
    """Inputs of a layer, and how its queries and keys turn.

    Attributes:
        inputs: ``[N, T, X]``, with a 1 for biases. frequencies: ``[F]``, radians per token.
        scale: of the scores.
    """

    inputs: torch.Tensor
    frequencies: torch.Tensor
    scale: float

    @classmethod
    def of(
        cls,
        inputs: torch.Tensor,
        keys: torch.Tensor,
        rows: torch.Tensor,
        pairs: Pairs,
        scale: float,
    ) -> "Sample":
        """Of the first windows of a batch.

        Args:
            inputs: ``[B, T, X]``. keys: ``[B, Hkv, T, D]``, turned by their positions. rows:
                ``[Hkv, D, X]``, that make them before they turn.
        """
        some = inputs[:WINDOWS, :TOKENS].double()
        turned = pairs.split(keys[:WINDOWS, :, :TOKENS].double().mT)[0]
        still = pairs.split(torch.einsum("ntx,hdx->nhdt", some, rows))[0]
        turns = (turned * still.conj()).sum((0, 1))  # [F, T], all windows begin at one position
        turns = turns / turns.abs().clamp_min(1e-300)
        steps = (turns[:, 1:] * turns[:, :-1].conj()).sum(1)
        return cls(some.float(), steps.angle(), scale)

    def attention(self, rows: Projected, pairs: Pairs) -> list[Attention]:
        """What these make of each distance and window."""
        return [Attention(logs.exp(), logs) for logs in self._logs(rows, pairs)]

    def divergence(self, old: list[Attention], new: Projected, pairs: Pairs) -> float:
        """KL of the attention that ``new`` makes from ``old``, nats, mean over distances, queries
        and heads."""
        total = count = 0.0
        for own, logs in zip(old, self._logs(new, pairs), strict=True):
            total += float((own.logs - logs).mul_(own.weights).sum())
            count += logs.shape[:-1].numel()
        return total / count

    def errors(self, old: Projected, new: Projected, pairs: Pairs) -> tuple[float, float]:
        """The variance of scores within attention, and that of their error, summed over queries.

        What all keys of a query have in common cancels in the softmax.
        """
        size = error = 0.0
        for window in self.inputs:
            scores, others = (self._scores(window, rows, pairs, 0) for rows in (old, new))
            weights = _causal(scores.clone()).softmax(-1)
            size += _variance(scores, weights)
            error += _variance(others - scores, weights)
        return size, error

    def _logs(self, rows: Projected, pairs: Pairs) -> Iterator[torch.Tensor]:
        for distance in DISTANCES:
            for window in self.inputs:
                yield _causal(self._scores(window, rows, pairs, distance)).log_softmax(-1)

    def _scores(
        self, window: torch.Tensor, rows: Projected, pairs: Pairs, distance: int
    ) -> torch.Tensor:
        places = torch.arange(len(window), device=window.device)
        queries = self._turned(rows.q.float() @ window.mT, places + distance, pairs)
        keys = self._turned(rows.k.float() @ window.mT, places, pairs)
        keys = keys if keys.dim() == 2 else keys[:, None]
        return self.scale * queries.mT @ keys

    def _turned(self, x: torch.Tensor, places: torch.Tensor, pairs: Pairs) -> torch.Tensor:
        """``[…, D, T]``, turned by its places ``[T]``."""
        rotating, rest = pairs.split(x)
        angles = self.frequencies[:, None] * places
        return pairs.join(
            torch.polar(torch.ones_like(angles), angles).to(rotating) * rotating, rest
        )


def _causal(scores: torch.Tensor) -> torch.Tensor:
    """In place; what is hidden stays finite, so that it counts nothing when weighed by nothing."""
    later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu_(1)
    return scores.masked_fill_(later, torch.finfo(scores.dtype).min)


def _variance(x: torch.Tensor, weights: torch.Tensor) -> float:
    """Within each row's weights, summed over rows."""
    apart = x - (weights * x).sum(-1, keepdim=True)
    return float((weights * apart.square()).sum(dtype=torch.float64))
