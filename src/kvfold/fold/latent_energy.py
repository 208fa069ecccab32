"""How much of a layer a latent keeps: ``fold.energy``, head by head.

Kept rotary frequencies are compared as there. What the latent holds of keys is position-free, and
is compared with the source's other dimensions as they are at one position.
"""

import torch

from kvfold.fold.energy import Energy, output_errors, rotating_errors, still_errors
from kvfold.fold.heads import HeadGroup
from kvfold.fold.latents import LatentSizes, SharedLatent


def latent_energy(group: HeadGroup, shared: SharedLatent, sizes: LatentSizes) -> Energy:
    """Compare a layer's latent with its source, every query head with its own keys and values."""
    heads = _per_query_head(group)
    k_new, v_new = in_inputs(shared.up_k, shared.down), in_inputs(shared.up_v, shared.down)
    value, value_error = output_errors(
        group.value_moment, (heads.v, v_new), (heads.o, shared.o[:, None])
    )
    kept = list(sizes.frequencies)
    q_pairs, q_rest = group.pairs.split(heads.q)
    k_pairs, k_rest = group.pairs.split(heads.k)
    dropped = [j for j in range(k_pairs.shape[-2]) if j not in sizes.frequencies]
    half = len(kept)
    q_rope = torch.complex(shared.q_rope[:, :half], shared.q_rope[:, half:])[:, None]
    k_rope = torch.complex(shared.k_rope[:half], shared.k_rope[half:]).expand(len(heads.k), -1, -1)
    rotating, error = rotating_errors(
        group.moment, (q_pairs[..., kept, :], q_rope), (k_pairs[:, kept], k_rope)
    )
    still, still_error = still_errors(
        group.moment,
        (_real(q_pairs[..., dropped, :], q_rest), shared.q_nope[:, None]),
        (_real(k_pairs[:, dropped], k_rest), k_new),
    )
    return Energy(value, value_error, rotating + still, max(error, 0.0) + still_error)


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


def _real(pairs: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
    return torch.cat([pairs.real, pairs.imag, rest], dim=-2)
