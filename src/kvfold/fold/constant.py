"""A constant in the latent, by which its norm becomes a known factor.

The latent is normalised: what is cached is w_i c_i / rms([c; s]), over the rank's numbers. With one
of them a constant s far above the others, rms = sqrt((s^2 + |c|^2) / rank) is nearly the same for
every token, and the weight w undoes it. What is left is (|c|^2 - E|c|^2) / 2 s^2, relative. The
same number, scaled to be about as large as the others, is the 1 that carries biases.

With a bias, s is exact. Without one, s u . x stands for it, where u . x is about 1: u solves least
squares of 1 on the layer's input x, as it is and as attention averages it, so that tokens count
which everything attends to, such as the first. Biases of what is projected from x become b u.
"""

from dataclasses import replace
from math import floor, log2

import torch

from kvfold.arch.latent import LatentWeights
from kvfold.errors import InputError, UnsupportedError
from kvfold.fold.latents import SharedLatent
from kvfold.fold.subspace import energy

# The larger, the nearer is the norm to a constant; no number loses digits beside it, for each is
# scaled by itself. 16-bit floats end at 65,504: that leaves room for inputs where u . x is 8.
CONSTANT = 2.0**13
_LARGEST = 2.0**15  # of a weight
_RIDGE = 1e-6
_TINY = 1e-300


def constant_direction(moment: torch.Tensor, value_moment: torch.Tensor) -> torch.Tensor:
    """u ``[C]`` that minimises E(u . x - 1)^2 + E(u . A x - 1)^2.

    Args:
        moment: ``[X, X]``, E[x~ x~T]. value_moment: the same of attention-averaged inputs A x.

    Raises:
        InputError: for statistics without data, which know no mean.
    """
    if moment.dim() == 1:
        raise InputError(
            "without biases, a latent needs calibration text", "give text, or --layout youtu"
        )
    both = moment + value_moment
    gram, mean = both[:-1, :-1], both[:-1, -1]
    ridge = _RIDGE * gram.diagonal().mean()
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    found: torch.Tensor = torch.linalg.solve(gram + ridge * eye, mean)
    return found


def constant_error(constant: torch.Tensor, moment: torch.Tensor) -> float:
    """The root of E(u . x - 1)^2: how far from 1 what stands for it is, over tokens."""
    u, mean = constant, moment[:-1, -1]
    return float((u @ moment[:-1, :-1] @ u - 2 * u @ mean + moment[-1, -1]).clamp_min(0).sqrt())


def with_constant(
    shared: SharedLatent,
    o_bias: torch.Tensor | None,
    constant: torch.Tensor | None,
    moment: torch.Tensor,
) -> LatentWeights:
    """The weights that are stored.

    Every row of the projection to the latent has one RMS, that of ``o``, and so has every column of
    the projection from it; the norm's weight between holds what is left. So one learning rate
    suits all of them, and cached numbers are as large as they are important.

    Args:
        shared: n + 1 is the rank. constant: ``[C]``, u; None where there are biases.
    """
    rank = shared.up_k.shape[-1]
    down, up = _centred(shared, moment)
    if constant is not None and o_bias is not None:
        up[:, shared.up_k.shape[1] :, -1] += _through_output(shared.o, o_bias)
        o_bias = None
    s, typical = _size(constant), float(_rms(shared.o.flatten()).clamp_min(1e-6))
    sizes = _rms(down[:, :-1])
    rows = down * torch.where(sizes > 0, typical / sizes.clamp_min(_TINY), 0.0)[:, None]
    gain = _gain(up, typical)
    # What the norm divides by is sqrt(s^2 + E|c|^2) / sqrt(rank).
    norm = (s**2 + energy(rows, moment)).sqrt() / rank**0.5
    weight = torch.cat([sizes / typical, torch.ones_like(sizes[:1]) / s]) * norm * gain
    q = torch.cat([shared.q_nope, shared.q_rope], 1)
    kv_a = torch.cat([rows, torch.zeros_like(rows[:1]), shared.k_rope])
    kv_a[rank - 1, -1] = s
    made = LatentWeights(
        q=q,
        kv_a=kv_a,
        norm=torch.where(weight > 0, weight, 1.0),
        kv_b=up / gain,
        o=shared.o,
        o_bias=o_bias,
    )
    return _with_biases(made) if constant is None else _without_biases(made, constant)


def _gain(up: torch.Tensor, typical: float) -> torch.Tensor:
    """How large each cached number is to be, so that columns ``[..., rank]`` have one RMS."""
    columns = _rms(up.flatten(0, 1).T) / typical
    return columns.clamp_min(1e-6 * float(columns.max().clamp_min(_TINY)))


def _with_biases(weights: LatentWeights) -> LatentWeights:
    """Rows ``[..., X]`` as weights and biases, of which queries can have none."""
    if weights.q[..., -1].any():
        raise UnsupportedError(
            "its queries have biases, for which this layout has no place", "--layout deepseek_v3"
        )
    o = weights.o
    return replace(
        weights,
        q=weights.q[..., :-1],
        kv_a=weights.kv_a[..., :-1],
        kv_a_bias=weights.kv_a[..., -1],
        o_bias=o.new_zeros(o.shape[1]) if weights.o_bias is None else weights.o_bias,
    )


def _without_biases(weights: LatentWeights, constant: torch.Tensor) -> LatentWeights:
    """Rows ``[..., X]`` with u . x in place of 1."""

    def only_weights(rows: torch.Tensor) -> torch.Tensor:
        return rows[..., :-1] + rows[..., -1:] * constant

    return replace(weights, q=only_weights(weights.q), kv_a=only_weights(weights.kv_a))


def _centred(shared: SharedLatent, moment: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The latent without its mean ``[n, X]``, which the constant adds: ``[Hq, N + Dv, n + 1]``."""
    up = torch.cat([shared.up_k, shared.up_v], 1)
    mean = moment[:, -1] / moment[-1, -1] if moment.dim() == 2 else torch.zeros_like(moment)
    if moment.dim() == 1:
        mean[-1] = 1
    offset = shared.down @ mean
    down = shared.down.clone()
    down[:, -1] -= offset
    up[..., -1] += up[..., :-1] @ offset
    return down, up


def _size(constant: torch.Tensor | None) -> float:
    """s, smaller where inputs are so small that u would make weights beyond 16-bit floats."""
    if constant is None:
        return CONSTANT
    return min(CONSTANT, 2.0 ** floor(log2(_LARGEST / float(constant.abs().max()))))


def _rms(rows: torch.Tensor) -> torch.Tensor:
    return rows.square().mean(-1).sqrt()


def _through_output(o: torch.Tensor, o_bias: torch.Tensor) -> torch.Tensor:
    """Values ``[Hq, Dv]``, the same at all tokens, that the output projection makes its bias of."""
    heads, _, size = o.shape
    flat = o.transpose(0, 1).flatten(1)  # [C, Hq Dv]
    bias = o_bias.to(flat)
    values = torch.linalg.lstsq(flat, bias[:, None], driver="gelsd").solution[:, 0]
    if (flat @ values - bias).norm() > 1e-3 * bias.norm():
        raise UnsupportedError(
            "its output projection has a bias, for which this layout has no place",
            "--layout youtu",
        )
    return values.unflatten(0, (heads, size))
