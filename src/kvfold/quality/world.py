"""The processes that ``torchrun`` started, or one alone."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from kvfold.errors import RunError
from kvfold.quality.device import pick_device
from kvfold.quality.launched import launched_size

_TIMEOUT = timedelta(hours=12)  # others wait while the first process does what one can do
_LOST = ("peer", "Connection reset", "Broken pipe", "Timed out")
T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process and its peers.

    Attributes:
        kind: how a model that is trained is shared: ``ddp``, ``fsdp``, or None.
    """

    rank: int
    size: int
    device: torch.device
    kind: str | None = None

    @property
    def first(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def sum(self, values: Sequence[float]) -> list[float]:
        """The sums over all processes."""
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return [float(value) for value in tensor]

    def add(self, *tensors: torch.Tensor) -> None:
        """Make each the sum over all processes, in place."""
        if self.size == 1:
            return
        for tensor in tensors:
            dist.all_reduce(torch.view_as_real(tensor) if tensor.is_complex() else tensor)

    def gather(self, value: T) -> list[T]:
        """What every process gives, in order; small things."""
        found: list[T | None] = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(found, value)
        return cast("list[T]", found)

    def tell(self, value: T) -> T:
        """What the first process gives, in all of them."""
        if self.size == 1:
            return value
        found: list[Any] = [value]
        dist.broadcast_object_list(found, device=self.device)
        told: T = found[0]
        return told

    def share(self, sequences: int) -> slice:
        """This process's part of a batch of ``sequences``."""
        share = sequences // self.size
        return slice(self.rank * share, (self.rank + 1) * share)

    def part(self) -> slice:
        """Every so-manieth of a list is this process's."""
        return slice(self.rank, None, self.size)


ALONE = World(0, 1, torch.device("cpu"))


@contextmanager
def joined(device: str | None) -> Iterator[World]:
    """Join the processes that ``torchrun`` started, each on a GPU of its own, or stay alone.

    Raises:
        InputError: for a device that cannot be used. RunError: if another process has ended.
    """
    size = launched_size()
    local = int(os.environ.get("LOCAL_RANK", "0"))
    cuda = size > 1 and torch.cuda.is_available() and device in (None, "cuda")
    where = pick_device(f"cuda:{local}" if cuda else device)
    if size == 1:
        yield World(0, 1, where)
        return
    if cuda:
        torch.cuda.set_device(where)
    dist.init_process_group("nccl" if cuda else "gloo", timeout=_TIMEOUT)
    try:
        yield World(dist.get_rank(), size, where)
    except RuntimeError as error:
        if isinstance(error, RunError) or not any(word in str(error) for word in _LOST):
            raise
        raise RunError("another process has ended, and this one with it", "see what it said") from (
            error
        )
    finally:
        dist.destroy_process_group()
