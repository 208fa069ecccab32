"""Which heads share: found from the weights, whatever coordinates each head speaks.

The cost of a group is the sum over its pairs of the energy lost when the two share one head
(values plus keys, each as a fraction of the layer's total). Raw cosine similarity would not
do: it is near zero before alignment, even between a head and its own scrambled copy.
"""

from dataclasses import dataclass
from functools import cache
from itertools import combinations

import torch

from kvfold.fold.heads import LayerHeads
from kvfold.fold.statistics import LayerStatistics
from kvfold.fold.subspace import centred, energy, matrix_roots, through

_TINY = torch.finfo(torch.float64).tiny
_EXACT_UP_TO = 12  # heads; dynamic programming over subsets beyond that takes too long


def consecutive_groups(count: int, num_groups: int) -> list[list[int]]:
    """The GQA paper's grouping: neighbours share.

    >>> consecutive_groups(4, 2)
    [[0, 1], [2, 3]]
    """
    size = count // num_groups
    return [list(range(start, start + size)) for start in range(0, count, size)]


def find_groups(losses: torch.Tensor, num_groups: int) -> list[list[int]]:
    """Split n heads into equal groups of least total pair loss.

    Args:
        losses: ``[n, n]``, symmetric, what it costs a pair to share.

    Returns:
        groups of ascending heads, ordered by their first head. Exact for up to 12 heads,
        greedy with exchanges above.

    >>> a, b = 0.0, 1.0
    >>> find_groups(torch.tensor([[a, b, a, b], [b, a, b, a], [a, b, a, b], [b, a, b, a]]), 2)
    [[0, 2], [1, 3]]
    """
    table = losses.tolist()
    count = len(table)
    size = count // num_groups
    if num_groups == 1 or size == 1:
        return consecutive_groups(count, num_groups)
    search = _exact if count <= _EXACT_UP_TO else _greedy
    return sorted(sorted(group) for group in search(table, size))


def _cost(table: list[list[float]], group: tuple[int, ...]) -> float:
    return sum(table[a][b] for a, b in combinations(group, 2))


def _exact(table: list[list[float]], size: int) -> list[tuple[int, ...]]:
    @cache
    def best(left: tuple[int, ...]) -> tuple[float, tuple[tuple[int, ...], ...]]:
        if not left:
            return 0.0, ()
        options = []
        for others in combinations(left[1:], size - 1):
            group = (left[0], *others)
            cost, rest = best(tuple(head for head in left if head not in group))
            options.append((cost + _cost(table, group), (group, *rest)))
        return min(options)

    return list(best(tuple(range(len(table))))[1])


def _greedy(table: list[list[float]], size: int) -> list[tuple[int, ...]]:
    """Grow groups from the closest pairs, then exchange heads while that helps."""
    left = set(range(len(table)))
    groups: list[list[int]] = []
    while left:
        pairs = [(table[a][b], a, b) for a, b in combinations(sorted(left), 2)]
        group = list(min(pairs)[1:])
        while len(group) < size:
            rest = sorted(left - set(group))
            group.append(min(rest, key=lambda head: sum(table[head][member] for member in group)))
        groups.append(group)
        left -= set(group)
    while _exchange(table, groups):
        pass
    return [tuple(group) for group in groups]


def _exchange(table: list[list[float]], groups: list[list[int]]) -> bool:
    """Make the best exchange of two heads between groups, if one lowers the cost."""
    best_gain, best_swap = 1e-12, None  # gains below rounding would go round in circles
    for first, second in combinations(groups, 2):
        for i, a in enumerate(first):
            for j, b in enumerate(second):
                before = sum(table[a][m] for m in first) + sum(table[b][m] for m in second)
                after = sum(table[b][m] for m in first if m != a)
                after += sum(table[a][m] for m in second if m != b)
                before -= table[a][a] + table[b][b]
                if before - after > best_gain:
                    best_gain, best_swap = before - after, (first, i, second, j)
    if best_swap is None:
        return False
    first, i, second, j = best_swap
    first[i], second[j] = second[j], first[i]
    return True


