"""What a checkpoint calls the tensors of transformers' module, in both directions. No torch.

Mostly the same. Old checkpoints lack the name of the base model; the experts of a mixture are
stored one by one, and the module holds all of them as one tensor.
"""

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

Shape = tuple[int, ...]
_HEAD = "lm_head."  # lies beside the base model, in every architecture
_EXPERT = "{expert}"


@dataclass(frozen=True)
class Renamed:
    """A tensor below a layer of the module whose checkpoints store it otherwise.

    Attributes:
        module: the module's name. parts: the checkpoint's: one, or, with ``{expert}`` for a
            number, those of every expert, which the module stacks; an expert's own parts lie
            side by side in equal shares of its rows.
    """

    module: str
    parts: tuple[str, ...]

    def stored(self, shape: Shape) -> dict[str, Shape]:
        """Names and shapes of the parts of a tensor of this shape (of experts: ``[E, …]``)."""
        if not self.of_experts:
            return {self.parts[0]: shape}
        experts, rows, *rest = shape
        return {
            part.replace(_EXPERT, str(expert)): (rows // len(self.parts), *rest)
            for expert in range(experts)
            for part in self.parts
        }

    @property
    def of_experts(self) -> bool:
        """Whether the module stacks what the checkpoint has for every expert."""
        return _EXPERT in self.parts[0]

    def by_expert(self, names: Collection[str]) -> Iterator[list[str]]:
        """The parts of each expert that are among ``names``, in order; of others, the part."""
        expert = 0
        while (own := [part.replace(_EXPERT, str(expert)) for part in self.parts])[0] in names:
            yield own
            expert += 1
            if not self.of_experts:
                return

    def pattern(self) -> re.Pattern[str]:
        """Matches the end of a name of one of the parts."""
        parts = "|".join(re.escape(p).replace(re.escape(_EXPERT), r"\d+") for p in self.parts)
        return re.compile(rf"(?<=\.)(?:{parts})$")


# Of most mixtures: with gates, as transformers stacks them.
EXPERTS = (
    Renamed(
        "mlp.experts.gate_up_proj",
        ("mlp.experts.{expert}.gate_proj.weight", "mlp.experts.{expert}.up_proj.weight"),
    ),
    Renamed("mlp.experts.down_proj", ("mlp.experts.{expert}.down_proj.weight",)),
)


@dataclass(frozen=True)
class StoredNames:
    """One checkpoint's names beside the module's.

    Attributes:
        base: the attribute of the module that holds everything but the output embedding.
        stored: the names of the checkpoint's tensors. renamed: of which some are called otherwise.
    """

    base: str
    stored: Collection[str] = field(repr=False)
    renamed: tuple[Renamed, ...] = ()
    has_base: bool = field(init=False)

    def __post_init__(self) -> None:
        has_base = any(name.startswith(f"{self.base}.") for name in self.stored)
        object.__setattr__(self, "has_base", has_base)

    def to_module(self, stored: str) -> str:
        """The module's name of a tensor of the checkpoint, or of what it is a part of."""
        for each in self.renamed:
            stored = each.pattern().sub(each.module, stored)
        if self.has_base or stored.startswith(_HEAD):
            return stored
        return f"{self.base}.{stored}"

    def to_stored(self, name: str) -> str:
        """What the checkpoint calls a tensor that it stores whole, or a path of the module."""
        return name if self.has_base else name.removeprefix(f"{self.base}.")

    def find(self, name: str) -> str | None:
        """What the checkpoint calls a tensor of the module, if it holds it whole."""
        stored = self.to_stored(name)
        return stored if stored in self.stored else None

    def parts(self, name: str, shape: Shape) -> dict[str, Shape]:
        """The tensors that make one of the module of a shape, and what they should have."""
        whole = self.to_stored(name)
        for each in self.renamed:
            if whole not in self.stored and name.endswith(f".{each.module}"):
                above = whole.removesuffix(each.module)
                return {above + part: own for part, own in each.stored(shape).items()}
        return {whole: shape}
