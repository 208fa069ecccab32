"""Folding one layer: cut it into heads, find the groups, run the method, put it together."""

from dataclasses import asdict, dataclass
from typing import Any

import torch

from kvfold.arch.projections import AttentionWeights
from kvfold.checkpoint.source import Checkpoint
from kvfold.fold.energy import Energy, fold_energy
from kvfold.fold.grouping import find_groups, pair_losses
from kvfold.fold.heads import LayerHeads, Pairs, SharedHead, consecutive_groups, norm_weights
from kvfold.fold.methods import AUTO, Method, all_methods
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


def layer_pairs(checkpoint: Checkpoint, layer: int) -> Pairs:
    """Which dimensions of this layer's heads rotate together."""
    rotary = checkpoint.family.rotary
    dim = rotary.dim(checkpoint.config, checkpoint.geometry.head_dim, layer)
    return Pairs(dim, rotary.interleaved)


def load_heads(checkpoint: Checkpoint, layer: int) -> LayerHeads:
    """One layer's heads in float64."""
    prefix = checkpoint.attention_prefix(layer)
    norm = norm_weights(checkpoint.family.qk_norm, prefix, checkpoint.tensor)
    return LayerHeads.of(checkpoint.attention(layer), layer_pairs(checkpoint, layer), norm)


def fold_layer(
    checkpoint: Checkpoint,
    layer: int,
    num_kv_heads: int,
    method: str,
    statistics: LayerStatistics,
    seed: int = 0,
) -> tuple[AttentionWeights, LayerReport]:
    """Fold one layer's attention to ``num_kv_heads``; float64 weights.

    The methods see no group of one head: such heads keep their bits.
    """
    heads = load_heads(checkpoint, layer)
    methods = all_methods()
    names = [name for name, m in methods.items() if m.candidate] if method == AUTO else [method]
    neighbours = consecutive_groups(checkpoint.geometry, num_kv_heads)
    alike = neighbours
    if num_kv_heads > 1 and any(methods[name].regroups for name in names):
        alike = find_groups(pair_losses(heads, statistics), num_kv_heads)

    def candidate(name: str) -> tuple[Energy, str, list[list[int]], list[SharedHead]]:
        groups = alike if methods[name].regroups else neighbours
        folded, energy = _run(methods[name], heads, groups, statistics, seed + layer)
        return energy, name, groups, folded

    candidates = (candidate(name) for name in names)
    energy, name, groups, folded = max(candidates, key=lambda found: found[0].captured)
    report = LayerReport(layer, name, groups, energy.captured_value, energy.captured_key)
    return heads.weights(folded), report


def _run(
    method: Method,
    heads: LayerHeads,
    groups: list[list[int]],
    statistics: LayerStatistics,
    seed: int,
) -> tuple[list[SharedHead], Energy]:
    generator = torch.Generator().manual_seed(seed)
    folded, energy = [], Energy()
    for members in groups:
        group = heads.group(members, statistics)
        if len(members) == 1:
            shared = SharedHead(group.q, group.k[0], group.v[0], group.o)
        else:
            shared = method.fold(group, generator)
        folded.append(shared)
        energy += fold_energy(group, shared)
    return folded, energy
