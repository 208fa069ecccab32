"""``attention``: check the arguments, choose how to compute it, and be able to say why."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Unpack

import torch

from kvfold.errors import InputError
from kvfold.kernels.backend import Call, need_gradients
from kvfold.kernels.outside import outside_graphs
from kvfold.kernels.pages import listed
from kvfold.kernels.registry import attend, choose, home_name
from kvfold.kernels.view import KVView, Positions, has_contiguous_rows
from kvfold.ops.kinds import check_flag, check_tensor, is_number
from kvfold.ops.options import (
    ATTENTION,
    Accepted,
    AttentionOptions,
    CacheOptions,
    Options,
    check_options,
    declared,
)
from kvfold.ops.signatures import with_options

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_OF_VIEWS = Accepted("attend_view", declared(CacheOptions))
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
    out, lse = attend(_checked(q, k, v, dropout, return_lse, options))
    return (out, lse) if return_lse else out  # type: ignore[return-value]


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
    call = _checked(q, k, v, dropout, return_lse, options)
    backend, said = choose(call)
    return Path(backend.path, backend.why(call) or said)


@outside_graphs(
    "kvfold.kernels.dispatch.attend_view reads pages through their addresses: leave out"
    " fullgraph=True"
)
@with_options
def attend_view(
    q: torch.Tensor,
    view: KVView,
    lengths: Positions | None = None,
    *,
    return_lse: bool = False,
    out: torch.Tensor | None = None,
    **options: Unpack[CacheOptions],
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """``attention`` over pages that somebody else keeps (``KVView.of_pages``).

    A batch is one call if its sequences have equally many queries, whatever their lengths; a ragged
    one is a call for each number of queries. On CPUs up to 16 queries share one reading of the
    pages. More, as chunks of prompts bring them, are bound by arithmetic: each sequence may well be
    a call of its own, and keys that no query sees (``window``) cost nothing.

    Args:
        q: ``[B, Hq, T, D]``; the last query stands at position ``lengths[b] - 1``.
        lengths: int32 ``[B]`` or a list; by default, where the view ends.
        options: of attention; see the signature.
        return_lse: see ``attention``.
        out: where the output is to go, ``[B, Hq, T, Dv]`` in q's dtype, of any strides with
            contiguous rows; not while gradients are recorded. The CPU kernels write there
            themselves.

    Returns:
        ``[B, Hq, T, Dv]`` in q's dtype, or ``out``, and with ``return_lse`` also ``[B, Hq, T]``.
        Gradients reach q, not the pages.

    Raises:
        InputError: for shapes, dtypes, devices or values that do not fit, naming them.

    >>> k, v = torch.zeros(2, 5, 4, 16, 32)
    >>> view = KVView.of_pages(k, v, torch.tensor([[3, 0]], dtype=torch.int32), [17])
    >>> attend_view(torch.zeros(1, 8, 1, 32), view).shape
    torch.Size([1, 8, 1, 32])
    """
    check_tensor("q", q)
    check_flag("return_lse", return_lse)
    k, v, batch = view.keys, view.values, len(view.table)
    ends = view.end if lengths is None else lengths
    heads = k.data.shape[1]
    if q.dim() != 4 or (q.shape[0], q.shape[3]) != (batch, k.dim) or q.shape[1] % heads:
        given = f"q {list(q.shape)}, {batch} sequences of {heads} KV heads of {k.dim}"
        raise InputError(f"shapes do not fit: {given}", "expected q [B, Hq, T, D]")
    if q.dtype not in _DTYPES[:3] or q.device != k.data.device:
        raise InputError(f"q is {q.dtype} on {q.device}, the pages are on {k.data.device}")
    if len(ends) != batch:
        raise InputError(f"{len(ends)} lengths for {batch} sequences", "give lengths=")
    there = isinstance(ends, torch.Tensor) and ends.is_cuda
    keys = view.most if there else max(listed(ends, batch), default=0)
    checked = check_options((batch, q.shape[1], q.shape[2], keys), options, _OF_VIEWS)
    tensors = _on_one_device(q, checked)
    gradients = need_gradients(q, *tensors)
    if out is not None:
        _check_out(out, q, v.dim, gradients)
    call = Call(
        q, None, [view], ends, checked, heads, v.dim, keys, gradients, home_name(q.device),
        return_lse, out=out,
    )  # fmt: skip
    found, lse = attend(call)
    return (found, lse) if return_lse else found  # type: ignore[return-value]


def _check_out(out: torch.Tensor, q: torch.Tensor, v_head_dim: int, gradients: bool) -> None:
    check_tensor("out", out)
    shape = (*q.shape[:3], v_head_dim)
    if out.shape != shape or out.dtype != q.dtype or out.device != q.device:
        raise InputError(
            f"out is {out.dtype} {list(out.shape)} on {out.device}",
            f"expected {q.dtype} {list(shape)} on {q.device}",
        )
    if not has_contiguous_rows(out) or out.is_neg():
        raise InputError(f"out has strides {list(out.stride())}: rows are not contiguous")
    if gradients:
        raise InputError("out= while gradients are recorded", "use torch.no_grad, or leave it out")


def _on_one_device(q: torch.Tensor, options: Options) -> list[torch.Tensor]:
    """The options' tensors, which must be where q is."""
    tensors = options.tensors()
    for name, x in tensors.items():
        if x.device != q.device:
            raise InputError(f"{name} is on {x.device}, q, k and v on {q.device}")
    return list(tensors.values())


