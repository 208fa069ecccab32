"""``attention_varlen``: sequences of different lengths behind one another, without padding."""

from itertools import accumulate, groupby, pairwise
from typing import NamedTuple, Unpack

import torch

from kvfold.errors import InputError
from kvfold.kernels.dispatch import attention
from kvfold.kernels.outside import outside_graphs
from kvfold.ops.options import Accepted, VarlenOptions, declared
from kvfold.ops.signatures import with_options

_OPTIONS = Accepted("attention_varlen", declared(VarlenOptions))
_SHAPES = "expected q [Tq, Hq, D], k [Tk, Hkv, D], v [Tk, Hkv, Dv]"


class _Run(NamedTuple):
    """``sequences`` in a row with as many queries each, and as many keys."""

    sequences: int
    queries: int
    keys: int


@outside_graphs(
    "kvfold.attention_varlen reads cu_seqlens, which a graph does not know: leave out"
    " fullgraph=True, or pad and use kvfold.attention with start or lengths"
)
@with_options
def attention_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    causal: bool,
    dropout: float = 0.0,
    return_lse: bool = False,
    **options: Unpack[VarlenOptions],
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Grouped-query attention of sequences of any lengths: FlashAttention's ``varlen``, ragged
    prefill. Each sequence's queries see its own keys only, and nothing is padded: sequences of
    one length that follow one another are one call of ``attention``, every other is its own.

    Args:
        q: ``[Tq, Hq, D]``; k: ``[Tk, Hkv, D]``; v: ``[Tk, Hkv, Dv]``: the tokens of all sequences,
            one sequence after another, in a dtype of ``attention``.
        cu_seqlens_q, cu_seqlens_k: int ``[B + 1]``, where sequences begin, and the totals Tq and
            Tk: sequence b's queries are ``cu_seqlens_q[b] <= t < cu_seqlens_q[b + 1]``. Sequences
            may be empty, and have more or fewer keys than queries. They are read: on a GPU that
            waits, so keep them on the CPU.
        max_seqlen_q, max_seqlen_k: not needed; if given, no sequence may be longer.
        causal: the last query of a sequence stands at its last key (bottom-right alignment) and
            sees no later ones. There is no default: FlashAttention's is False, ``attention``'s
            True.
        options: of attention; see the signature.
        dropout, return_lse: see ``attention``; positions are counted in each sequence.

    Returns:
        ``[Tq, Hq, Dv]`` in q's dtype; with ``return_lse`` also ``[Tq, Hq]`` (FlashAttention has
        ``[Hq, Tq]``), as ``merge`` takes it. A query that sees no key gets zeros and -inf.

    Raises:
        InputError: for shapes, dtypes, devices or values that do not fit, naming them.

    >>> q, k, v = torch.randn(7, 8, 16), torch.randn(9, 2, 16), torch.randn(9, 2, 16)
    >>> begins_q, begins_k = torch.tensor([0, 3, 3, 7]), torch.tensor([0, 5, 5, 9])
    >>> attention_varlen(q, k, v, begins_q, begins_k, causal=True).shape
    torch.Size([7, 8, 16])
    """
    _OPTIONS.refuse_others(options)
    _check(q, k, v)
    queries = _lengths("cu_seqlens_q", cu_seqlens_q, q.shape[0], "max_seqlen_q", max_seqlen_q)
    keys = _lengths("cu_seqlens_k", cu_seqlens_k, k.shape[0], "max_seqlen_k", max_seqlen_k)
    if len(queries) != len(keys):
        raise InputError(f"cu_seqlens_q has {len(queries)} sequences, cu_seqlens_k has {len(keys)}")
    runs = _runs(queries, keys)
    of_q = [(run.sequences, run.queries) for run in runs]
    of_k = [(run.sequences, run.keys) for run in runs]
    outs, lses = [], []
    for given in zip(_cut(q, of_q), _cut(k, of_k), _cut(v, of_k), strict=True):
        found = attention(*given, causal=causal, dropout=dropout, return_lse=return_lse, **options)
        out, lse = found if isinstance(found, tuple) else (found, None)
        outs.append(out.transpose(1, 2).flatten(0, 1))
        if lse is not None:
            lses.append(lse.transpose(1, 2).flatten(0, 1))
    out = outs[0] if len(outs) == 1 else torch.cat(outs)
    return (out, torch.cat(lses)) if return_lse else out


def _runs(queries: list[int], keys: list[int]) -> list[_Run]:
    """The sequences, those of one length together; without any, an empty one.

    >>> _runs([4, 4, 0], [4, 4, 9])
    [_Run(sequences=2, queries=4, keys=4), _Run(sequences=1, queries=0, keys=9)]
    """
    pairs = groupby(zip(queries, keys, strict=True))
    return [_Run(len(list(each)), *sizes) for sizes, each in pairs] or [_Run(1, 0, 0)]


def _cut(x: torch.Tensor, runs: list[tuple[int, int]]) -> list[torch.Tensor]:
    """Views ``[count, H, length, dim]`` of the rows of each (count, length)."""
    ends = accumulate(count * length for count, length in runs)
    return [
        x[end - count * length : end].unflatten(0, (count, length)).transpose(1, 2)
        for end, (count, length) in zip(ends, runs, strict=True)
    ]


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, torch.Tensor):
            raise InputError(f"{name} is a {type(x).__name__}, expected a tensor", _SHAPES)
    if not q.dim() == k.dim() == v.dim() == 3 or k.shape[:2] != v.shape[:2]:
        shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
        raise InputError(f"shapes do not fit: {shapes}", _SHAPES)


def _lengths(
    name: str, begins: torch.Tensor, total: int, longest_name: str, longest: int | None
) -> list[int]:
    """The length of every sequence, from where they begin and the end of the last."""
    what = "expected whole numbers [B + 1] from 0 to the number of tokens, never falling"
    if not isinstance(begins, torch.Tensor):
        raise InputError(f"{name} is a {type(begins).__name__}, expected a tensor", what)
    whole = not (begins.is_floating_point() or begins.is_complex() or begins.dtype == torch.bool)
    if begins.dim() != 1 or not len(begins) or not whole:
        raise InputError(f"{name} is {begins.dtype} {list(begins.shape)}", what)
    at: list[int] = begins.tolist()
    lengths = [after - before for before, after in pairwise(at)]
    if at[0] != 0 or at[-1] != total or min(lengths, default=0) < 0:
        raise InputError(f"{name} runs from {at[0]} to {at[-1]}, of {total} tokens", what)
    if longest is not None and max(lengths, default=0) > longest:
        raise InputError(
            f"{longest_name}={longest}, but a sequence of {name} has {max(lengths)} tokens",
            "leave it out",
        )
    return lengths
