"""One process or many: PyTorch's own DDP and FSDP2 under ``torchrun``.

Every process packs the same batches and takes its own part of each, so the order of the text
does not depend on how many there are, and the loss is that of a single process but for rounding.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch

from kvfold.errors import InputError
from kvfold.healing.models import decoder_layers, family_of_model
from kvfold.quality.launched import launched_size
from kvfold.quality.world import World, joined


@contextmanager
def world(kind: str | None, device: str | None, sequences: int) -> Iterator[World]:
    """Join the processes that ``torchrun`` started, or stay alone.

    Raises:
        InputError: if a batch of ``sequences`` cannot be shared evenly.
    """
    size = launched_size()
    if size > 1 and sequences % size:
        raise InputError(
            f"a batch of {sequences} sequences cannot be shared by {size} processes",
            f"make --batch-tokens a multiple of {size} x --context",
        )
    with joined(device) as found:
        usual = "fsdp" if found.device.type == "cuda" else "ddp"
        yield found if size == 1 else replace(found, kind=kind or usual)


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
