"""Attention on CPUs for training: PyTorch's forward pass, and a backward pass of products.

PyTorch's fused backward pass for CPUs takes some 7 times as long as its forward pass in bfloat16
(benchmarks/LOG.md, "Gradients of attention"). The same gradients come out of five matrix products
for some queries at a time (FlashAttention-2, arXiv 2307.08691, algorithm 2, without its tiles).
With P = exp(S - L), L the rows' log-sum-exp:

    dV = P^T dO,   dS = P (dO V^T - D),  D = rowsum(dO O),   dQ = dS K,   dK = dS^T Q

S - L and dO V^T - D are products themselves, of rows with two more numbers beside ones: so they
are subtracted before they are rounded to bfloat16, and where a weight is large S - L is small.
"""

from math import frexp
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

_SCORES = 2**23  # at most, of some queries at a time
_QUERIES = 256  # at most: of later keys, which queries do not see, nothing is computed
_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def can_train(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether :func:`trained` takes these and is of use: in float32 it is not faster."""
    if q.device.type != "cpu" or q.dtype != torch.bfloat16 or q.shape[3] != v.shape[3]:
        return False
    gradients = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    return gradients and q.shape[2] > 1 and not torch.compiler.is_compiling()


def trained(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    seen: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention with gradients.

    Args:
        q: ``[B, Hq, T, D]``; k, v: ``[B, Hkv, S, D]``, all of one dtype. scale: above 0.
        seen: bool ``[B or 1, 1 or Hq, T, S]``, the keys that each query sees, one at least; the
            first t + 1 of as many keys as queries by default.

    Returns:
        ``[B, Hq, T, D]`` in q's dtype.
    """
    out: torch.Tensor = _Trained.apply(q, k, v, scale, seen)[0]  # type: ignore[no-untyped-call]
    return out


class _Trained(torch.autograd.Function):
    @staticmethod
    def forward(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale: float,
        seen: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        mask = None
        if seen is not None:
            mask = q.new_zeros(seen.shape).masked_fill_(~seen, -torch.inf)
        out, lse = _forward(q, k, v, is_causal=seen is None, attn_mask=mask, scale=scale)
        return out, lse

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        q, k, v, ctx.scale, seen = inputs
        out, lse = output
        ctx.save_for_backward(q, k, v, seen, out, lse)
        ctx.mark_non_differentiable(lse)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
        q, k, v, seen, out, lse = ctx.saved_tensors
        return *_gradients(q, k, v, seen, out, lse, ctx.scale, grad), None, None


def _gradients(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seen: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    grad: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, kv_heads, keys, dim = k.shape
    heads, tokens = q.shape[1:3]
    rows = batch * kv_heads  # of products, each with the queries of all heads of a group
    # The scale is m 2^e: queries times 2^e are exact, m is multiplied with the products.
    mantissa, exponent = frexp(scale)
    wide_q = _minus(q * 2.0**exponent, lse / mantissa).unflatten(1, (kv_heads, -1))
    wide_grad = _minus(grad, (grad.float() * out.float()).sum(-1)).unflatten(1, (kv_heads, -1))
    flat_k = k.reshape(rows, keys, dim)
    wide_k, wide_v = (pad(x.reshape(rows, keys, dim), (0, 2), value=1.0) for x in (k, v))
    grad_q = torch.empty_like(wide_q[..., :dim])
    grad_k, grad_v = (k.new_zeros(rows, keys, dim, dtype=torch.float32) for _ in range(2))
    step = min(_QUERIES, max(1, _SCORES // (batch * heads * keys)))
    for start in range(0, tokens, step):
        end = min(tokens, start + step)
        here, until = slice(start, end), keys if seen is not None else end
        some_q, some_grad = (
            x[:, :, :, here].reshape(rows, -1, dim + 2) for x in (wide_q, wide_grad)
        )
        weights = torch.bmm(some_q, wide_k[:, :until].mT).mul_(mantissa).exp_()
        by_head = weights.view(batch, heads, end - start, until)
        if seen is None:
            later = k.new_ones(end - start, end - start, dtype=torch.bool).triu_(1)
            by_head[..., start:].masked_fill_(later, 0.0)
        else:
            by_head.masked_fill_(~seen[:, :, here], 0.0)
        grad_v[:, :until] += torch.bmm(weights.mT, some_grad[..., :dim])
        grad_scores = torch.bmm(some_grad, wide_v[:, :until].mT).mul_(weights)
        product = torch.bmm(grad_scores, flat_k[:, :until])
        grad_q[:, :, :, here] = product.view(batch, kv_heads, -1, end - start, dim)
        grad_k[:, :until] += torch.bmm(grad_scores.mT, some_q[..., :dim])
    return (
        (grad_q * scale).view(q.shape),
        (grad_k * mantissa).to(k.dtype).view(k.shape),
        grad_v.to(v.dtype).view(v.shape),
    )


def _minus(x: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
    """``[…, D + 2]``: rows whose products with rows that end in ones are less by the number."""
    high = -number.to(x.dtype)
    low = (-number - high).to(x.dtype)
    return torch.cat([x, high[..., None], low[..., None]], -1)
