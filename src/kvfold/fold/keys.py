"""Keys that are normalised after projection (QK-norm: Qwen3, Gemma 3).

The norm removes each head's scale, so only phases are left to choose, and only on pairs where
the norm's weights are equal; on other pairs, and in dimensions without rotary, a sign. Keys are
scaled to unit RMS, turned to agree, and averaged; what cannot be aligned this way is left to the
fit and to healing.
"""

import torch

from kvfold.fold.heads import HeadGroup, NormWeights
from kvfold.fold.subspace import energy, through

_ROUNDS = 10  # alternating phases and their mean converges in a few rounds


def normalised_keys(group: HeadGroup, norm: NormWeights) -> tuple[torch.Tensor, torch.Tensor]:
    """Shared key rows ``[D, X]`` and turned queries ``[g, R, D, X]``."""
    size = energy(group.k, group.moment).sqrt()
    keys = group.k / size[:, None, None]
    pairs, rest = group.pairs.split(keys)
    free = norm.free_phases(group.pairs)
    turns = _turns(pairs, group.moment, free)
    signs = _turns(
        rest, group.moment, torch.zeros(rest.shape[1], dtype=torch.bool, device=free.device)
    )
    shared = (turns.conj()[..., None] * pairs).mean(0)
    q_pairs, q_rest = group.pairs.split(group.q)
    q = group.pairs.join(turns.conj()[:, None, :, None] * q_pairs, signs[:, None, :, None] * q_rest)
    still = (signs[..., None] * rest).mean(0)
    return q, group.pairs.join(shared, still) * size.mean()


def _turns(pairs: torch.Tensor, moment: torch.Tensor, free: torch.Tensor) -> torch.Tensor:
    """Unit phases ``[g, F]`` that bring keys ``[g, F, X]`` together; signs where not free.

    Real keys have signs only.
    """
    reference = pairs[0]
    turns = torch.ones(pairs.shape[:2], dtype=pairs.dtype, device=pairs.device)
    for _ in range(_ROUNDS):
        agreement = (through(pairs, moment) * reference.conj()).sum(-1)  # E[z_h conj(z)]
        phase = torch.where(agreement.abs() > 0, agreement / agreement.abs(), 1)
        sign = torch.where(agreement.real < 0, -1.0, 1.0).to(pairs.dtype)
        turns = torch.where(free, phase, sign)
        reference = (turns.conj()[..., None] * pairs).mean(0)
    return turns
