"""The last queries of a layer, which say what of its cache is still attended to."""

import torch


class LastQueries:
    """Of every sequence the last ``window`` queries."""

    def __init__(self, window: int) -> None:
        self._window = window
        self._parts: list[torch.Tensor] = []  # [B, Hq, T, D] each

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self._parts)

    @property
    def count(self) -> int:
        return sum(part.shape[2] for part in self._parts)

    def add(self, q: torch.Tensor) -> None:
        """Queries ``[B, Hq, T, D]`` come after those that are here."""
        if q.shape[2] > self._window:
            q = q[:, :, -self._window :].clone()
        self._parts.append(q.detach())
        while self.count - self._parts[0].shape[2] >= self._window:
            del self._parts[0]

    def tensor(self) -> torch.Tensor:
        """They, ``[B, Hq, T, D]``."""
        return torch.cat(self._parts, 2)[:, :, -self._window :]

    def crop(self, count: int) -> None:
        """Take the last ones back."""
        while count and self._parts:
            last = self._parts.pop()
            left = last.shape[2] - count
            if left > 0:
                self._parts.append(last[:, :, :left])
            count = max(0, -left)

    def select(self, rows: list[int]) -> None:
        """Make sequence i what sequence ``rows[i]`` was."""
        self._parts = [part[rows] for part in self._parts]

    def clear(self) -> None:
        self._parts = []
