"""Hidden states of texts between two layers, wherever they find room."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from kvfold.files import reserve

# The texts: that of calibration, tokens that texts begin with, and what no step looks at.
TEXT, FIRST, HELD = 0, 1, 2
FITTED = (TEXT, FIRST)
BATCH_TOKENS = 4096  # tokens run through a layer at once
SPILL_BYTES = 2**30  # hidden states larger than this live in a file


@dataclass(frozen=True)
class Windows:
    """Some windows of one of the texts."""

    text: int
    which: slice | torch.Tensor


class HiddenStates:
    """``[N, T, C]`` for each text, empty at first: on the device that computes, or in a file.

    Args:
        shapes: N and T of each text. size: C.
        device: where what is read lies. spill: the file of what is large; None keeps it in memory.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, int]],
        size: int,
        device: torch.device,
        spill: Path | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.shapes, self._device = tuple(shapes), device
        counts = [windows * tokens * size for windows, tokens in shapes]
        if spill is None or sum(counts) * dtype.itemsize <= SPILL_BYTES:
            flat = torch.empty(sum(counts), dtype=dtype, device=device)
        else:
            flat = _in_file(spill, sum(counts), dtype)
        parts = zip(flat.split(counts), shapes, strict=True)
        self._states = [part.reshape(*shape, size) for part, shape in parts]

    def __getitem__(self, windows: Windows) -> torch.Tensor:
        return self._states[windows.text][windows.which].to(self._device)

    def put(self, windows: Windows, states: torch.Tensor) -> None:
        self._states[windows.text][windows.which] = states

    __setitem__ = put

    def batches(self, texts: Collection[int] = (TEXT, FIRST, HELD)) -> Iterator[Windows]:
        """All windows, text by text, in slices of about ``BATCH_TOKENS`` tokens."""
        for text, (windows, tokens) in enumerate(self.shapes):
            if text not in texts:
                continue
            size = max(1, BATCH_TOKENS // tokens)
            for start in range(0, windows, size):
                yield Windows(text, slice(start, min(start + size, windows)))


def _in_file(path: Path, size: int, dtype: torch.dtype) -> torch.Tensor:
    path.parent.mkdir(parents=True, exist_ok=True)
    reserve(path, size * dtype.itemsize)
    return torch.from_file(str(path), shared=True, size=size, dtype=dtype)
