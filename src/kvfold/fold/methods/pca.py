"""The shared head that keeps the most energy of scores and outputs.

V: the output error sum_r ||O_{h,r} (V_h - M_h V') x||^2 is a subspace problem with the metric
A_h = sum_r O_{h,r}^T O_{h,r}. K without rotary: the score error is one with the metric
W_h = sum_r E[q_{h,r} q_{h,r}^T], and with centred inputs, because what all keys have in common
cancels in the softmax. K with rotary: each frequency is a problem of its own in one complex
dimension, since only phases commute with the rotation. With calibration text, keys are compared
by their covariance within each query's attention instead of over all tokens, and the lowest
frequencies may be folded together (``fold.bands``): so many as change attention least, in windows
and at a distance. See ``fold.subspace`` for the solution.
"""

import torch

from kvfold.arch.target import Grouped
from kvfold.fold.bands import lowest, shared_band, widths
from kvfold.fold.heads import HeadGroup, SharedHead
from kvfold.fold.methods import method
from kvfold.fold.sample import Projected
from kvfold.fold.subspace import centred, energy, shared_subspace, through

Shared = tuple[torch.Tensor, torch.Tensor]  # queries and the key rows they now read
_ROUNDS = 30
_WORST_CONDITION = 100.0
_WORSE = 2.0
_ROUNDING = 1e-6  # nats
_GAIN = 0.99  # of the attention's divergence, at most, that a band must leave


@method("pca", targets=(Grouped,), candidate=True)
def pca(group: HeadGroup, generator: torch.Generator) -> SharedHead:
    """the best shared subspace, weighted by what queries ask and outputs read"""
    metric = torch.einsum("hrcd,hrce->hde", group.o, group.o)
    v, mix = shared_subspace(group.v, group.value_moment, metric)
    o = torch.einsum("hrcd,hde->hrce", group.o, mix)
    q, k = principal_keys(group)
    return SharedHead(q, k, v, o)


def principal_keys(group: HeadGroup) -> Shared:
    """Shared key rows ``[D, X]`` and the queries ``[g, R, D, X]`` that go with them."""
    q_pairs, q_rest = group.pairs.split(group.q)
    k_pairs, k_rest = group.pairs.split(group.k)
    q_own, k_own = rotating_keys(q_pairs, k_pairs, group.moment, group.key_moments)
    q_rest, k_rest = _still(q_rest, k_rest, group.moment)

    def whole(q: torch.Tensor, k: torch.Tensor) -> Shared:
        return group.pairs.join(q, q_rest), group.pairs.join(k, k_rest)

    found, sample = whole(q_own, k_own), group.sample
    if sample is None or group.norm is not None or group.covariance is None:
        return found
    source = sample.attention(Projected(group.q, group.k), group.pairs)

    def divergence(shared: Shared) -> float:
        return sample.divergence(source, Projected(*shared), group.pairs)

    least = _GAIN * divergence(found) - _ROUNDING
    for width in widths(k_own.shape[0]):
        band = lowest(sample.frequencies, width)
        q_new, k_new = q_own.clone(), k_own.clone()
        q_new[..., band, :], k_new[band] = shared_band(
            q_pairs[..., band, :], k_pairs[:, band], group.moment, group.covariance,
            sample.frequencies[band],
        )  # fmt: skip
        tried = whole(q_new, k_new)
        apart = divergence(tried)
        if apart < least:
            found, least = tried, apart
        elif apart > _WORSE * least:  # wider ones turn too far as well
            break
    return found


def rotating_keys(
    q: torch.Tensor, k: torch.Tensor, moment: torch.Tensor, key_moments: torch.Tensor | None
) -> Shared:
    """Complex pairs: q ``[g, R, F, X]``, k ``[g, F, X]``, a batch of F problems of size 1."""
    if not k.shape[-2]:
        return q, k[0]
    parts, mix = shared_frequencies(q, k, moment, key_moments)
    # conj(q) k_h = conj(q) m k' = conj(conj(m) q) k'
    return mix.T[:, None, :, None].conj() * q, torch.einsum("fg,gfx->fx", parts, k)


