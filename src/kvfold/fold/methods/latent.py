"""Keep the latent directions that queries ask for and outputs read.

The rotary key has the highest frequencies, each shared by all heads as in ``pca``. What remains of
all keys, position-free, and all values are one stack of rows. The latent keeps their leading
directions: c = U^T B x with B the stack of rows, each head's weighed by the root of a metric: what
queries ask of its keys (E[q q^T]), and what the output projection reads of its values (O^T O). Keys
and values are scaled so that an error of either costs the same share of all scores or outputs.
"""

import torch

from kvfold.arch.target import Latent
from kvfold.fold.heads import HeadGroup
from kvfold.fold.latents import LatentSizes, SharedLatent
from kvfold.fold.methods import method
from kvfold.fold.methods.pca import rotating_keys
from kvfold.fold.subspace import centred, energy, matrix_roots, through


@method("latent", targets=(Latent,), candidate=True)
def latent(group: HeadGroup, sizes: LatentSizes, generator: torch.Generator) -> SharedLatent:
    """one latent and one rotary key, weighed by what queries ask and outputs read"""
    q_pairs, q_rest = group.pairs.split(group.q)
    k_pairs, k_rest = group.pairs.split(group.k)
    kept = list(sizes.frequencies)
    dropped = [j for j in range(k_pairs.shape[-2]) if j not in sizes.frequencies]
    moments = None if group.key_moments is None else group.key_moments[:, kept]
    q_rope, k_rope = rotating_keys(q_pairs[..., kept, :], k_pairs[:, kept], group.moment, moments)
    q = _real(q_pairs[..., dropped, :], q_rest)  # [g, R, N, X]
    k = _real(k_pairs[:, dropped], k_rest)  # [g, N, X]
    down, up_k, up_v = _joint(group, q, k, sizes.latent)
    times = group.q.shape[1]
    return SharedLatent(
        q_rope=_real(q_rope, q_rope[..., :0, :].real).flatten(0, 1),
        k_rope=_real(k_rope, k_rope[:0].real),
        q_nope=q.flatten(0, 1),
        down=down,
        up_k=up_k.repeat_interleave(times, 0),
        up_v=up_v.repeat_interleave(times, 0),
        o=group.o.flatten(0, 1),
    )


def _joint(
    group: HeadGroup, q: torch.Tensor, k: torch.Tensor, rank: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The latent ``[n, X]``, and how keys ``[g, N, n + 1]`` and values ``[g, Dv, n + 1]`` read it.

    What all tokens have in common is no content of the latent: of keys it cancels in the softmax,
    and to values the constant adds it.
    """
    asked = torch.einsum("hrdx,hrex->hde", through(q, group.moment), q)
    read = torch.einsum("hrcd,hrce->hde", group.o, group.o)
    covariance, averaged = centred(group.moment), centred(group.value_moment)
    k_rows = _weighed(k, asked, covariance)
    v_rows = _weighed(group.v, read, averaged)
    rows = torch.cat([k_rows, v_rows])
    gram = through(rows, covariance + averaged) @ rows.mT
    vectors = torch.linalg.eigh((gram + gram.mT) / 2).eigenvectors
    down = vectors[:, -rank:].flip(-1).mT @ rows
    return down, _read(k, down, group.moment), _read(group.v, down, group.value_moment)


def _weighed(rows: torch.Tensor, metric: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
    """All heads' rows ``[g d, X]`` with the root of their metric before them, of energy 1."""
    root, _ = matrix_roots(metric)
    weighed = (root @ rows).flatten(0, 1)
    size: torch.Tensor = energy(weighed, moment).sum().clamp_min(1e-300).sqrt()
    return weighed / size


def _read(rows: torch.Tensor, down: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
    """``[g, d, n + 1]``: least squares of heads' rows ``[g, d, X]`` on [c; 1]."""
    covariance = centred(moment)
    gram = through(down, covariance) @ down.mT
    floor = 1e-12 * gram.diagonal().mean() + 1e-300
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    cross = through(down, covariance) @ rows.flatten(0, 1).mT
    up = torch.linalg.solve(gram + floor * eye, cross).mT.unflatten(0, rows.shape[:2])
    rest = rows - up @ down
    constant = rest[..., -1:] if moment.dim() == 1 else rest @ moment[:, -1:] / moment[-1, -1]
    return torch.cat([up, constant], -1)


def _real(pairs: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
    """Complex pairs as half-split dimensions, before those without rotary."""
    return torch.cat([pairs.real, pairs.imag, rest], dim=-2)
