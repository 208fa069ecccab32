"""Some of a layer's inputs, on which folded queries and keys are tried: what attention they make.

Energies say little about keys: of two that keep as much, one may change where attention goes, and
the other only scores of tokens that nobody attends to; and a key that has turned too far fails at
a distance only. So both are measured: in windows as they are, and with their keys moved away.
"""

from collections.abc import Iterator
from dataclasses import dataclass

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

    def divergence(self, old: Projected, new: Projected, pairs: Pairs) -> float:
        """KL of the attention that ``new`` makes from that of ``old``, nats, mean over distances,
        queries and heads."""
        total = count = 0.0
        for distance in DISTANCES:
            for p, q in self._pairs_of_logs(old, new, pairs, distance):
                apart = (p.exp() * (p - q)).masked_fill(p == -torch.inf, 0.0)
                total, count = total + float(apart.sum()), count + p.shape[:-1].numel()
        return total / count

    def errors(self, old: Projected, new: Projected, pairs: Pairs) -> tuple[float, float]:
        """The variance of scores within attention, and that of their error, summed over queries.

        What all keys of a query have in common cancels in the softmax.
        """
        size = error = 0.0
        for scores, others in self._both(old, new, pairs, 0):
            weights = _causal(scores).softmax(-1)
            size += _variance(scores, weights)
            error += _variance(others - scores, weights)
        return size, error

    def _pairs_of_logs(
        self, old: Projected, new: Projected, pairs: Pairs, distance: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for each in self._both(old, new, pairs, distance):
            yield _causal(each[0]).log_softmax(-1), _causal(each[1]).log_softmax(-1)

    def _both(
        self, old: Projected, new: Projected, pairs: Pairs, distance: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Scores ``[g, R, T, T]`` of both, window by window."""
        for window in self.inputs:
            yield tuple(self._scores(window, rows, pairs, distance) for rows in (old, new))  # type: ignore[misc]

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
    later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu_(1)
    return scores.masked_fill(later, -torch.inf)


def _variance(x: torch.Tensor, weights: torch.Tensor) -> float:
    """Within each row's weights, summed over rows."""
    apart = x - (weights * x).sum(-1, keepdim=True)
    return float((weights * apart.square()).sum(dtype=torch.float64))
