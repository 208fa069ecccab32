"""Which tensor of the trained model goes where in the healed checkpoint; none is left behind."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from kvfold.checkpoint.pretrained import skeleton
from kvfold.checkpoint.source import Checkpoint
from kvfold.checkpoint.stacked import part_of
from kvfold.checkpoint.tensors import torch_dtype
from kvfold.errors import RunError

_LORA = re.compile(r"base_model\.model\.(.+)\.lora_[AB]\.[^.]+\.weight")
_ROTARY_TABLE = "rotary_emb.inv_freq"  # lies in older files; models compute it today
_BUG = "this is a bug of kvfold: please report it with the checkpoint's name"


def check_places(folded: Checkpoint) -> None:
    """Whether every tensor of a checkpoint has a place in its model, before that is trained.

    Raises:
        RunError: naming one that has none.
    """
    own_parts(folded, skeleton(folded))


def take_trained(model: Any, trained: Mapping[str, torch.Tensor]) -> None:
    """Put trained tensors into a model of the same make, all of them.

    Raises:
        RunError: for a tensor that the model has no place for, or one that it should have got.
    """
    found = model.load_state_dict(dict(trained), strict=False)
    lost = set(found.unexpected_keys)
    if trained:
        learners = {name for name, p in model.named_parameters() if p.requires_grad}
        lost |= learners - trained.keys()
    if lost:
        raise RunError(f"the trained tensor {min(lost)} would be lost", _BUG)


def healed_tensors(
    folded: Checkpoint, model: Any, trained: Iterable[str]
) -> Callable[[str], torch.Tensor]:
    """Reads the model's tensors under the folded checkpoint's names, in its dtypes.

    Args:
        model: as transformers builds it, without LoRA. trained: names of what was trained, which
            may be those of LoRA.

    Raises:
        RunError: if a tensor of the checkpoint is not in the model, though it should be, or if no
            tensor of the checkpoint takes up one that was trained.
    """
    own = own_parts(folded, model)
    state = model.state_dict(keep_vars=True)
    written = {id(state[part.name]) for part in own.values()}  # tied tensors are one
    for name in sorted(map(_plain, trained)):
        if name not in state or id(state[name]) not in written:
            raise RunError(f"no tensor of {folded.label} takes up the trained {name}", _BUG)

    def read(name: str) -> torch.Tensor:
        if name not in own:  # a table that the model computes by itself
            return folded.tensor(name)
        part = own[name]
        found = part_of(state[part.name].detach(), part.number, part.count)
        tensor: torch.Tensor = found.to(torch_dtype(folded.store.dtype(name))).contiguous()
        if not torch.isfinite(tensor).all():
            raise RunError(f"healing left {name} with values that are not finite", "lower --lr")
        return tensor

    return read


@dataclass(frozen=True)
class Part:
    """Where a model has a tensor of its checkpoint: as its tensor ``name``, or as a part of it.

    Attributes:
        number, count: which part it is, of how many: experts are stacked.
    """

    name: str
    number: int = 0
    count: int = 1


def own_parts(folded: Checkpoint, model: Any) -> dict[str, Part]:
    """Where the model has each tensor of its checkpoint, but for tables that it computes."""
    own: dict[str, Part] = {}
    for name, tensor in model.state_dict().items():
        parts = folded.stored_names.parts(name, tuple(tensor.shape))
        if parts.keys() <= folded.names:
            own |= {part: Part(name, number, len(parts)) for number, part in enumerate(parts)}
    for name in sorted(folded.names - own.keys()):
        if not (name.endswith(_ROTARY_TABLE) or folded.family.dropped(name)):
            raise RunError(
                f"{folded.label} holds {name}, for which its model has no place: it cannot heal",
                "remove that tensor: load the model in transformers and save_pretrained() it",
            )
    return own


def _plain(name: str) -> str:
    """The tensor that a part of LoRA is merged into; any other is itself."""
    part = _LORA.fullmatch(name)
    return f"{part[1]}.weight" if part else name
