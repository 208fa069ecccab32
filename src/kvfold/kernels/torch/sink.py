"""Sink logits for kernels that know only keys and values."""

import torch
from torch.nn.functional import pad

LEAST_SCALE = 2**-8  # logits are divided by the scale, and may then be large for float16
_LARGEST = float(torch.finfo(torch.float16).max)


def with_sink(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    causal: bool,
    scale: float,
    logits: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Inputs of plain attention with a first key that everyone sees, whose value is zero.

    Its score must be its head's logit for every query: queries get two more numbers, the logit
    over the scale and what rounding it left, and of all keys only the first has ones there.

    Args:
        mask: boolean or additive ``[..., T, S or 1]``. causal: aligned at the first key; queries
            then get a first one too, to be dropped from the output.
        scale: of the scores, not below ``LEAST_SCALE``. logits: ``[Hq]``.

    Returns:
        q ``[B, Hq, T or 1 + T, D + 2]``; k, v ``[B, Hkv, 1 + S, D + 2]`` or wider, if values are;
        the mask.
    """
    wanted = logits.to(torch.promote_types(q.dtype, torch.float32)) / scale
    wanted = wanted.clamp(-_LARGEST, _LARGEST)  # -inf is no sink, but 0 times it would be NaN
    high = wanted.to(q.dtype)
    low = (wanted - high).to(q.dtype)
    marks = torch.stack([high, low], -1)[:, None].expand(*q.shape[:3], 2)
    first = torch.ones(2, dtype=k.dtype, device=k.device).expand(*k.shape[:2], 1, 2)
    dim = k.shape[3]
    q = torch.cat([q, marks], -1)
    k = torch.cat([pad(first, (dim, 0)), pad(k, (0, 2))], 2)
    keys, width = k.shape[2], max(dim + 2, v.shape[3])
    v = pad(v, (0, width - v.shape[3], 1, 0))
    q, k = (pad(x, (0, width - dim - 2)) for x in (q, k))
    if causal:
        q = pad(q, (0, 0, 1, 0))
    if mask is not None:
        mask = mask.expand(*mask.shape[:-1], keys - 1)
        mask = pad(mask, (1, 0), value=True if mask.dtype == torch.bool else 0.0)
    return q, k, v, mask
