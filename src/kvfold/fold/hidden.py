"""Hidden states of texts between two layers, wherever they find room."""

from collections.abc import Callable, Collection, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path

import torch

from kvfold.errors import RunError
from kvfold.files import reserve
from kvfold.quality.device import is_out_of_memory, let_go
from kvfold.quality.world import ALONE, World

# The texts: that of calibration, tokens that texts begin with, and what no step looks at.
TEXT, FIRST, HELD = 0, 1, 2
FITTED = (TEXT, FIRST)
BATCH_TOKENS = 4096  # tokens run through a layer at once, where there is memory for them
SPILL_BYTES = 2**30  # hidden states larger than this live in a file


@dataclass(frozen=True)
class Windows:
    """Some windows of one of the texts."""

    text: int
    which: slice | torch.Tensor


class Room:
    """How many tokens are run at once: fewer once so many did not fit into the device's memory."""

    def __init__(self, device: torch.device) -> None:
        self.tokens, self._device = BATCH_TOKENS, device

    def each(self, windows: int, tokens: int, do: Callable[[slice], None]) -> None:
        """``do`` some windows of so many tokens after the other, until all are done.

        What is out of memory is done again, by halves: ``do`` must change nothing before it can
        no longer fail.

        Raises:
            RunError: if there is none for one window.
        """
        start = 0
        while start < windows:
            end = min(start + max(1, self.tokens // tokens), windows)
            if self._does(do, slice(start, end), tokens):
                start = end
            else:  # behind the handler, which holds what the failed call had made
                self.tokens = (end - start + 1) // 2 * tokens
                let_go(self._device)

    def _does(self, do: Callable[[slice], None], which: slice, tokens: int) -> bool:
        """Whether there was memory for it."""
        try:
            do(which)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if which.stop == which.start + 1:
                raise RunError(
                    f"{self._device} is out of memory with one window of {tokens:,} tokens",
                    "give a smaller --context, or --device cpu",
                ) from error
            return False
        return True


def dealt(text: int, count: int, tokens: int, world: World) -> torch.Tensor:
    """Which of so many windows of a text are a process's: in turn, of the first text batches."""
    together = max(1, BATCH_TOKENS // tokens) if text == TEXT else 1
    batches = torch.arange(count, device="cpu").split(together)
    mine = list(batches[world.part()])
    return torch.cat(mine) if mine else torch.arange(0, device="cpu")


class HiddenStates:
    """``[N, T, C]`` for each text, empty at first: on the device that computes, or in a file.

    Of many processes each has some of the windows.

    Args:
        counts: the windows of each text, and their tokens T. size: C.
        device: where what is read lies. spill: the file of what is large; None keeps it in memory.
        room: shared by all that are run together; one of its own by default.

    Attributes:
        shapes: N and T of what is here. owned: which of all windows these are.
    """

    def __init__(
        self,
        counts: Sequence[tuple[int, int]],
        size: int,
        device: torch.device,
        spill: Path | None = None,
        dtype: torch.dtype = torch.float32,
        world: World = ALONE,
        room: Room | None = None,
    ) -> None:
        self.world, self._device = world, device
        self.room = Room(device) if room is None else room
        self.counts = [count for count, _ in counts]
        self.owned = [dealt(text, *each, world) for text, each in enumerate(counts)]
        shapes = [(len(own), tokens) for own, (_, tokens) in zip(self.owned, counts, strict=True)]
        self.shapes = tuple(shapes)
        sizes = [windows * tokens * size for windows, tokens in shapes]
        if spill is None or sum(sizes) * dtype.itemsize <= SPILL_BYTES:
            flat = torch.empty(sum(sizes), dtype=dtype, device=device)
        else:
            flat = _in_file(spill, sum(sizes), dtype)
        parts = zip(flat.split(sizes), shapes, strict=True)
        self._states = [part.reshape(*shape, size) for part, shape in parts]

    def copy(self) -> "HiddenStates":
        """The same states, in memory."""
        made = copy(self)
        made._states = [states.clone() for states in self._states]
        return made

    def __getitem__(self, windows: Windows) -> torch.Tensor:
        return self._states[windows.text][windows.which].to(self._device)

    def put(self, windows: Windows, states: torch.Tensor) -> None:
        self._states[windows.text][windows.which] = states

    __setitem__ = put

    def anywhere(self, windows: Windows) -> torch.Tensor:
        """Windows by their places among those of all processes, in all of them.

        Args:
            windows: the same in every process.
        """
        if self.world.size == 1:
            return self[windows]
        states = self._states[windows.text]
        places = torch.as_tensor(windows.which, device="cpu")
        found = torch.zeros(len(places), *states.shape[1:], dtype=states.dtype, device=self._device)
        here = self.here(windows)
        for at in (here >= 0).nonzero()[:, 0].tolist():
            found[at] = states[here[at]].to(self._device)
        self.world.add(found)
        return found

    def here(self, windows: Windows) -> torch.Tensor:
        """The same by their places here; -1 for those that are another process's."""
        places = torch.full((self.counts[windows.text],), -1, device="cpu")
        owned = self.owned[windows.text]
        places[owned] = torch.arange(len(owned), device="cpu")
        return places[windows.which]

    def batches(self, texts: Collection[int] = (TEXT, FIRST, HELD)) -> Iterator[Windows]:
        """All windows, text by text, in slices of about ``BATCH_TOKENS`` tokens."""
        for text, (windows, tokens) in enumerate(self.shapes):
            if text not in texts:
                continue
            size = max(1, self.room.tokens // tokens)
            for start in range(0, windows, size):
                yield Windows(text, slice(start, min(start + size, windows)))

    def each(
        self, do: Callable[[Windows], None], texts: Collection[int] = (TEXT, FIRST, HELD)
    ) -> None:
        """``do`` the same one after the other, or smaller ones; see :class:`Room`."""
        for text, (windows, tokens) in enumerate(self.shapes):
            if text in texts:
                self.room.each(
                    windows,
                    tokens,
                    lambda which, text=text: do(Windows(text, which)),  # type: ignore[misc]
                )


def median(world: World, parts: Sequence[torch.Tensor]) -> float:
    """Of what all processes have."""
    mine = torch.cat([*parts, torch.empty(0, device=parts[0].device if parts else None)])
    return float(torch.cat([each.cpu() for each in world.gather(mine.cpu())]).median())


def _in_file(path: Path, size: int, dtype: torch.dtype) -> torch.Tensor:
    path.parent.mkdir(parents=True, exist_ok=True)
    reserve(path, size * dtype.itemsize)
    return torch.from_file(str(path), shared=True, size=size, dtype=dtype)
