"""What a checkpoint calls the tensors of transformers' module, in both directions. No torch."""

from collections.abc import Collection
from dataclasses import dataclass, field

_HEAD = "lm_head."  # lies beside the base model, in every architecture


@dataclass(frozen=True)
class StoredNames:
    """One checkpoint's names beside the module's: old ones lack the name of the base model.

    Attributes:
        base: the attribute of the module that holds everything but the output embedding.
        stored: the names of the checkpoint's tensors.
    """

    base: str
    stored: Collection[str] = field(repr=False)
    has_base: bool = field(init=False)

    def __post_init__(self) -> None:
        has_base = any(name.startswith(f"{self.base}.") for name in self.stored)
        object.__setattr__(self, "has_base", has_base)

    def to_module(self, stored: str) -> str:
        """The module's name of a tensor of the checkpoint."""
        if self.has_base or stored.startswith(_HEAD):
            return stored
        return f"{self.base}.{stored}"

    def to_stored(self, name: str) -> str:
        """What the checkpoint calls a tensor, module or path of the module; its inverse."""
        return name if self.has_base else name.removeprefix(f"{self.base}.")

    def find(self, name: str) -> str | None:
        """What the checkpoint calls a tensor of the module, if it holds it."""
        stored = self.to_stored(name)
        return stored if stored in self.stored else None
