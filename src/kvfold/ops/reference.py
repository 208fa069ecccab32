"""Attention in a few lines, in whatever precision its inputs have. Keys are never repeated."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Attended:
    """Attention's output ``[B, Hq, T, Dv]``, the scores' log-sum-exp ``[B, Hq, T]`` and, if they
    were asked for, the weights ``[B, Hq, T, S]``."""

    out: torch.Tensor
    lse: torch.Tensor
    weights: torch.Tensor | None = None


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    seen: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink_logits: torch.Tensor | None = None,
    dropout: float = 0.0,
    need_weights: bool = False,
) -> Attended:
    """softmax(softcap(q k^T scale) + bias) v, query heads grouped by the KV head they share.

    Args:
        q: ``[B, Hq, T, D]``; k: ``[B, Hkv, S, D]``; v: ``[B, Hkv, S, Dv]``.
        seen: boolean, broadcastable to ``[B, Hq, T, S]``. A query that sees nothing gets zeros
            and a log-sum-exp of -inf.
        bias: added to the scores, broadcastable likewise.
        sink_logits: ``[Hq]``, of a further key that every query sees, whose value is zero.
        dropout: probability of dropping a weight.
    """
    heads, kv_heads = q.shape[1], k.shape[1]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    grouped = q.unflatten(1, (kv_heads, heads // kv_heads))
    if q.dtype in (torch.float16, torch.bfloat16):
        # Scores of halves overflow, or are too coarse for a softmax.
        grouped, k = grouped.float(), k.float()
    # [B, Hkv, R T, D] @ [B, Hkv, D, S]: one product per KV head, whatever R
    scores = ((grouped * scale).flatten(2, 3) @ k.mT).unflatten(2, grouped.shape[2:4])
    scores = scores.flatten(1, 2)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    if seen is not None:
        scores = scores.masked_fill(~seen, -torch.inf)
    lse = torch.logsumexp(scores, -1)
    if sink_logits is not None:
        lse = torch.logaddexp(lse, sink_logits.to(lse.dtype)[:, None])
    weights = torch.exp(scores - torch.where(lse.isneginf(), 0.0, lse)[..., None])
    used = torch.nn.functional.dropout(weights, dropout) if dropout else weights
    by_head = used.to(v.dtype).unflatten(1, (kv_heads, -1)).flatten(2, 3)
    out = (by_head @ v).unflatten(2, grouped.shape[2:4]).flatten(1, 2)
    return Attended(out, lse, weights if need_weights else None)


def merge(parts: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over all keys from attention over some: the split-KV identity.

    Args:
        parts: outputs ``[..., Dv]`` and their log-sum-exps ``[...]``, over disjoint keys.

    Returns:
        the output, in the first part's dtype, and log-sum-exp over all keys.

    >>> q, k, v = torch.randn(1, 2, 1, 8), torch.randn(1, 1, 6, 8), torch.randn(1, 1, 6, 8)
    >>> halves = [attend(q, k[:, :, i], v[:, :, i]) for i in (slice(0, 2), slice(2, 6))]
    >>> out, lse = merge([(h.out, h.lse) for h in halves])
    >>> torch.allclose(out, attend(q, k, v).out, atol=1e-6)
    True
    """
    lses = torch.stack([lse for _, lse in parts])
    total = torch.logsumexp(lses, 0)
    shares = torch.exp(lses - torch.where(total.isneginf(), 0.0, total))
    out = sum(
        (out.to(share.dtype) * share[..., None])
        for (out, _), share in zip(parts, shares, strict=True)
    )
    assert isinstance(out, torch.Tensor)
    return out.to(parts[0][0].dtype), total
