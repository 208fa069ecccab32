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
        self._released = heads.released(statistics.moment)
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
        return find_groups(pair_losses(self._released, self._statistics), self._count)

    def by(self, method: Method, seed: int) -> tuple[AttentionWeights, Energy]:
        """The folded weights, float64, and what they keep.

        Groups of one head are not shown to the method: they keep their bits. Norms are left as they
        are by methods that know nothing of what they see.
        """
        generator = torch.Generator().manual_seed(seed)
        groups, folded, energy = self.groups(method), list[SharedHead](), Energy()
        heads = self._released if method.candidate else self._heads
        for members in groups:
            group = heads.group(members, self._statistics)
            shared = method.fold(group, generator) if len(members) > 1 else _alone(group)
            folded.append(shared)
            energy += fold_energy(group, shared)
        return heads.weights(folded, groups, self._statistics.moment), energy


def _alone(group: HeadGroup) -> SharedHead:
    return SharedHead(group.q, group.k[0], group.v[0], group.o)
