"""Attention in a few lines, in whatever precision its inputs have. Keys are never repeated."""

from dataclasses import dataclass

import torch

from kvfold.errors import InputError
from kvfold.ops.mask import split_hidden
from kvfold.ops.options import Scoring

PLAIN = Scoring()


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
    scoring: Scoring = PLAIN,
    seen: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    dropout: float = 0.0,
    need_weights: bool = False,
) -> Attended:
    """softmax(softcap(q k^T scale) + bias) v, query heads grouped by the KV head they share.

    Args:
        q: ``[B, Hq, T, D]``; k: ``[B, Hkv, S, D]``; v: ``[B, Hkv, S, Dv]``.
        seen: boolean, broadcastable to ``[B, Hq, T, S]``. A query that sees nothing gets zeros
            and a log-sum-exp of -inf.
        bias: added to the scores, broadcastable likewise; of ALiBi's slopes too, which are not
            read here (see ``ops.mask.seen_and_bias``).
        dropout: probability of dropping a weight.
    """
    heads, kv_heads = q.shape[1], k.shape[1]
    scale = q.shape[-1] ** -0.5 if scoring.scale is None else scoring.scale
    grouped = q.unflatten(1, (kv_heads, heads // kv_heads))
    if q.dtype in (torch.float16, torch.bfloat16):
        # Scores of halves overflow, or are too coarse for a softmax.
        grouped, k = grouped.float(), k.float()
    # [B, Hkv, R T, D] @ [B, Hkv, D, S]: one product per KV head, whatever R
    scores = ((grouped * scale).flatten(2, 3) @ k.mT).unflatten(2, grouped.shape[2:4])
    scores = scores.flatten(1, 2)
    softcap, sink_logits = scoring.softcap, scoring.sink_logits
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    seen, bias = split_hidden(seen, bias)
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    nothing = None
    if seen is not None:
        # Rows without keys get finite scores and no weights: there is nothing to differentiate.
        nothing = ~seen.any(-1, keepdim=True)
        scores = scores.masked_fill(~seen, -torch.inf).masked_fill(nothing, 0.0)
    lse = torch.logsumexp(scores, -1)
    if nothing is not None:
        lse = lse.masked_fill(nothing[..., 0], -torch.inf)
    if sink_logits is not None:
        lse = torch.logaddexp(lse, sink_logits.to(lse.dtype)[:, None])
    weights = torch.exp(scores - torch.where(lse.isneginf(), 0.0, lse)[..., None])
    if nothing is not None:
        weights = weights.masked_fill(nothing, 0.0)
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

    Raises:
        InputError: if there are no parts, or they do not belong together.

    >>> q, k, v = torch.randn(1, 2, 1, 8), torch.randn(1, 1, 6, 8), torch.randn(1, 1, 6, 8)
    >>> halves = [attend(q, k[:, :, i], v[:, :, i]) for i in (slice(0, 2), slice(2, 6))]
    >>> out, lse = merge([(h.out, h.lse) for h in halves])
    >>> torch.allclose(out, attend(q, k, v).out, atol=1e-6)
    True
    """
    _check_parts(parts)
    lses = torch.stack([lse for _, lse in parts])
    total = torch.logsumexp(lses, 0)
    shares = torch.exp(lses - torch.where(total.isneginf(), 0.0, total))
    first = parts[0][0]
    out = first.to(shares.dtype) * shares[0, ..., None]
    for (part, _), share in zip(parts[1:], shares[1:], strict=True):
        out = out + part.to(share.dtype) * share[..., None]
    return out.to(first.dtype), total


def _check_parts(parts: object) -> None:
    expected = "expected pairs of an output [..., Dv] and its log-sum-exp [...]"
    if not isinstance(parts, list | tuple) or not parts:
        given = "no parts" if isinstance(parts, list | tuple) else f"{type(parts).__name__}"
        raise InputError(f"merge was given {given}: {expected}", "give a list of at least one")
    for part in parts:
        pair = isinstance(part, list | tuple) and len(part) == 2
        if not pair or not all(isinstance(x, torch.Tensor) for x in part):
            raise InputError(f"merge was given {type(part).__name__} as a part: {expected}")
        out, lse = part
        if not (out.is_floating_point() and lse.is_floating_point()):
            raise InputError(f"merge was given {out.dtype} and {lse.dtype}: expected float types")
        if out.dim() < 1 or out.shape[:-1] != lse.shape:
            shapes = f"{list(out.shape)} and {list(lse.shape)}"
            raise InputError(f"merge was given a part of shapes {shapes}: {expected}")
        if out.shape != parts[0][0].shape or out.device != parts[0][0].device:
            kinds = [f"{list(x.shape)} on {x.device}" for x in (parts[0][0], out)]
            raise InputError(f"merge was given outputs of {' and '.join(kinds)}: expected alike")
        if lse.dtype != parts[0][1].dtype or lse.device != out.device:
            kinds = [f"{x.dtype} on {x.device}" for x in (parts[0][1], lse)]
            raise InputError(f"merge was given log-sum-exps of {' and '.join(kinds)}: one kind")
