"""Folding one layer: its heads, the methods that can make the target, the best of them."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch

from kvfold.arch.carried import Carrier, carry
from kvfold.arch.target import Grouped, Latent, Target
from kvfold.checkpoint.records import HeldOut
from kvfold.checkpoint.tensors import torch_dtype
from kvfold.fold.energy import Energy
from kvfold.fold.grouped import GroupedFold
from kvfold.fold.heads import LayerHeads
from kvfold.fold.latent import LatentFold
from kvfold.fold.methods import Method, methods_for
from kvfold.fold.request import DEFAULT_STEPS
from kvfold.fold.statistics import LayerStatistics
from kvfold.fold.stored_layer import StoredLayer, Tensors


@dataclass(frozen=True)
class FoldPlan:
    """What to fold to, and how.

    Attributes:
        fit: ``none``, ``refit`` or ``local``; more than ``none`` needs calibration windows.
        measured: whether closed forms, too, are run on what is held out.
        label: what progress calls it. steps: of ``local``, in each layer.
    """

    target: Target
    method: str
    fit: str
    seed: int
    measured: bool = False
    label: str = "folding layers"
    steps: int = DEFAULT_STEPS


@dataclass(frozen=True)
class LayerReport:
    """What folding did to one layer.

    Attributes:
        method: the method used (``auto`` names the one it chose). groups: source KV heads that
            now share, in the order of the new heads. captured_value, captured_key: see
            ``fold.energy``. constant_error: of a latent without biases, how far from the same in
            all tokens what stands for its constant is (``fold.constant``): so wrong is its norm.
    """

    layer: int
    method: str
    groups: list[list[int]]
    captured_value: float
    captured_key: float
    constant_error: float | None = None

    def as_dict(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass
class FoldedLayer:
    """The tensors of one layer that differ from the source's, under the folded model's names.

    Attributes:
        report: what folding did; None for a layer that was folded in another run.
        stages: what each stage of fitting gained.
        drift: how far the hidden states after it are from the source's, |x - x_source| /
            |x_source|, median over tokens; None where the folded model was not run.
        held_out: of the last layer, how the whole model does on text that was held out.
    """

    index: int
    tensors: Tensors
    report: LayerReport | None
    stages: list[dict[str, Any]] = field(default_factory=list)
    drift: float | None = None
    held_out: HeldOut | None = None

    def as_dict(self) -> dict[str, Any]:
        """What was done to it, for the record."""
        report = {"layer": self.index} if self.report is None else self.report.as_dict()
        return {**report, "stages": self.stages, "drift": self.drift}

    def completed(self, base: StoredLayer, carrier: Carrier) -> Tensors:
        """All tensors, named below the layer; what did not change is carried from ``base``."""
        checkpoint = base.checkpoint
        replaced = checkpoint.attention_shapes(self.index)
        others = {
            name: base.tensor(name)
            for name in checkpoint.layer_names(self.index)
            if name not in replaced and name not in self.tensors
        }
        tensors = carry(carrier, checkpoint.family, checkpoint.config, others) | self.tensors
        return {name.removeprefix(base.prefix): tensor for name, tensor in tensors.items()}


class LayerFold(Protocol):
    """Folds one layer to a target by any method that can make it."""

    @property
    def constant_error(self) -> float | None:
        """See :class:`LayerReport`; None where nothing needs a constant."""

    def groups(self, method: Method) -> list[list[int]]: ...

    def by(self, method: Method, seed: int) -> tuple[Any, Energy]:
        """Weights that the target's projections write, and what they keep."""


# How a layer is folded to each kind of target: given the layer, its heads, the target, and what
# the layer's inputs look like.
LAYER_FOLDS: dict[type, Callable[[StoredLayer, LayerHeads, Any, LayerStatistics], LayerFold]] = {
    Grouped: GroupedFold,
    Latent: LatentFold,
}


def fold_layer(
    source: StoredLayer, plan: FoldPlan, statistics: LayerStatistics | None = None
) -> FoldedLayer:
    """Fold one layer's attention by the plan's method, or by ``auto``'s best.

    Args:
        statistics: None folds by the weights alone.
    """
    if statistics is None:
        statistics = LayerStatistics.without_data(source.checkpoint.geometry.hidden_size)
    heads = source.heads(statistics.moment.device)
    fold = LAYER_FOLDS[type(plan.target)](source, heads, plan.target, statistics)
    methods = methods_for(plan.method, plan.target, plan.fit)
    candidates = ((method, *fold.by(method, plan.seed + source.index)) for method in methods)
    best, weights, energy = max(candidates, key=lambda candidate: candidate[2].captured)
    report = LayerReport(
        source.index, best.name, fold.groups(best), energy.captured_value, energy.captured_key,
        fold.constant_error,
    )  # fmt: skip
    tensors = _stored(source, plan.target, weights) | _sinks(source, report.groups)
    tensors |= _norms(source, weights)
    return FoldedLayer(source.index, tensors, report)


def _sinks(source: StoredLayer, groups: list[list[int]]) -> Tensors:
    """Those of query heads, which move with their KV heads; none of most families."""
    checkpoint = source.checkpoint
    if not checkpoint.family.sinks:
        return {}
    name = f"{checkpoint.attention_prefix(source.index)}.{checkpoint.family.sinks}"
    by_head = source.tensor(name).unflatten(0, (checkpoint.geometry.num_kv_heads, -1))
    return {name: by_head[[head for group in groups for head in group]].flatten()}


def _norms(source: StoredLayer, weights: Any) -> Tensors:
    """Those of queries and keys, head by head, where folding has changed them."""
    checkpoint = source.checkpoint
    spec = checkpoint.family.normalises(checkpoint.config)
    if spec is None or getattr(weights, "q_norm", None) is None:
        return {}
    found = {}
    for name, norm in ((spec.q, weights.q_norm), (spec.k, weights.k_norm)):
        path = f"{checkpoint.attention_prefix(source.index)}.{name}"
        found[path] = as_stored(norm - spec.offset, source.tensor(path).dtype)
    return found


def _stored(source: StoredLayer, target: Target, weights: Any) -> Tensors:
    """Folded projections as the folded checkpoint stores them, in the source's dtype."""
    checkpoint = source.checkpoint
    projections = target.projections(checkpoint.family)
    tensors = projections.write(checkpoint.attention_prefix(source.index), weights)
    dtype = torch_dtype(checkpoint.attention_dtype(source.index))
    return {name: as_stored(tensor, dtype) for name, tensor in tensors.items()}


def as_stored(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What is kept of a tensor that was computed, on whatever device."""
    return tensor.detach().to("cpu", dtype).contiguous()
