"""The one piece of linear algebra behind alignment: the best shared subspace.

Given g stacks of d rows s_h (functions of x with second moment S) and metrics A_h, find d
shared rows s' and mixing matrices M_h that minimise  sum_h E || A_h^1/2 (s_h - M_h s') x ||^2.
Solution (Eckart-Young): with B the stack of A_h^1/2 s_h and U the top d eigenvectors of
B S B^H,  s' = U^H B  and  M_h = A_h^-1/2 U_h.  If all s_h span the same rows (a head that
was repeated and scrambled), the fit is exact.
"""

import torch


def matrix_roots(metric: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A^1/2 and A^-1/2 of Hermitian ``[..., d, d]``; directions of no weight are floored.

    The floor, 1e-10 of the largest eigenvalue, keeps the inverse finite: such directions
    carry no energy, so whatever they are mapped to costs nothing.
    """
    values, vectors = torch.linalg.eigh(metric)
    largest = values[..., -1:].clamp_min(torch.finfo(torch.float64).tiny)
    roots = values.clamp_min(1e-10 * largest).sqrt()
    adjoint = vectors.mH
    return (vectors * roots[..., None, :]) @ adjoint, (vectors / roots[..., None, :]) @ adjoint


def shared_subspace(
    stacks: torch.Tensor, moment: torch.Tensor, metrics: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Solve the problem above.

    Args:
        stacks: ``[..., g, d, X]``, real or complex.
        moment: ``[X, X]`` or ``[X]``, real.
        metrics: ``[..., g, d, d]``, Hermitian.

    Returns:
        shared rows ``[..., d, X]`` and mixing matrices ``[..., g, d, d]``, scaled so that the
        shared rows carry the mean energy of the members, per batch entry.
    """
    count, size = stacks.shape[-3:-1]
    root, inverse_root = matrix_roots(metrics)
    weighted = (root @ stacks).flatten(-3, -2)
    gram = through(weighted, moment) @ weighted.mH
    _, vectors = torch.linalg.eigh((gram + gram.mH) / 2)
    top = vectors[..., -size:].flip(-1)
    shared = top.mH @ weighted
    mixes = inverse_root @ top.unflatten(-2, (count, size))
    scale = _matching_scale(shared, stacks, moment)
    return shared * scale, mixes / scale[..., None, :, :]


def through(rows: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
    """``rows`` ``[..., d, X]`` times a second moment; one of shape ``[X]`` is diagonal."""
    if moment.dim() == 1:
        return rows * moment
    if rows.is_complex():  # half the work of a product of two complex matrices
        return torch.complex(rows.real @ moment, rows.imag @ moment)
    return rows @ moment


def centred(moment: torch.Tensor) -> torch.Tensor:
    """The covariance part of E[x~ x~T]: what all tokens have in common removed.

    Keys without rotary need it: a constant adds the same to all of a query's scores, and
    cancels in the softmax.
    """
    if moment.dim() == 1:
        return torch.cat([moment[:-1], torch.zeros_like(moment[-1:])])
    mean = moment[:, -1:] / moment[-1, -1]
    return moment - moment[-1, -1] * mean @ mean.T


def energy(rows: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
    """E |rows x|^2 summed over rows: ``[..., d, X]`` -> ``[...]``."""
    return (through(rows, moment) * rows.conj()).real.sum((-1, -2))


def _matching_scale(
    shared: torch.Tensor, stacks: torch.Tensor, moment: torch.Tensor
) -> torch.Tensor:
    members = energy(stacks, moment).mean(-1)
    own = energy(shared, moment)
    tiny = torch.finfo(torch.float64).tiny
    scale = torch.where(own > tiny, members / own.clamp_min(tiny), torch.ones_like(own)).sqrt()
    return scale.clamp_min(tiny)[..., None, None]
