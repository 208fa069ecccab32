"""Experts: checkpoints have them one by one, transformers' modules stack them.

See ``arch.parameters.Renamed`` for what is where.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from kvfold.arch.parameters import Renamed

if TYPE_CHECKING:
    import torch


def stacked(
    tensors: "Mapping[str, torch.Tensor]", renamed: Sequence[Renamed]
) -> "dict[str, torch.Tensor]":
    """A layer's tensors under the module's names, experts stacked; others are themselves.

    Args:
        tensors: by their names below the layer, in the checkpoint or in the module.
    """
    import torch

    found = dict(tensors)
    for each in renamed:
        experts = []
        for names in each.by_expert(found):
            experts.append(torch.cat([found.pop(name) for name in names]))
        if experts:
            found[each.module] = torch.stack(experts) if each.of_experts else experts[0]
    return found


def part_of(tensor: "torch.Tensor", number: int, count: int) -> "torch.Tensor":
    """The ``number``-th of the ``count`` parts of a tensor of the module, in the order of
    ``StoredNames.parts``: it may hold experts ``[E, …]``, each its parts side by side."""
    if count == 1:
        return tensor
    flat = tensor.flatten(0, 1)
    rows = len(flat) // count
    return flat[number * rows : (number + 1) * rows]
