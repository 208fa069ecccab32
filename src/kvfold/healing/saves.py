"""Training checkpoints: written whole or not at all, the last few kept.

The tensors go through ``torch.distributed.checkpoint``, one process or many (see ``manifest`` for
how they are read); what JSON can hold (step, place in the text, history of the loss) lies beside
them in ``state.json``. A resumed run makes the optimizer's settings anew, so they are not kept.
"""

import re
import shutil
import warnings
from pathlib import Path
from typing import Annotated, Any

import torch
from annotated_types import Ge, Le, MaxLen
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as load_distributed
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed
from typing_extensions import TypedDict

from kvfold.documents import MEGABYTE, Document, open_ended
from kvfold.errors import CheckpointError, InputError, RunError
from kvfold.files import WriteError, of_full_disk, write_json
from kvfold.healing.manifest import HINT, Reader, read_index
from kvfold.quality.world import World

_STATE, _UNFINISHED = "state.json", ".tmp"
_Number = Annotated[int, Ge(0), Le(1 << 40)]


class _StreamState(TypedDict):
    epoch: _Number
    document: _Number
    left: list[_Number]


class _TextState(TypedDict):
    sequence: _Number
    streams: list[_StreamState]


@open_ended
class _State(TypedDict):
    step: Annotated[int, Ge(1), Le(99_999_999)]
    processes: Annotated[int, Ge(1), Le(1 << 20)]
    stream: _TextState
    row: dict[str, int | float]
    history: Annotated[list[float], MaxLen(1024)]


# A document that was begun may be left over, token by token.
_STATE_FILE = Document(_State, HINT, largest=1024 * MEGABYTE)
_NAME = re.compile(r"step-(\d{8})")
_TRAINED_ONLY = StateDictOptions(ignore_frozen_params=True, strict=False)


def save(
    folder: Path,
    model: Any,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    world: World,
    keep: int,
) -> Path:
    """Write ``folder/step-N`` with all processes, then forget all but the last ``keep``.

    Args:
        state: must hold ``step``.
    """
    target = folder / f"step-{state['step']:08d}"
    temporary = folder / f"{target.name}{_UNFINISHED}"
    if world.first:
        for left in folder.glob(f"*{_UNFINISHED}"):
            shutil.rmtree(left)
        if target.exists():
            _forget(target)
        temporary.mkdir(parents=True)
    world.barrier()
    try:
        with warnings.catch_warnings():  # that a process alone saves alone
            warnings.simplefilter("ignore", UserWarning)
            save_distributed(_stored(_tensors(model, optimizer)), checkpoint_id=str(temporary))
    except CheckpointException as error:  # no Exception, and of many lines
        raise _in_words(temporary, error) from error
    world.barrier()
    if world.first:
        write_json(temporary / _STATE, {**state, "processes": world.size})
        temporary.rename(target)
        for old in saved(folder)[:-keep]:
            _forget(old)
    world.barrier()
    return target


def _in_words(path: Path, error: CheckpointException) -> RunError:
    """What PyTorch's exception, which is no ``Exception``, says of the processes that failed."""
    reasons = [reason for reason, _ in error.failures.values()]
    for reason in reasons:
        full = of_full_disk(reason)
        if full is not None:
            return WriteError(path, full)
    first = str(reasons[0]).splitlines()[0] if reasons and str(reasons[0]) else "unknown"
    return RunError(
        f"the checkpoint {path} cannot be written: {first[:160]}",
        "is the disk full? With --resume the same command goes on from the one before",
    )


def _forget(path: Path) -> None:
    """Remove a checkpoint: at no moment is it half there under its name."""
    shutil.rmtree(path.rename(path.with_name(path.name + _UNFINISHED)))


def saved(folder: Path) -> list[Path]:
    """The whole checkpoints in ``folder``, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name))


def load(path: Path, model: Any, optimizer: torch.optim.Optimizer, world: World) -> dict[str, Any]:
    """Put model and optimizer back to where ``path`` was saved; return its state.

    Raises:
        InputError: if it was saved by another number of processes. CheckpointError: if it is
        damaged.
    """
    state = read_state(path)
    if state["processes"] != world.size:
        raise InputError(
            f"{path} was saved by {state['processes']} processes; there are {world.size} now",
            f"resume with torchrun --nproc-per-node {state['processes']} (or as many in all)",
        )
    read_index(path)  # its reasons are clearer than those that come out of PyTorch
    tensors = _tensors(model, optimizer)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            load_distributed(_stored(tensors), storage_reader=Reader(path))
    except (CheckpointException, OSError, RuntimeError) as error:
        raise CheckpointError(f"{path} cannot be read", HINT) from error
    set_state_dict(
        model,
        optimizer,
        model_state_dict=tensors["model"],
        optim_state_dict=tensors["optimizer"],
        options=_TRAINED_ONLY,
    )
    return state


def read_state(path: Path) -> dict[str, Any]:
    """The JSON part of a checkpoint."""
    return dict(_STATE_FILE.read(path / _STATE))


def _stored(tensors: dict[str, Any]) -> dict[str, Any]:
    """What goes to disk of the training state: tensors alone, which can be read safely."""
    return {"model": tensors["model"], "optimizer": tensors["optimizer"]["state"]}


def _tensors(model: Any, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    weights, moments = get_state_dict(model, optimizer, options=_TRAINED_ONLY)
    return {"model": weights, "optimizer": moments}


def trained_tensors(model: Any) -> dict[str, torch.Tensor]:
    """What was trained, whole and on the CPU (in the first process; empty in others)."""
    options = StateDictOptions(
        full_state_dict=True, cpu_offload=True, ignore_frozen_params=True, strict=False
    )
    state: dict[str, Any] = get_model_state_dict(model, options=options)
    return state