@dataclass(frozen=True)
class PairEnergy:
    """For every pair of heads, the energy lost when the two share one head.

    Attributes:
        lost: ``[n, n]``, symmetric, zero on the diagonal. own: ``[n]``, each head's energy.
    """

    lost: torch.Tensor
    own: torch.Tensor

    def fraction(self) -> torch.Tensor:
        """The loss as a fraction of the whole layer's energy."""
        return self.lost / self.own.sum().clamp_min(_TINY)

    def shareable(self) -> torch.Tensor:
        """The fraction of each pair's own energy that the pair keeps."""
        return 1 - self.lost / (self.own[:, None] + self.own[None, :]).clamp_min(_TINY)

    def __add__(self, other: "PairEnergy") -> "PairEnergy":
        return PairEnergy(self.lost + other.lost, self.own + other.own)


def pair_losses(heads: LayerHeads, statistics: LayerStatistics) -> torch.Tensor:
    """``[n, n]``: the fraction of the layer's value and key energy each pair would lose."""
    values = value_pair_energy(heads, statistics).fraction()
    return values + key_pair_energy(heads, statistics).fraction()


def value_pair_energy(heads: LayerHeads, statistics: LayerStatistics) -> PairEnergy:
    """Values, weighted by what the output projection reads of them."""
    metric = torch.einsum("hrcd,hrce->hde", heads.o, heads.o)
    return _subspace_energy(heads.v, metric, statistics.value_moment)


def key_pair_energy(heads: LayerHeads, statistics: LayerStatistics) -> PairEnergy:
    """Keys, weighted by what the queries ask: by frequency, and the rest as one subspace."""
    keys, moment = heads.k, statistics.moment
    if heads.norm:  # QK-norm removes each head's scale
        keys = keys / energy(keys, moment).sqrt().clamp_min(_TINY)[:, None, None]
    pairs, rest = heads.pairs.split(keys)
    q_pairs, q_rest = heads.pairs.split(heads.q)
    count = len(keys)
    result = PairEnergy(keys.new_zeros(count, count), keys.new_zeros(count))
    if pairs.shape[-2]:
        asked = (through(q_pairs, moment) * q_pairs.conj()).real.sum((1, 3))
        result += _frequency_energy(pairs, asked, moment)
    if rest.shape[-2]:
        metric = torch.einsum("hrdx,hrex->hde", through(q_rest, moment), q_rest)
        result += _subspace_energy(rest, metric, centred(moment))
    return result


def _subspace_energy(
    stacks: torch.Tensor, metric: torch.Tensor, moment: torch.Tensor
) -> PairEnergy:
    """Lost is what lies outside the best d shared directions of a pair: the smaller half of
    the eigenvalues of the pair's weighted Gram matrix."""
    root, _ = matrix_roots(metric)
    weighted = root @ stacks
    count, size, _ = weighted.shape
    flat = weighted.flatten(0, 1)
    gram = (through(flat, moment) @ flat.T).unflatten(0, (count, size)).unflatten(2, (count, size))
    lost = stacks.new_zeros(count, count)
    for a, b in combinations(range(count), 2):
        pair = gram[[a, b]][:, :, [a, b]].flatten(0, 1).flatten(1, 2)
        lost[a, b] = lost[b, a] = torch.linalg.eigvalsh(pair)[:size].clamp_min(0).sum()
    own = gram.diagonal(dim1=0, dim2=2).diagonal(dim1=0, dim2=1).sum(-1)
    return PairEnergy(lost, own)


def _frequency_energy(keys: torch.Tensor, asked: torch.Tensor, moment: torch.Tensor) -> PairEnergy:
    """Lost is the smaller eigenvalue of a pair's weighted 2 x 2 Gram matrix, over frequencies.

    Args:
        keys: ``[n, F, X]`` complex. asked: ``[n, F]``, the queries' energy.
    """
    weighted = (asked.sqrt()[..., None] * keys).transpose(0, 1)  # [F, n, X]
    gram = through(weighted, moment) @ weighted.mH
    own = gram.diagonal(dim1=1, dim2=2).real  # [F, n]
    a, b = own[:, :, None], own[:, None, :]
    smaller = (a + b - ((a - b).square() + 4 * gram.abs().square()).sqrt()) / 2
    return PairEnergy(smaller.clamp_min(0).sum(0).fill_diagonal_(0), own.sum(0))
