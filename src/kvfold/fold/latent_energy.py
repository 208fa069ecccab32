"""How much of a layer a latent keeps: ``fold.energy``, head by head.

Queries and keys are taken at independent tokens and at one position: what is position-free and what
turns say the same scores there only together.
"""

import torch

from kvfold.fold.energy import Energy, output_errors, still_errors
from kvfold.fold.heads import HeadGroup
from kvfold.fold.latents import SharedLatent


def latent_energy(group: HeadGroup, shared: SharedLatent) -> Energy:
    """Compare a layer's latent with its source, every query head with its own keys and values."""
    heads = _per_query_head(group)
    k_new, v_new = in_inputs(shared.up_k, shared.down), in_inputs(shared.up_v, shared.down)
    value, value_error = output_errors(
        group.value_moment, (heads.v, v_new), (heads.o, shared.o[:, None])
    )
    key, key_error = still_errors(
        group.moment,
        (heads.q, torch.cat([shared.q_rope, shared.q_nope], -2)[:, None]),
        (heads.k, torch.cat([shared.k_rope.expand(len(k_new), -1, -1), k_new], -2)),
    )
    return Energy(value, value_error, key, key_error)


def in_inputs(up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """Rows ``[Hq, d, n + 1]`` of [c; 1] as rows ``[Hq, d, X]`` of the layer's input."""
    rows = up[..., :-1] @ down
    rows[..., -1] += up[..., -1]
    return rows


def _per_query_head(group: HeadGroup) -> HeadGroup:
    """Every query head as a KV head of its own."""
    times = group.q.shape[1]
    return HeadGroup(
        q=group.q.flatten(0, 1)[:, None],
        k=group.k.repeat_interleave(times, 0),
        v=group.v.repeat_interleave(times, 0),
        o=group.o.flatten(0, 1)[:, None],
        moment=group.moment,
        value_moment=group.value_moment,
        pairs=group.pairs,
    )
