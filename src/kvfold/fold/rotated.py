"""RoRoPE and FreqFold (Meng et al., arXiv 2502.07864): a layer's keys, parted for latent attention.

For each frequency, the keys of all heads are rotated into their principal components, both halves
of the pairs by the same rotation, which commutes with the rotary embedding; the first component
keeps that, the others lose it. Neighbouring frequencies are rotated together, as if they were one.
"""

from dataclasses import dataclass

import torch

from kvfold.fold.heads import HeadGroup
from kvfold.fold.latents import LatentSizes, SharedLatent
from kvfold.fold.subspace import through

# Neighbouring frequencies that are rotated together. The authors try 1, 2, 4 ... and take the best
# perplexity; the conversions that they and CARE's authors publish use 4.
FREQ_FOLD = 4
_DAMP = 0.01  # of the mean energy, added to all directions' as in the authors' code


@dataclass
class RotatedKeys:
    """A layer's keys in the coordinates that RoRoPE finds.

    Attributes:
        rope: ``[2 F', X]``, the rotary key. still: ``[K, X]``, all else, position-free.
        q_rope: ``[Hkv, R, 2 F', X]``. up: ``[Hkv, D, K]``, how keys are read out of ``still``.
    """

    rope: torch.Tensor
    still: torch.Tensor
    q_rope: torch.Tensor
    up: torch.Tensor

    def with_latent(
        self, group: HeadGroup, down: torch.Tensor, up_k: torch.Tensor, up_v: torch.Tensor
    ) -> SharedLatent:
        """Put together.

        Args:
            down: ``[n, X]``. up_k: ``[Hkv, D, n]``. up_v: ``[Hkv, Dv, n]``.
        """
        times = group.q.shape[1]

        def per_query_head(up: torch.Tensor) -> torch.Tensor:
            up = torch.cat([up, torch.zeros_like(up[..., :1])], -1)
            return up.repeat_interleave(times, 0)

        q_pairs, q_rest = group.pairs.split(group.q)
        return SharedLatent(
            q_rope=self.q_rope.flatten(0, 1),
            k_rope=self.rope,
            q_nope=torch.cat([q_pairs.real, q_pairs.imag, q_rest], -2).flatten(0, 1),
            down=down,
            up_k=per_query_head(up_k),
            up_v=per_query_head(up_v),
            o=group.o.flatten(0, 1),
        )

    def balance(self, group: HeadGroup) -> torch.Tensor:
        """How much larger what is position-free of the keys is than the values, on average."""
        rounding = 1e-4 * _typical(group.k.flatten(0, 1), group.moment)  # nothing is left of keys
        still = torch.maximum(_typical(self.still, group.moment), rounding)
        return still / _typical(group.v.flatten(0, 1), group.moment)


def rotated_keys(group: HeadGroup, sizes: LatentSizes) -> RotatedKeys:
    """Rotate keys block by block of neighbouring frequencies, and part them."""
    kept = list(sizes.frequencies)
    q, _ = group.pairs.split(group.q)
    k, k_rest = group.pairs.split(group.k)
    heads, frequencies = k.shape[:2]
    count = heads * frequencies
    rows = k.transpose(0, 1).flatten(0, 1)  # [F Hkv, X], frequency by frequency
    turn = torch.zeros(count, count, dtype=rows.real.dtype, device=rows.device)
    first: dict[int, int] = {}  # of a kept frequency: the component that keeps it
    for block in _blocks(frequencies, kept):
        span = slice(block[0] * heads, (block[-1] + 1) * heads)
        part = rows[span]
        gram = (through(part, group.moment) @ part.mH).real
        turn[span, span] = principal(gram)
        first |= {j: span.start + n for n, j in enumerate(j for j in block if j in kept)}
    components = turn.mT.to(rows.dtype) @ rows
    chosen = [first[j] for j in kept]
    others = [c for c in range(count) if c not in chosen]
    # k of (j, h) = sum_c turn[(j, h), c] component_c; of a real rotation both halves are alike.
    reads = turn.unflatten(0, (frequencies, heads)).transpose(0, 1)  # [Hkv, F, F Hkv]
    q_rope = torch.einsum("hrjx,hjc->hrcx", q, reads[..., chosen].to(q.dtype))
    still = components[others]
    return RotatedKeys(
        rope=torch.cat([components[chosen].real, components[chosen].imag]),
        still=torch.cat([still.real, still.imag, k_rest.flatten(0, 1)]),
        q_rope=torch.cat([q_rope.real, q_rope.imag], -2),
        up=_readers(reads[..., others], k_rest),
    )


def _readers(reads: torch.Tensor, k_rest: torch.Tensor) -> torch.Tensor:
    """``[Hkv, D, K]``: halves of pairs are read alike, what has no rotary as it is."""
    heads, rest = k_rest.shape[:2]
    own = torch.eye(heads * rest, dtype=reads.dtype, device=reads.device)
    alone = own.unflatten(0, (heads, rest))
    return torch.stack([torch.block_diag(reads[h], reads[h], alone[h]) for h in range(heads)])


def _blocks(frequencies: int, kept: list[int]) -> list[range]:
    """Neighbours that are rotated together: at least so many that each block keeps one."""
    stride = kept[1] - kept[0] if len(kept) > 1 else frequencies
    size = max(FREQ_FOLD, stride)
    return [range(j, min(j + size, frequencies)) for j in range(0, frequencies, size)]


def principal(gram: torch.Tensor) -> torch.Tensor:
    """Eigenvectors ``[d, d]`` of a damped Gram matrix, those of the largest energy first."""
    damp = _DAMP * gram.diagonal().mean()
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return torch.linalg.eigh((gram + gram.mT) / 2 + damp * eye).eigenvectors.flip(-1)


def _typical(rows: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
    """The mean over rows ``[d, X]`` of the root of their energy."""
    return (through(rows, moment) * rows).sum(-1).clamp_min(0).sqrt().mean().clamp_min(1e-300)
