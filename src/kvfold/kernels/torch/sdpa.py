"""PyTorch's scaled_dot_product_attention."""

import torch

from kvfold.kernels.backend import Backend, Call, Found
from kvfold.kernels.torch.plain import Plain, plain, seen_rows
from kvfold.kernels.torch.sink import LEAST_SCALE, with_sink
from kvfold.kernels.torch.trained import can_train, trained
from kvfold.ops.mask import seen_and_bias
from kvfold.ops.options import Visibility
from kvfold.ops.tracing import constant, decided


class Sdpa(Backend):
    """Many queries, or gradients: PyTorch's fused kernels."""

    name = path = "sdpa"
    knows = frozenset({*Visibility._fields, "scale", "alibi_slopes", "sink_logits"})

    def why_not(self, call: Call) -> str | None:
        q, scoring = call.q, call.options.scoring
        if q.is_cuda and _needs_wide_bias(call):
            return "a bias of more digits than q has, which PyTorch's kernels round off"
        if scoring.softcap is not None or call.return_lse:
            return "PyTorch's kernels have no softcap and return no log-sum-exp"
        if 0 in (q.shape[0], q.shape[2], call.keys):
            return "there is nothing to compute"
        scale = 1 if scoring.scale is None else scoring.scale
        if scoring.sink_logits is not None and abs(scale) < LEAST_SCALE:
            return "scores are scaled so small that sink logits would overflow"
        if call.dropout and q.shape[1] != call.num_kv_heads:
            return "with dropout, PyTorch's kernels would repeat keys and values"
        return None

    def why(self, call: Call) -> str:
        if call.gradients or call.dropout:
            return "gradients are needed, and PyTorch's kernels have them"
        return "many queries, which PyTorch's kernels multiply"

    def attend(self, call: Call) -> Found:
        return _sdpa(plain(call)), None


def _needs_wide_bias(call: Call) -> bool:
    """Whether a bias has digits that q's dtype lacks; on CPUs PyTorch's kernels keep them."""
    q, mask = call.q, call.options.visibility.mask
    wide = mask is not None and mask.is_floating_point() and mask.dtype != q.dtype
    halves = q.dtype in (torch.float16, torch.bfloat16)
    return halves and (wide or call.options.scoring.alibi_slopes is not None)


def _sdpa(call: Plain) -> torch.Tensor:
    """PyTorch's kernels; a query that sees nothing gets zeros here too."""
    q, keys, sight, scoring = call.q, call.k.shape[2], *call.options
    square = sight.causal and q.shape[2] == keys and sight.left is None
    padded = sight.start is not None or sight.lengths is not None
    plain = not padded and sight.mask is None and scoring.alibi_slopes is None
    is_causal = decided(square and plain)
    seen, bias = (None, None) if is_causal else seen_and_bias(q, keys, call.options)
    k, v = seen_rows(call, seen)
    mask, nothing = bias, None
    if seen is not None:
        # A softmax over nothing is NaN, and so are its gradients: such queries see everything, and
        # what they get is thrown away.
        nothing = ~seen.any(-1, keepdim=True)
        shown = seen | nothing
        mask = shown if bias is None else bias.masked_fill(~shown, -torch.inf)
    scale = constant(q.shape[3] ** -0.5) if scoring.scale is None else scoring.scale
    v_head_dim = v.shape[3]
    if scoring.sink_logits is not None:
        q, k, v, mask = with_sink(q, k, v, mask, is_causal, scale, scoring.sink_logits)
    elif q.shape[1] != k.shape[1] and v_head_dim != q.shape[3]:
        # Of uneven heads PyTorch's only kernel repeats keys and values; zeros change nothing.
        width = max(v_head_dim, q.shape[3])
        q, k, v = (torch.nn.functional.pad(x, (0, width - x.shape[3])) for x in (q, k, v))
    plainly = (mask is None and is_causal) or (mask is not None and mask.dtype == torch.bool)
    if plainly and not call.dropout and scale > 0 and can_train(q, k, v):
        out = trained(q, k, v, scale, mask)
    else:
        out = torch.nn.functional.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=call.dropout,
            is_causal=is_causal,
            scale=scale,
            enable_gqa=decided(q.shape[1] != k.shape[1]),
        )
    out = out[..., :v_head_dim]
    if is_causal and scoring.sink_logits is not None:
        out = out[:, :, 1:]
    return out if nothing is None else out.masked_fill(nothing, 0.0)