def _checked(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout: float,
    return_lse: bool,
    given: Mapping[str, Any],
) -> Call:
    if not torch.compiler.is_compiling():
        for name, x in (("q", q), ("k", k), ("v", v)):
            if x is None:
                raise InputError(f"{name}=None: expected a tensor", _SHAPES)
            check_tensor(name, x)
        check_flag("return_lse", return_lse)
        if not is_number(dropout):
            raise InputError(f"dropout={dropout!r:.60}: expected a number, 0 <= dropout < 1")
    if not q.dim() == k.dim() == v.dim() == 4:
        raise InputError(f"expected [B, heads, tokens, dim] tensors, got {_shapes(q, k, v)}")
    if not q.dtype == k.dtype == v.dtype or q.dtype not in _DTYPES:
        raise InputError(
            f"q, k and v are {q.dtype}, {k.dtype} and {v.dtype}",
            "they must share one dtype: float32, float16, bfloat16 or float64",
        )
    if not q.device == k.device == v.device:
        raise InputError(f"q, k and v are on {q.device}, {k.device} and {v.device}")
    if q.shape[0] != k.shape[0] or k.shape[:3] != v.shape[:3] or q.shape[3] != k.shape[3]:
        raise InputError(f"shapes do not fit: {_shapes(q, k, v)}", _SHAPES)
    if k.shape[1] < 1 or q.shape[1] % k.shape[1]:
        raise InputError(
            f"{q.shape[1]} query heads cannot share {k.shape[1]} KV heads evenly: "
            f"{_shapes(q, k, v)}"
        )
    if q.shape[3] < 1 or v.shape[3] < 1:
        raise InputError(f"heads of no dimensions: {_shapes(q, k, v)}", _SHAPES)
    shape = q.shape[0], q.shape[1], q.shape[2], k.shape[2]
    checked = check_options(shape, given)
    tensors = _on_one_device(q, checked)
    if not 0 <= dropout < 1:
        raise InputError(f"dropout={dropout}: expected 0 <= dropout < 1")
    return Call(
        q, (k, v), (), [], checked, k.shape[1], v.shape[3], k.shape[2],
        torch.is_grad_enabled() and need_gradients(q, k, v, *tensors),
        home_name(q.device), return_lse, dropout,
    )  # fmt: skip


def _shapes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> str:
    return f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
