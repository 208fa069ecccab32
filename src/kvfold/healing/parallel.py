"""One process or many: PyTorch's own DDP and FSDP2 under ``torchrun``.

Every process packs the same batches and takes its own part of each, so the order of the text
does not depend on how many there are, and the loss is that of a single process but for rounding.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from kvfold.errors import InputError
from kvfold.healing.models import decoder_layers, family_of_model
from kvfold.quality.device import pick_device

_TIMEOUT = timedelta(hours=12)  # others wait while the first process heals layers or evaluates


@dataclass(frozen=True)
class World:
    """This process and its peers.

    Attributes:
        kind: ``ddp``, ``fsdp``, or None for a process alone.
    """

    rank: int
    size: int
    device: torch.device
    kind: str | None

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

    def share(self, sequences: int) -> slice:
        """This process's part of a batch of ``sequences``."""
        share = sequences // self.size
        return slice(self.rank * share, (self.rank + 1) * share)


def launched_rank() -> int:
    """The rank that ``torchrun`` gave this process; 0 without it."""
    return int(os.environ.get("RANK", "0"))


@contextmanager
def world(kind: str | None, device: str | None, sequences: int) -> Iterator[World]:
    """Join the processes that ``torchrun`` started, or stay alone.

    Raises:
        InputError: if a batch of ``sequences`` cannot be shared evenly.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    cuda = torch.cuda.is_available() and device in (None, "cuda")
    where = pick_device(f"cuda:{local}" if cuda else device or "cpu")
    if size == 1:
        yield World(0, 1, where, None)
        return
    if sequences % size:
        raise InputError(
            f"a batch of {sequences} sequences cannot be shared by {size} processes",
            f"make --batch-tokens a multiple of {size} x --context",
        )
    if cuda:
        torch.cuda.set_device(where)
    dist.init_process_group("nccl" if cuda else "gloo", timeout=_TIMEOUT)
    try:
        yield World(dist.get_rank(), size, where, kind or ("fsdp" if cuda else "ddp"))
    finally:
        dist.destroy_process_group()


def distribute(model: Any, world: World, dtype: torch.dtype, trained: bool) -> Any:
    """Place a model on this process's device, sharded or replicated as asked."""
    if world.kind == "fsdp" and world.size > 1:
        return _shard(model, world, dtype)
    model = model.to(world.device)
    if world.kind == "ddp" and world.size > 1 and trained:
        ids = [world.device.index] if world.device.type == "cuda" else None
        return torch.nn.parallel.DistributedDataParallel(model, device_ids=ids)
    return model


def _shard(model: Any, world: World, dtype: torch.dtype) -> Any:
    """FSDP2: every decoder layer is a unit; what is left belongs to the model itself."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(world.device.type, (world.size,))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for layer in decoder_layers(model, family_of_model(model)):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy)


def gradients_later(model: Any, later: bool) -> AbstractContextManager[Any]:
    """While micro-batches accumulate, gradients are exchanged with the last one only."""
    if hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(not later)
        return nullcontext()
    if later and hasattr(model, "no_sync"):
        result: AbstractContextManager[Any] = model.no_sync()
        return result
    return nullcontext()


def gather_again(model: Any) -> None:
    """Have a sharded model forget whole weights: their shards were changed between two passes."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
