"""Keep the latent directions that queries ask for and outputs read.

The rotary key has the highest frequencies, each shared by all heads as in ``pca``. All that it
leaves of the keys goes into the latent, position-free: the other frequencies, and what one key
cannot say of its own. A position-free key cannot turn with distance; the best one, for a query head
and a frequency, is the least-squares prediction of the turned keys from the keys as they are,
within the head's attention. It finds the gain and the phase of the distances the head looks at.

These keys K_h and the values V_h are functions of the layer's input x, and the latent keeps n
directions of all of them: with B the stack of their rows, each head's with the root of its metric
before it (what queries ask of keys, E[q q^T]; what the output projection reads of values, O^T O),
c = U^T B x, U the leading eigenvectors of B S B^T. Keys count by their covariance within attention,
values as attention averages them. Both are read out of c by least squares.
"""

import torch

from kvfold.arch.target import Latent
from kvfold.fold.heads import HeadGroup
from kvfold.fold.latents import LatentSizes, SharedLatent
from kvfold.fold.methods import is_fitted_with_gaps, method
from kvfold.fold.methods.pca import shared_frequencies
from kvfold.fold.subspace import centred, energy, matrix_roots, through

# An error of keys, as a share of all scores' energy, costs more than one of values as a share of
# all outputs': scores are exponentiated. Measured on SmolLM2-135M: 4 to 32 are alike, 1 is worse.
KEY_WEIGHT = 16.0
_RIDGE = 1e-3  # towards keys as they are at distance 0


@method(
    "latent",
    targets=(Latent,),
    candidate=True,
    suits=lambda target, fit: not is_fitted_with_gaps(target, fit),
)
def latent(group: HeadGroup, sizes: LatentSizes, generator: torch.Generator) -> SharedLatent:
    """one latent and one rotary key, weighed by what queries ask and outputs read"""
    kept = list(sizes.frequencies)
    q_pairs, q_rest = group.pairs.split(group.q)
    k_pairs, k_rest = group.pairs.split(group.k)
    moments = None if group.key_moments is None else group.key_moments[:, kept]
    parts, mix = shared_frequencies(q_pairs[..., kept, :], k_pairs[:, kept], group.moment, moments)
    q_rope = (mix.T[:, None, :, None].conj() * q_pairs[..., kept, :]).flatten(0, 1)
    k_rope = torch.einsum("fg,gfx->fx", parts, k_pairs[:, kept])
    rest = _left_over(k_pairs, kept, parts, mix)
    pairs = torch.einsum("hfg,gfx->hfx", _standing(rest, group), k_pairs)
    times = group.q.shape[1]
    q = torch.cat([q_pairs.real, q_pairs.imag, q_rest], -2).flatten(0, 1)
    k = torch.cat([pairs.real, pairs.imag, k_rest.repeat_interleave(times, 0)], -2)
    down, up_k, up_v = _joint(group, q, k, sizes.latent)
    return SharedLatent(
        q_rope=torch.cat([q_rope.real, q_rope.imag], -2),
        k_rope=torch.cat([k_rope.real, k_rope.imag], -2),
        q_nope=q,
        down=down,
        up_k=up_k,
        up_v=up_v.repeat_interleave(times, 0),
        o=group.o.flatten(0, 1),
    )


def _left_over(
    k: torch.Tensor, kept: list[int], parts: torch.Tensor, mix: torch.Tensor
) -> torch.Tensor:
    """What the rotary key leaves of each head's key, ``[Hkv, F, Hkv]``: as a sum of all keys."""
    heads, frequencies = k.shape[:2]
    eye = torch.eye(heads, dtype=k.dtype, device=k.device)
    rest = eye[:, None].repeat(1, frequencies, 1)
    rest[:, kept] -= mix.T[..., None] * parts
    return rest


def _standing(rest: torch.Tensor, group: HeadGroup) -> torch.Tensor:
    """The best position-free keys of each query head, ``[Hq, F, Hkv]``: as sums of all keys.

    With e = sum_a r_a k_a turned by the distance, sum_b w_b k_b predicts it best with
    w E[k k^H] = r E[turned k k^H].
    """
    rest = rest.repeat_interleave(group.q.shape[1], 0)
    if group.attended is None:
        return rest
    turned, still = group.attended.turned, group.attended.still
    size = still.diagonal(dim1=-2, dim2=-1).real.mean(-1)
    eye = torch.eye(still.shape[-1], dtype=still.dtype, device=still.device)
    system = still + (_RIDGE * size + 1e-300)[..., None, None] * eye
    missed = torch.einsum("hfa,hfab->hfb", rest, turned - still)
    return rest + torch.linalg.solve(system.mT, missed[..., None])[..., 0]


def _joint(
    group: HeadGroup, q: torch.Tensor, k: torch.Tensor, rank: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The latent ``[n, X]``; how keys ``[Hq, D, n + 1]`` and values ``[Hkv, Dv, n + 1]`` read it.

    What all tokens have in common is no content of the latent: of keys it cancels in the softmax,
    and to values the constant adds it.
    """
    asked = through(q, group.moment) @ q.mT
    read = torch.einsum("hrcd,hrce->hde", group.o, group.o)
    averaged = centred(group.value_moment)
    attended = centred(group.moment) if group.covariance is None else group.covariance
    k_rows, v_rows = _weighed(k, asked), _weighed(group.v, read)
    k_size, v_size = energy(k_rows, attended), energy(v_rows, averaged)
    # where the rotary key leaves nothing, what is left is rounding, and is not to be scaled up
    whole = asked.diagonal(dim1=1, dim2=2).sum() * energy(group.k, attended).sum()
    k_rows = k_rows * (KEY_WEIGHT / torch.maximum(k_size, 1e-12 * whole).clamp_min(1e-300)).sqrt()
    v_rows = v_rows / v_size.clamp_min(1e-300).sqrt()
    rows = torch.cat([k_rows, v_rows])
    gram = through(rows, attended + averaged) @ rows.mT
    vectors = torch.linalg.eigh((gram + gram.mT) / 2).eigenvectors
    down = vectors[:, -rank:].flip(-1).mT @ rows
    up_v = _read(group.v, down, averaged)
    return down, _read(k, down, attended), _with_mean(up_v, group.v, down, group.value_moment)


def _weighed(rows: torch.Tensor, metric: torch.Tensor) -> torch.Tensor:
    """All heads' rows ``[g d, X]`` with the root of their metric before them."""
    return (matrix_roots(metric)[0] @ rows).flatten(0, 1)


def _read(rows: torch.Tensor, down: torch.Tensor, covariance: torch.Tensor) -> torch.Tensor:
    """``[g, d, n + 1]``: least squares of heads' rows ``[g, d, X]`` on c; nothing of the 1."""
    gram = through(down, covariance) @ down.mT
    floor = 1e-12 * gram.diagonal().mean() + 1e-300
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    cross = through(down, covariance) @ rows.flatten(0, 1).mT
    up = torch.linalg.solve(gram + floor * eye, cross).mT.unflatten(0, rows.shape[:2])
    return torch.cat([up, torch.zeros_like(up[..., :1])], -1)


def _with_mean(
    up: torch.Tensor, rows: torch.Tensor, down: torch.Tensor, moment: torch.Tensor
) -> torch.Tensor:
    """``up`` with what the rows are on average, in its last column."""
    rest = rows - up[..., :-1] @ down
    mean = rest[..., -1:] if moment.dim() == 1 else rest @ moment[:, -1:] / moment[-1, -1]
    return torch.cat([up[..., :-1], mean], -1)
