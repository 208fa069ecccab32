"""``attention``: check the arguments, choose how to compute it, and be able to say why."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Unpack

import torch

from kvfold.errors import InputError
from kvfold.kernels.backend import GPU_MAX_DIM, backend_of
from kvfold.kernels.cpu.library import library, why_missing
from kvfold.kernels.cpu.limits import MAX_DIM, MAX_TOKENS
from kvfold.kernels.rows import attend_rows
from kvfold.kernels.torch.flex import flex
from kvfold.kernels.torch.sink import LEAST_SCALE, with_sink
from kvfold.ops.kinds import check_flag, check_tensor, is_number
from kvfold.ops.mask import seen_and_bias, used_keys, without_unseen
from kvfold.ops.options import ATTENTION, AttentionOptions, Options, check_options
from kvfold.ops.reference import attend
from kvfold.ops.signatures import with_options
from kvfold.ops.tracing import constant, decided

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# Queries this many times fewer than keys are a decoding step: bound by memory, not arithmetic.
_DECODE_RATIO = 4
_SHAPES = "expected q [B, Hq, T, D], k [B, Hkv, S, D], v [B, Hkv, S, Dv]"


@dataclass(frozen=True)
class Path:
    """How a call is computed.

    Attributes:
        name: ``kernel`` (kvfold's own), ``sdpa`` (PyTorch's scaled_dot_product_attention),
            ``flex`` (PyTorch's FlexAttention) or ``matmul`` (two matrix products per KV head).
        why: the reason, in a sentence.
    """

    name: str
    why: str

    def __str__(self) -> str:
        return f"{self.name}: {self.why}"


class _Call(NamedTuple):
    """The checked arguments of ``attention``."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    options: Options
    dropout: float
    return_lse: bool


@with_options
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    dropout: float = 0.0,
    return_lse: bool = False,
    **options: Unpack[AttentionOptions],
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Grouped-query attention (arXiv 2305.13245) that never repeats or expands K and V.

    Args:
        q: ``[B, Hq, T, D]``; k: ``[B, Hkv, S, D]``; v: ``[B, Hkv, S, Dv]``; one dtype of float32,
            float16, bfloat16 or float64, one device. Hkv divides Hq: query head h reads KV head
            h // (Hq / Hkv).
        options: of attention; see the signature.
        dropout: probability of dropping a weight, for training.
        return_lse: also return the scores' log-sum-exp, sink logits included, for ``merge``; of
            parts that are to be merged only one may be given the sink logits.

    Returns:
        ``[B, Hq, T, Dv]`` in q's dtype; with ``return_lse`` also ``[B, Hq, T]``. A query that
        sees no key gets zeros and -inf (or the sink logit).

    Raises:
        InputError: for shapes, dtypes, devices or values that do not fit, naming them.

    >>> q, k, v = torch.randn(1, 8, 5, 16), torch.randn(1, 2, 5, 16), torch.randn(1, 2, 5, 16)
    >>> attention(q, k, v).shape
    torch.Size([1, 8, 5, 16])
    """
    return _run(_checked(q, k, v, dropout, return_lse, options))


def attention_of(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: Options, return_lse: bool
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """``attention`` with options that are checked already."""
    return _run(_Call(q, k, v, options, 0.0, return_lse))


def _run(call: _Call) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    path = _choose(call).name
    if path == "kernel":
        return _kernel(call)
    if path == "flex":
        return _flex(call)
    if path == "sdpa":
        return _sdpa(call)
    return _matmul(call)


@with_options
def explain(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    dropout: float = 0.0,
    return_lse: bool = False,
    **options: Unpack[AttentionOptions],
) -> Path:
    """Say how ``attention`` would compute this call, and why; takes the same arguments.

    Args:
        q, k, v, dropout, return_lse: as ``attention`` takes them.
        options: of attention; see the signature.

    >>> x = torch.randn(1, 2, 64, 16, requires_grad=True)
    >>> print(explain(x, x, x))
    sdpa: gradients are needed, and PyTorch's kernels have them
    """
    unknown = set(options) - set(ATTENTION.options)
    if unknown:
        raise InputError(f"attention has no option {sorted(unknown)[0]!r}")
    return _choose(_checked(q, k, v, dropout, return_lse, options))


def _checked(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout: float,
    return_lse: bool,
    given: Mapping[str, Any],
) -> _Call:
    if not torch.compiler.is_compiling():
        for name, x in (("q", q), ("k", k), ("v", v)):
            if x is None:
                raise InputError(f"{name}=None: expected a tensor", _SHAPES)
            check_tensor(name, x)
        check_flag("return_lse", return_lse)
        if not is_number(dropout):
            raise InputError(f"dropout={dropout!r:.60}: expected a number, 0 <= dropout < 1")
    shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    if not q.dim() == k.dim() == v.dim() == 4:
        raise InputError(f"expected [B, heads, tokens, dim] tensors, got {shapes}")
    if not q.dtype == k.dtype == v.dtype or q.dtype not in _DTYPES:
        raise InputError(
            f"q, k and v are {q.dtype}, {k.dtype} and {v.dtype}",
            "they must share one dtype: float32, float16, bfloat16 or float64",
        )
    if not q.device == k.device == v.device:
        raise InputError(f"q, k and v are on {q.device}, {k.device} and {v.device}")
    if q.shape[0] != k.shape[0] or k.shape[:3] != v.shape[:3] or q.shape[3] != k.shape[3]:
        raise InputError(f"shapes do not fit: {shapes}", _SHAPES)
    if k.shape[1] < 1 or q.shape[1] % k.shape[1]:
        raise InputError(
            f"{q.shape[1]} query heads cannot share {k.shape[1]} KV heads evenly: {shapes}"
        )
    if q.shape[3] < 1 or v.shape[3] < 1:
        raise InputError(f"heads of no dimensions: {shapes}", _SHAPES)
    shape = q.shape[0], q.shape[1], q.shape[2], k.shape[2]
    checked = check_options(shape, given)
    for name, x in checked.tensors().items():
        if x.device != q.device:
            raise InputError(f"{name} is on {x.device}, q, k and v on {q.device}")
    if not 0 <= dropout < 1:
        raise InputError(f"dropout={dropout}: expected 0 <= dropout < 1")
    return _Call(q, k, v, checked, dropout, return_lse)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _missing() -> str:
    """Why there are no kernels, or nothing; torch.compile takes it as it is."""
    return "" if library() is not None else why_missing()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _backend(device: torch.device) -> str:
    return backend_of(device)


def _on_gpu(call: _Call) -> Path | None:
    """Whether the Triton kernel does it."""
    q, keys = call.q, call.k.shape[2]
    few = q.shape[2] <= MAX_TOKENS and q.shape[2] * _DECODE_RATIO <= keys
    fits = max(q.shape[3], call.v.shape[3]) <= GPU_MAX_DIM and q.dtype is not torch.float64
    if few and fits:
        return Path("kernel", "few queries on the GPU: each key and value is read once (Triton)")
    return None


def _suits_flex(call: _Call) -> bool:
    """Many queries on a GPU, and scores that PyTorch's fused kernels cannot have."""
    if not call.q.is_cuda:
        return False
    sight, scoring = call.options
    sided = sight.left is not None or sight.right not in (None, 0)
    bent = sided or any(x is not None for x in scoring._replace(scale=None))
    sizes = call.q.shape[0], call.q.shape[2], call.k.shape[2]
    free = sight.mask is None and not call.dropout and 0 not in sizes
    return bent and free and call.q.dtype is not torch.float64


def _needs_wide_bias(call: _Call) -> bool:
    """Whether a bias has digits that q's dtype lacks; on CPUs PyTorch's kernels keep them."""
    q, mask = call.q, call.options.visibility.mask
    wide = mask is not None and mask.is_floating_point() and mask.dtype != q.dtype
    halves = q.dtype in (torch.float16, torch.bfloat16)
    return halves and (wide or call.options.scoring.alibi_slopes is not None)


def _choose(call: _Call) -> Path:
    q, k, scoring = call.q, call.k, call.options.scoring
    gradients = torch.is_grad_enabled() and any(
        x.requires_grad for x in (q, k, call.v, *call.options.tensors().values())
    )
    plain = scoring.softcap is None and not call.return_lse
    if not gradients and not call.dropout and _backend(q.device) == "triton":
        path = _on_gpu(call)
        if path is not None:
            return path
    elif not gradients and not call.dropout and q.device.type == "cpu":
        decoding = q.shape[2] <= MAX_TOKENS and q.shape[2] * _DECODE_RATIO <= k.shape[2]
        fits = q.dtype is not torch.float64 and max(q.shape[3], call.v.shape[3]) <= MAX_DIM
        if decoding and fits and not _missing():
            return Path("kernel", "few queries on the CPU: each key and value is read once")
        if decoding and fits:
            return Path("matmul", f"the CPU kernels are missing ({_missing()})")
        if decoding:
            return Path("matmul", "few queries, of a dtype or head size without a kernel")
    if _suits_flex(call):
        return Path("flex", "a window, softcap or bias on a GPU: FlexAttention skips and fuses")
    if q.is_cuda and _needs_wide_bias(call):
        return Path("matmul", "a bias of more digits than q has, which PyTorch's kernels round off")
    if not plain:
        return Path("matmul", "PyTorch's kernels have no softcap and return no log-sum-exp")
    if 0 in (q.shape[0], q.shape[2], k.shape[2]):
        return Path("matmul", "there is nothing to compute")
    scale = 1 if scoring.scale is None else scoring.scale
    if scoring.sink_logits is not None and abs(scale) < LEAST_SCALE:
        return Path("matmul", "scores are scaled so small that sink logits would overflow")
    if call.dropout and q.shape[1] != k.shape[1]:
        return Path("matmul", "with dropout, PyTorch's kernels would repeat keys and values")
    if gradients or call.dropout:
        return Path("sdpa", "gradients are needed, and PyTorch's kernels have them")
    return Path("sdpa", "many queries: bound by arithmetic, where PyTorch's kernels are best")


def _seen_rows(call: _Call, seen: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values, with zeros where the options hide them from every query."""
    o = call.options.visibility
    all_used = o.left is None and o.start is None and o.lengths is None and o.mask is None
    if seen is None or all_used:
        return call.k, call.v
    return without_unseen(call.k, seen), without_unseen(call.v, seen)


def _matmul(call: _Call) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    seen, bias = seen_and_bias(call.q, call.k.shape[2], call.options)
    k, v = _seen_rows(call, seen)
    scoring, dropout = call.options.scoring, call.dropout
    found = attend(call.q, k, v, scoring=scoring, seen=seen, bias=bias, dropout=dropout)
    return (found.out, found.lse) if call.return_lse else found.out


def _sdpa(call: _Call) -> torch.Tensor:
    """PyTorch's kernels; a query that sees nothing gets zeros here too."""
    q, keys, sight, scoring = call.q, call.k.shape[2], *call.options
    square = sight.causal and q.shape[2] == keys and sight.left is None
    padded = sight.start is not None or sight.lengths is not None
    plain = not padded and sight.mask is None and scoring.alibi_slopes is None
    is_causal = decided(square and plain)
    seen, bias = (None, None) if is_causal else seen_and_bias(q, keys, call.options)
    k, v = _seen_rows(call, seen)
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


def _flex(call: _Call) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    o, (k, v) = call.options.visibility, (call.k, call.v)
    if o.left is not None or o.start is not None or o.lengths is not None:
        used = used_keys(call.q.shape[2], k.shape[2], o, k.device)
        k, v = without_unseen(k, used), without_unseen(v, used)
    found = flex(call.q, k, v, call.options)
    return found if call.return_lse else found[0]


def _kernel(call: _Call) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    out, lse = attend_rows(call.q, call.k, call.v, *call.options.flat())
    return (out, lse) if call.return_lse else out
