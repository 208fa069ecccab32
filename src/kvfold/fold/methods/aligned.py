"""Rotate the heads onto each other, then average (generalised Procrustes; Gower 1975).

Heads keep their lengths: V and still dimensions of K turn by orthogonal matrices, rotary pairs
by phases. Averaging shrinks, so the result is scaled to the members' mean energy.
"""

import torch

from kvfold.arch.target import Grouped
from kvfold.fold.heads import HeadGroup, SharedHead
from kvfold.fold.methods import method
from kvfold.fold.subspace import energy, through

_ROUNDS = 20


@method("aligned", targets=(Grouped,), candidate=True)
def aligned(group: HeadGroup, generator: torch.Generator) -> SharedHead:
    """rotate the heads onto each other (Procrustes), then average"""
    v, turns = _procrustes(group.v, group.value_moment)
    o = torch.einsum("hrcd,hed->hrce", group.o, turns)
    q, k = _keys(group)
    return SharedHead(q, k, v, o)


def _keys(group: HeadGroup) -> tuple[torch.Tensor, torch.Tensor]:
    q_pairs, q_rest = group.pairs.split(group.q)
    k_pairs, k_rest = group.pairs.split(group.k)
    if k_pairs.shape[-2]:
        # Each pair is one complex row: a Procrustes problem whose rotations are phases.
        rows, turns = _procrustes(k_pairs.transpose(0, 1)[:, :, None, :], group.moment)
        k_shared, phase = rows[:, 0, :], turns[..., 0, 0].T
        q_pairs = phase[:, None, :, None] * q_pairs
    else:
        k_shared = k_pairs[0]
    if k_rest.shape[-2]:
        k_rest_shared, turns = _procrustes(k_rest, group.moment)
        q_rest = torch.einsum("hed,hrdx->hrex", turns, q_rest)
    else:
        k_rest_shared = k_rest[0]
    return group.pairs.join(q_pairs, q_rest), group.pairs.join(k_shared, k_rest_shared)


def _procrustes(stacks: torch.Tensor, moment: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn stacks ``[..., g, d, X]`` onto their mean.

    Returns:
        mean rows ``[..., d, X]`` and the unitary turns ``[..., g, d, d]``.
    """
    # E[s_h s_i^H] for every pair of members: the rounds need no more than these d x d blocks.
    gram = torch.einsum("...gdx,...hex->...ghde", through(stacks, moment), stacks.conj())
    turns = stacks.new_zeros(())
    agreement = gram[..., :1, :, :, :].squeeze(-4)  # the first head leads the first round
    for _ in range(_ROUNDS):
        left, _, right = torch.linalg.svd(agreement)
        turns = left @ right
        agreement = torch.einsum("...gde,...ghef->...hdf", turns, gram)
    mean = (turns @ stacks).mean(-3, keepdim=True)
    shared = mean.squeeze(-3)
    tiny = torch.finfo(torch.float64).tiny
    members = energy(stacks, moment).mean(-1)
    scale = (members / energy(shared, moment).clamp_min(tiny)).sqrt().clamp_min(tiny)
    return shared * scale[..., None, None], turns
