"""Norms of queries and keys: where their weights go when heads are folded.

A normalised key is k = w ∘ (W x) / r(x), r(x)^2 the mean of (W_i x)^2 over the rows of its head
(Qwen3, Gemma 3), or of all heads (OLMo 2). Up to one factor of a token that is P x, P = diag(w) W,
which is folded as plain keys are. Every split of the folded P into w and W gives the same
direction of keys; what it decides is r, and the source's is kept best by the u = 1 / w^2 >= 0
that bring the quadratic forms of r^2 together,

    min_u  sum_h | S^1/2 (sum_l W_hl^T W_hl / m - sum_i u_i P_hi^T P_hi / n) S^1/2 |_F^2,

S being the second moment of inputs, h what is normalised at once: every head, with weights that
all have in common, or all of them, with their own. Heads that were copies of one another come out
exactly.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from kvfold.arch.family import QKNorm
from kvfold.fold.subspace import energy, through

_RIDGE = 1e-12
_ROUNDS = 500
_LEAST = 0.25  # of a row's share of a norm, where the source has none that is smaller
_TINY = 1e-300


@dataclass
class NormWeights:
    """The multipliers ``[D]`` of RMS norms on queries and keys (QK-norm)."""

    q: torch.Tensor
    k: torch.Tensor

    @classmethod
    def load(
        cls, spec: QKNorm | None, prefix: str, load: Callable[[str], torch.Tensor]
    ) -> "NormWeights | None":
        """Those of a layer, if it has any."""
        if spec is None:
            return None
        q, k = (load(f"{prefix}.{name}").double() + spec.offset for name in (spec.q, spec.k))
        return cls(q, k)


@dataclass
class WideRows:
    """The source's rows before norms over all heads, whose weights its heads then hold.

    Attributes:
        q: ``[Hkv, R, D, X]``; k: ``[Hkv, D, X]``.
    """

    q: torch.Tensor
    k: torch.Tensor

    def split(
        self, q: torch.Tensor, k: torch.Tensor, groups: list[list[int]], moment: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Rows before norms, and the norms' weights, that make folded heads (``fold.norms``).

        Args:
            q: ``[Hq, D, X]``; k: ``[n, D, X]``; groups: the source's heads that each of them is.

        Returns:
            such rows of q and k, and weights ``[Hq, D]`` and ``[n, D]``.
        """
        norms = [
            norm_of(heads.flatten(0, 1)[None], rows.flatten(0, -2)[None], moment)
            for heads, rows in ((q, self.q), (k, self.k))
        ]
        q_norm, k_norm = (norm.unflatten(0, (-1, q.shape[1])) for norm in norms)
        return q / q_norm[..., None], k / k_norm[..., None], q_norm, k_norm


@dataclass
class NormedRows:
    """The same before norms of every head alone, whose weights all have in common.

    Attributes:
        q: ``[Hkv, R, D, X]``; k: ``[Hkv, D, X]``, of the mean square one, once they are divided by
            their sizes. q_size: ``[Hkv, R]``; k_size: ``[Hkv]``.
    """

    q: torch.Tensor
    k: torch.Tensor
    q_size: torch.Tensor
    k_size: torch.Tensor

    @classmethod
    def of(cls, q: torch.Tensor, k: torch.Tensor, moment: torch.Tensor) -> "NormedRows":
        sizes = [(energy(x, moment) / x.shape[-2]).sqrt().clamp_min(_TINY) for x in (q, k)]
        return cls(q / sizes[0][..., None, None], k / sizes[1][..., None, None], *sizes)

    def split(
        self, q: torch.Tensor, k: torch.Tensor, groups: list[list[int]], moment: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """As :meth:`WideRows.split`, with weights ``[D]``."""
        order = [head for group in groups for head in group]
        shared = self.k[order].unflatten(0, (len(groups), -1)).flatten(1, 2)
        q_norm = norm_of(q, self.q[order].flatten(0, 1), moment)
        k_norm = norm_of(k, shared, moment)
        # Sizes mean nothing to a norm, but for its epsilon.
        k_size = self.k_size[order].unflatten(0, (len(groups), -1)).square().mean(1).sqrt()
        q = q * (self.q_size[order].flatten()[:, None] / q_norm)[..., None]
        return q, k * (k_size[:, None] / k_norm)[..., None], q_norm, k_norm


def norm_of(products: torch.Tensor, rows: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
    """Weights ``[n]`` of norms behind which rows make ``products`` ``[N, n, X]``.

    Args:
        rows: ``[N, m, X]``, what the N norms saw in the source.
        moment: ``[X, X]`` or ``[X]``, E[x~ x~ᵀ].

    >>> import torch
    >>> rows = torch.randn(2, 6, 9, dtype=torch.float64)
    >>> w = torch.rand(6, dtype=torch.float64) + 0.5
    >>> torch.allclose(norm_of(w[:, None] * rows, rows, torch.ones(9, dtype=torch.float64)), w)
    True
    """
    alive = (through(products, moment) * products).sum((0, 2)) > 0
    u = torch.ones(len(alive), dtype=products.dtype, device=products.device)
    if alive.any():
        # A norm's mean is over rows of zeros as well.
        u[alive] = _shares(products[:, alive], rows, moment) * (len(alive) / alive.sum())
    return u.rsqrt()


def _shares(products: torch.Tensor, rows: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
    """u of the problem above, all of it positive."""
    seen = through(products, moment)
    own = (through(rows, moment) * rows).sum(-1).mean(0)
    mean = own.mean()
    # In units of what gives every row the same share, so that all are near one.
    unit = mean / (seen * products).sum(-1).mean(0)
    gram = (seen @ products.mT).square().sum(0) * unit * unit[:, None] / products.shape[1]
    wanted = (seen @ rows.mT).square().sum((0, 2)) * unit / rows.shape[1]
    ridge = _RIDGE * gram.diagonal().mean()
    system = gram + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    found: torch.Tensor = torch.linalg.solve(system, wanted + ridge)
    # A row that hardly counts would have a giant weight, which nothing can be fitted behind.
    least = (own.min() / mean).clamp(_TINY, _LEAST)
    if not bool((found >= least * (1 - 1e-6)).all()):
        found = torch.ones_like(unit)
        for _ in range(_ROUNDS):  # Lee and Seung's updates, which keep what is positive positive
            found = (found * wanted / (gram @ found).clamp_min(_TINY)).clamp_min(least)
    return found * unit