def shared_frequencies(
    q: torch.Tensor, k: torch.Tensor, moment: torch.Tensor, key_moments: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """b and m, ``[F, g]`` complex: k' = sum_h b_h k_h is shared, and k_h ~ m_h k'."""
    asked = (through(q, moment) * q.conj()).real.sum((1, 3))  # [g, F], sum_r E|q|^2
    stacks = k.transpose(0, 1)[:, :, None, :]  # [F, g, 1, X]
    metrics = asked.T[..., None, None].to(k.dtype)  # [F, g, 1, 1]
    mix = shared_subspace(stacks, moment, metrics)[1][..., 0, 0]
    # m = A^-1/2 U / s and b = U^H A^1/2 s, with U a unit vector and s a scale
    parts = mix.conj() * asked.T
    parts = parts / (parts * mix).real.sum(-1, keepdim=True).clamp_min(1e-300)
    if key_moments is None:
        return _in_phase(parts, mix)
    parts, mix = _within_attention(mix, key_moments)
    rows = torch.einsum("fg,gfx->fx", parts, k)
    own = energy(rows[:, None], moment).clamp_min(1e-300)
    scale = (energy(k.transpose(0, 1), moment) / k.shape[0] / own).sqrt()[:, None]
    return _in_phase(parts * scale, mix / scale)


def _in_phase(parts: torch.Tensor, mix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same with shared keys in the phase of the member that has most of them.

    Only products with queries count, but where norms have weights: these differ between the two
    dimensions of a pair, and can take the place of the source's if those are not mixed.
    """
    most = mix.gather(-1, mix.abs().argmax(-1, keepdim=True))
    phase = torch.where(most.abs() > 0, most / most.abs(), torch.ones_like(most))
    return parts * phase, mix * phase.conj()


def _within_attention(
    mix: torch.Tensor, moments: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Refine k' = sum_h b_h k_h and k_h ~ m_h k' under what each head's queries attend to.

    Minimises sum_h (e_h - m_h b)^T M_h conj(e_h - m_h b), M_h the covariance of the keys within
    the attention of head h, by alternating the two linear solves (rank one, every frequency
    apart).

    Args:
        mix: ``[F, g]``, where to start; moments: ``[g, F, g, g]``.
    """
    count = mix.shape[1]
    by_frequency = moments.transpose(0, 1)  # [F, h, g, g], E[k_a conj(k_b)]
    eye = torch.eye(count, dtype=mix.dtype, device=mix.device)
    own = by_frequency.diagonal(dim1=1, dim2=2).permute(0, 2, 1)  # [F, h, g]: row h of M_h
    floor = 1e-9 * by_frequency.diagonal(dim1=2, dim2=3).real.mean((1, 2)) + 1e-30
    for _ in range(_ROUNDS):
        power = (mix.abs() ** 2).to(mix.dtype)
        system = torch.einsum("fh,fhab->fba", power, by_frequency)
        target = torch.einsum("fh,fha->fa", mix.conj(), own)
        b = torch.linalg.solve(system + floor[:, None, None] * eye, target)
        seen = torch.einsum("fa,fhab,fb->fh", b, by_frequency, b.conj()).real
        mix = torch.einsum("fha,fa->fh", own, b.conj()) / (seen + floor[:, None])
    return b, mix


def _still(q: torch.Tensor, k: torch.Tensor, moment: torch.Tensor) -> Shared:
    """Dimensions without rotary: q ``[g, R, d, X]``, k ``[g, d, X]``."""
    if not k.shape[-2]:
        return q, k[0]
    metrics = torch.einsum("hrdx,hrex->hde", through(q, moment), q)
    shared, mixes = shared_subspace(k, centred(moment), metrics)
    shared, mixes = _like_a_member(shared, mixes)
    return torch.einsum("hrdx,hde->hrex", q, mixes), shared


def _like_a_member(shared: torch.Tensor, mixes: torch.Tensor) -> Shared:
    """The same in the coordinates of a member, as :func:`_in_phase`: of that whose matrix is best
    inverted; none if that would cost digits."""
    conditions = torch.linalg.cond(mixes)
    own = mixes[conditions.argmin()]
    if not conditions.min() < _WORST_CONDITION:
        return shared, mixes
    return own @ shared, mixes @ torch.linalg.inv(own)
