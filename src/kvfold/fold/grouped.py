"""Folding a layer to fewer KV heads: its heads are put into groups, and each group shares one."""

from functools import cached_property

import torch

from kvfold.arch.projections import AttentionWeights
from kvfold.arch.target import Grouped
from kvfold.fold.energy import Energy, fold_energy
from kvfold.fold.grouping import consecutive_groups, find_groups, pair_losses
from kvfold.fold.heads import HeadGroup, LayerHeads, SharedHead
from kvfold.fold.methods import Method
from kvfold.fold.statistics import LayerStatistics
from kvfold.fold.stored_layer import StoredLayer

Groups = list[list[int]]


class GroupedFold:
    """Folds one layer by any method; the methods see one group at a time.

    Args:
        layer: the source's. heads: its heads. statistics: what its inputs look like.
    """

    constant_error: float | None = None  # heads need no constant

    def __init__(
        self, layer: StoredLayer, heads: LayerHeads, target: Grouped, statistics: LayerStatistics
    ) -> None:
        self._heads, self._statistics = heads, statistics
        self._count = target.num_kv_heads

    def groups(self, method: Method) -> Groups:
        """The source's KV heads that share, in the order of the new heads."""
        return self._alike if method.regroups else self._neighbours

    @property
    def _neighbours(self) -> Groups:
        return consecutive_groups(self._heads.num_kv_heads, self._count)

    @cached_property
    def _alike(self) -> Groups:
        if self._count == 1:
            return self._neighbours
        return find_groups(pair_losses(self._heads, self._statistics), self._count)

    def by(self, method: Method, seed: int) -> tuple[AttentionWeights, Energy]:
        """The folded weights, float64, and what they keep.

        Groups of one head are not shown to the method: they keep their bits.
        """
        generator = torch.Generator().manual_seed(seed)
        folded, energy = [], Energy()
        for members in self.groups(method):
            group = self._heads.group(members, self._statistics)
            shared = method.fold(group, generator) if len(members) > 1 else _alone(group)
            folded.append(shared)
            energy += fold_energy(group, shared)
        return self._heads.weights(folded), energy


def _alone(group: HeadGroup) -> SharedHead:
    return SharedHead(group.q, group.k[0], group.v[0], group.o)
