"""What becomes of a source's other tensors in the folded model. No torch."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from kvfold.arch.family import Family
from kvfold.arch.sizes import Config

if TYPE_CHECKING:
    import torch


def _as_it_is(tensor: "torch.Tensor") -> "torch.Tensor":
    return tensor


@dataclass(frozen=True)
class Carried:
    """A tensor of the folded model, made of one of the source's.

    Attributes:
        make: makes it of that one.
    """

    name: str
    shape: tuple[int, ...]
    make: "Callable[[torch.Tensor], torch.Tensor]" = _as_it_is


class Carrier(Protocol):
    """Whatever says what becomes of tensors: a target, or nothing that changes any."""

    def carried(
        self, family: Family, config: Config, name: str, shape: tuple[int, ...]
    ) -> tuple[Carried, ...]:
        """What is made of a tensor of that name and shape; nothing where it has no place."""


class Unchanged:
    """Everything stays."""

    def carried(
        self, family: Family, config: Config, name: str, shape: tuple[int, ...]
    ) -> tuple[Carried, ...]:
        """The tensor itself."""
        return (Carried(name, shape),)


def rewritten(family: Family, name: str, shape: tuple[int, ...]) -> tuple[Carried, ...]:
    """As the family's folded models have it."""
    if family.dropped(name):
        return ()
    rewrite = family.rewrite
    if rewrite is None:
        return (Carried(name, shape),)
    return (Carried(name, family.rewritten_shape(name, shape), lambda t: rewrite(name, t)),)


def carry(
    carrier: Carrier, family: Family, config: Config, tensors: "Mapping[str, torch.Tensor]"
) -> "dict[str, torch.Tensor]":
    """All that is made of some tensors."""
    return {
        made.name: made.make(tensor)
        for name, tensor in tensors.items()
        for made in carrier.carried(family, config, name, tuple(tensor.shape))
    }
