"""Keys whose lowest rotary frequencies are folded together.

Only phases commute with a rotation, so that every frequency of g heads is a problem of its own,
g complex rows to one. But frequencies that hardly turn over the distances that matter may be mixed
as dimensions without rotary may: b of them over g heads are one problem, g b rows to b. The
components of the solution are then told apart by how fast they turn: those of the source's
frequencies, weighed by what queries ask of them, are a Hermitian form on the shared subspace; its
eigenvectors are put back in the order of its eigenvalues (Rayleigh and Ritz).
"""

import torch

from kvfold.fold.subspace import matrix_roots, shared_subspace, through

SIXTEENTHS = (2, 3, 4, 5, 6, 8, 10, 12)  # of the frequencies, the lowest, that are tried


def widths(frequencies: int) -> list[int]:
    """Of bands to be tried, narrow ones first."""
    found = (part * frequencies // 16 for part in SIXTEENTHS)
    return sorted({width for width in found if width > 1})


def lowest(frequencies: torch.Tensor, width: int) -> torch.Tensor:
    """Which ``width`` of the frequencies ``[F]`` turn least, fastest first."""
    return frequencies.abs().argsort(descending=True, stable=True)[len(frequencies) - width :]


def shared_band(
    q: torch.Tensor,
    k: torch.Tensor,
    moment: torch.Tensor,
    covariance: torch.Tensor,
    frequencies: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries ``[g, R, b, X]`` and shared keys ``[b, X]`` of a band, fastest first.

    Minimises sum_hr E|conj(q_hr) (k_h - M_h k')|^2 with keys' covariance.

    Args:
        q: complex ``[g, R, b, X]``; k: ``[g, b, X]``. moment: ``[X, X]`` of inputs; covariance: the
            same within attention. frequencies: ``[b]``, how fast each turns.
    """
    metrics = torch.einsum("hrjx,hrkx->hjk", through(q, moment), q.conj())
    shared, mixes = shared_subspace(k, covariance, metrics)
    roots = matrix_roots(metrics)[0] @ mixes  # [g, b, b], columns over g b orthogonal
    speeds = frequencies.abs().to(roots.real.dtype)[:, None]
    turning = torch.einsum("hji,hjk->ik", roots.conj(), speeds * roots)
    basis = torch.linalg.eigh(turning + turning.mH)[1].flip(-1)  # fastest first
    shared, mixes = basis.mH @ shared, mixes @ basis
    return torch.einsum("hrjx,hji->hrix", q, mixes.conj()), shared
