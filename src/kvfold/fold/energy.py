"""How much of a layer a fold keeps, whatever method made it.

Captured energy is 1 - (squared error) / (squared size), of each query head's output
O V x and of its scores, with queries and keys taken at independent positions (so that rotary
frequencies do not mix), or of a sample of the layer's inputs, within attention. 1 is exact; a value
below 0 is worse than removing the head.
"""

from dataclasses import dataclass

import torch

from kvfold.fold.heads import HeadGroup, SharedHead
from kvfold.fold.sample import Projected
from kvfold.fold.subspace import centred, energy, through

_TINY = torch.finfo(torch.float64).tiny


@dataclass(frozen=True)
class Energy:
    """Sums over a group or a layer: sizes and squared errors of values and keys."""

    value: float = 0.0
    value_error: float = 0.0
    key: float = 0.0
    key_error: float = 0.0

    def __add__(self, other: "Energy") -> "Energy":
        return Energy(
            self.value + other.value,
            self.value_error + other.value_error,
            self.key + other.key,
            self.key_error + other.key_error,
        )

    @property
    def captured_value(self) -> float:
        return 1 - self.value_error / self.value if self.value else 1.0

    @property
    def captured_key(self) -> float:
        return 1 - self.key_error / self.key if self.key else 1.0

    @property
    def captured(self) -> float:
        """The mean of both, the score by which ``auto`` and the grouping choose."""
        return (self.captured_value + self.captured_key) / 2


def fold_energy(group: HeadGroup, shared: SharedHead) -> Energy:
    """Compare a folded group with its source."""
    value, value_error = output_errors(
        group.value_moment, (group.v, shared.v.expand_as(group.v)), (group.o, shared.o)
    )
    key, key_error = _scores(group, shared)
    return Energy(value, value_error, key, key_error)


def output_errors(moment: torch.Tensor, values: "Both", outputs: "Both") -> tuple[float, float]:
    """sum_r E||O V x||^2 and its error, from D x D products only.

    Args:
        values: ``[g, Dv, X]``; outputs: ``[g, R, C, Dv]``.
    """
    (v_old, v_new), (o_old, o_new) = values, outputs
    own = torch.einsum("hdx,hex->hde", through(v_old, moment), v_old)
    cross = torch.einsum("hdx,hex->hde", through(v_old, moment), v_new)
    new = torch.einsum("hdx,hex->hde", through(v_new, moment), v_new)
    oo = torch.einsum("hrcd,hrce->hde", o_old, o_old)
    on = torch.einsum("hrcd,hrce->hde", o_old, o_new)
    nn = torch.einsum("hrcd,hrce->hde", o_new, o_new)
    size = (oo * own).sum()
    error = size - 2 * (on * cross).sum() + (nn * new).sum()
    return float(size), float(error.clamp_min(0))


def _scores(group: HeadGroup, shared: SharedHead) -> tuple[float, float]:
    """sum_r E|q . k|^2 and its error: of a sample within attention, else frequency by frequency."""
    k_old = _unit(group.k, group) if group.norm else group.k
    k_new = _unit(shared.k[None], group) if group.norm else shared.k[None]
    if group.sample is not None:
        old, new = Projected(group.q, k_old), Projected(shared.q, k_new[0])
        return group.sample.errors(old, new, group.pairs)
    k_new = k_new.expand_as(k_old)
    q_old, q_rest = group.pairs.split(group.q)
    q_new, q_new_rest = group.pairs.split(shared.q)
    (k_old, k_rest), (k_new, k_new_rest) = group.pairs.split(k_old), group.pairs.split(k_new)
    still = still_errors(group.moment, (q_rest, q_new_rest), (k_rest, k_new_rest))
    size, error = rotating_errors(group.moment, (q_old, q_new), (k_old, k_new))
    return size + still[0], max(error, 0.0) + still[1]


Both = tuple[torch.Tensor, torch.Tensor]  # the source's rows and the folded ones


def rotating_errors(moment: torch.Tensor, queries: Both, keys: Both) -> tuple[float, float]:
    """Complex pairs, queries and keys at independent positions."""
    (q_old, q_new), (k_old, k_new) = queries, keys

    def second(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (through(a, moment) * b.conj()).sum(-1)

    def product(qa: torch.Tensor, qb: torch.Tensor, ka: torch.Tensor, kb: torch.Tensor) -> float:
        # E[(conj(qa) ka) conj(conj(qb) kb)] = conj(E[qa conj(qb)]) E[ka conj(kb)]
        return float((second(qa, qb).conj() * second(ka, kb)[:, None]).real.sum())

    size = product(q_old, q_old, k_old, k_old)
    cross, new = product(q_old, q_new, k_old, k_new), product(q_new, q_new, k_new, k_new)
    return size, size - 2 * cross + new


def still_errors(moment: torch.Tensor, queries: Both, keys: Both) -> tuple[float, float]:
    """The same for dimensions without rotary, with centred keys."""
    (q_old, q_new), (k_old, k_new) = queries, keys
    covariance = centred(moment)

    def product(qa: torch.Tensor, qb: torch.Tensor, ka: torch.Tensor, kb: torch.Tensor) -> float:
        queries = torch.einsum("hrdx,hrex->hde", through(qa, moment), qb)
        keys = torch.einsum("hdx,hex->hde", through(ka, covariance), kb)
        return float((queries * keys).sum())

    size = product(q_old, q_old, k_old, k_old)
    error = size - 2 * product(q_old, q_new, k_old, k_new) + product(q_new, q_new, k_new, k_new)
    return size, max(error, 0.0)


def _unit(keys: torch.Tensor, group: HeadGroup) -> torch.Tensor:
    """Keys ``[h, D, X]`` scaled to unit energy, as QK-norm does (on average) at run time."""
    size = energy(keys, group.moment).sqrt().clamp_min(_TINY)
    return keys / size[:, None, None]
