"""PyTorch's FlexAttention, for what bends or hides scores on a GPU when there are many queries.

It compiles windows, softcaps and biases into one kernel and skips blocks of keys that nobody sees;
its scaled_dot_product_attention would need the whole mask in memory, and has no softcap.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from kvfold.kernels.backend import Backend, Call, Found
from kvfold.kernels.torch.plain import plain
from kvfold.ops.mask import used_keys, without_unseen
from kvfold.ops.options import Options


class Flex(Backend):
    """Many queries on a GPU, and scores that PyTorch's other fused kernels cannot have."""

    name = path = "flex"
    knows = frozenset(
        {
            *("left", "right", "sinks", "start", "lengths"),
            *("scale", "softcap", "alibi_slopes", "sink_logits"),
        }
    )

    def why_not(self, call: Call) -> str | None:
        q, (sight, scoring) = call.q, call.options
        sided = sight.left is not None or sight.right not in (None, 0)
        bent = sided or any(x is not None for x in scoring._replace(scale=None))
        free = (
            sight.mask is None and not call.dropout and 0 not in (q.shape[0], q.shape[2], call.keys)
        )
        if q.is_cuda and bent and free and q.dtype is not torch.float64:
            return None
        return "PyTorch's other kernels do it, or this one cannot"

    def why(self, call: Call) -> str:
        return "a window, softcap or bias on a GPU: FlexAttention skips and fuses"

    def attend(self, call: Call) -> Found:
        q, k, v, options, _ = plain(call)
        sight = options.visibility
        if sight.left is not None or sight.start is not None or sight.lengths is not None:
            used = used_keys(q.shape[2], k.shape[2], sight, k.device)
            k, v = without_unseen(k, used), without_unseen(v, used)
        return flex(q, k, v, options)


def flex(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    options: Options,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``kvfold.attention`` through FlexAttention; output and log-sum-exp (float32).

    Compiled on GPUs; elsewhere it runs unfused, which is for tests only.
    """
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    sight, scoring = options
    start, lengths, slopes = sight.start, sight.lengths, scoring.alibi_slopes
    if slopes is not None:
        slopes = slopes.to(torch.promote_types(slopes.dtype, torch.float32))
    left, right, softcap = sight.left, sight.right, scoring.softcap
    batch, tokens, keys = q.shape[0], q.shape[2], k.shape[2]
    first = torch.zeros(batch, dtype=torch.int32, device=q.device) if start is None else start
    end = torch.full_like(first, keys) if lengths is None else lengths

    def visible(b: Any, h: Any, i: Any, j: Any) -> Any:
        position = end[b] - tokens + i
        seen = (j >= first[b]) & (j < end[b])
        if right is not None:
            seen = seen & (j <= position + right)
        if left is not None:
            seen = seen & ((j >= position - left) | (j < first[b] + sight.sinks))
        return seen

    def bent(score: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        if slopes is not None:
            score = score - slopes[h] * (end[b] - tokens + i - j).abs()
        return score

    padded = start is not None or lengths is not None
    blocks = create_block_mask(visible, batch if padded else None, None, tokens, keys, q.device)
    attend: Any = _compiled() if q.is_cuda else flex_attention
    bends = softcap is not None or slopes is not None
    out, lse = attend(
        q, k, v, score_mod=bent if bends else None, block_mask=blocks, scale=scoring.scale,
        enable_gqa=q.shape[1] != k.shape[1], return_lse=True,
    )  # fmt: skip
    out = torch.where(lse.isneginf()[..., None], 0.0, out)
    if scoring.sink_logits is None:
        return out, lse
    with_sink = torch.logaddexp(lse, scoring.sink_logits.to(lse.dtype)[:, None])
    return out * torch.exp(lse - with_sink)[..., None].to(out.dtype), with_sink


@cache
def _compiled() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    found: Callable[..., Any] = torch.compile(flex_attention)
    return found
