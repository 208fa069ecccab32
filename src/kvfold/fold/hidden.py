"""Hidden states of a text between two layers, wherever they find room."""

from collections.abc import Iterator
from pathlib import Path

import torch

from kvfold.files import reserve

BATCH_TOKENS = 4096  # tokens run through a layer at once
SPILL_BYTES = 2**30  # hidden states larger than this live in a file


class HiddenStates:
    """``[N, T, C]``, empty at first: on the device that computes, or in a file where it is large.

    Args:
        device: where what is read from it lies. spill: the file; None keeps it in memory.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        device: torch.device,
        spill: Path | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.windows, self.tokens, _ = shape
        self._device = device
        size = shape[0] * shape[1] * shape[2]
        if spill is None or size * dtype.itemsize <= SPILL_BYTES:
            self._states = torch.empty(shape, dtype=dtype, device=device)
        else:
            self._states = _in_file(spill, size, dtype).reshape(shape)

    def __getitem__(self, windows: slice | torch.Tensor) -> torch.Tensor:
        return self._states[windows].to(self._device)

    def put(self, windows: slice, states: torch.Tensor) -> None:
        self._states[windows] = states

    __setitem__ = put

    def batches(self) -> Iterator[slice]:
        """Slices of the windows of about ``BATCH_TOKENS`` tokens."""
        size = max(1, BATCH_TOKENS // self.tokens)
        for start in range(0, self.windows, size):
            yield slice(start, min(start + size, self.windows))


def _in_file(path: Path, size: int, dtype: torch.dtype) -> torch.Tensor:
    path.parent.mkdir(parents=True, exist_ok=True)
    reserve(path, size * dtype.itemsize)
    return torch.from_file(str(path), shared=True, size=size, dtype=dtype)
