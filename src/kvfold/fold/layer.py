"""Folding one layer: its heads, the methods that can make the target, the best of them."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from kvfold.arch.projections import AttentionWeights
from kvfold.arch.target import Grouped, Target
from kvfold.checkpoint.source import Checkpoint
from kvfold.fold.energy import Energy
from kvfold.fold.grouped import GroupedFold
from kvfold.fold.heads import LayerHeads, norm_weights
from kvfold.fold.methods import Method, methods_for
from kvfold.fold.pairs import Pairs
from kvfold.fold.statistics import LayerStatistics


@dataclass(frozen=True)
class LayerReport:
    """What folding did to one layer.

    Attributes:
        method: the method used (``auto`` names the one it chose). groups: source KV heads that
            now share, in the order of the new heads. captured_value, captured_key: see
            ``fold.energy``.
    """

    layer: int
    method: str
    groups: list[list[int]]
    captured_value: float
    captured_key: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class LayerFold(Protocol):
    """Folds one layer to a target by any method that can make it."""

    def groups(self, method: Method) -> list[list[int]]: ...

    def by(self, method: Method, seed: int) -> tuple[AttentionWeights, Energy]: ...


# How a layer is folded to each kind of target.
LAYER_FOLDS: dict[type, Callable[[LayerHeads, Any, LayerStatistics], LayerFold]] = {
    Grouped: GroupedFold
}


def layer_pairs(checkpoint: Checkpoint, index: int) -> Pairs:
    """Which dimensions of this layer's heads rotate together."""
    rotary = checkpoint.family.rotary
    dim = rotary.dim(checkpoint.config, checkpoint.geometry.head_dim, index)
    return Pairs(dim, rotary.interleaved)


def load_heads(checkpoint: Checkpoint, index: int) -> LayerHeads:
    """One layer's heads in float64."""
    prefix = checkpoint.attention_prefix(index)
    norm = norm_weights(checkpoint.family.qk_norm, prefix, checkpoint.tensor)
    return LayerHeads.of(checkpoint.attention(index), layer_pairs(checkpoint, index), norm)


def fold_layer(
    checkpoint: Checkpoint,
    index: int,
    target: Target,
    method: str,
    statistics: LayerStatistics,
    seed: int = 0,
) -> tuple[AttentionWeights, LayerReport]:
    """Fold one layer's attention by a method, or by ``auto``'s best; float64 weights."""
    fold = LAYER_FOLDS[type(target)](load_heads(checkpoint, index), target, statistics)
    candidates = ((each, *fold.by(each, seed + index)) for each in methods_for(method, target))
    best, weights, energy = max(candidates, key=lambda candidate: candidate[2].captured)
    report = LayerReport(
        index, best.name, fold.groups(best), energy.captured_value, energy.captured_key
    )
    return weights, report
