"""What PyTorch's operators are given: plain tensors, and masks that say what may be seen."""

from typing import NamedTuple

import torch

from kvfold.kernels.backend import Call
from kvfold.kernels.pages import decoded, held, listed
from kvfold.ops.mask import without_unseen
from kvfold.ops.options import Options


class Plain(NamedTuple):
    """A call over tensors: keys ``[B, Hkv, S, D]`` and values ``[B, Hkv, S, Dv]``."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    options: Options
    dropout: float


def plain(call: Call) -> Plain:
    """The call, with views decoded in q's dtype."""
    if call.tensors is not None:
        return Plain(call.q, *call.tensors, call.options, call.dropout)
    k, v = decoded(call.views, call.keys, call.q.dtype)
    lengths = listed(call.lengths, len(k))
    ends = torch.tensor(lengths, dtype=torch.int32, device=k.device)
    sight = call.options.visibility._replace(lengths=ends)
    there = held(call)
    if there is not None:
        sight = sight._replace(mask=_only(there, sight.mask))
    return Plain(call.q, k, v, call.options._replace(visibility=sight), call.dropout)


def _only(there: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The mask, and nothing but what is there."""
    if mask is None:
        return there
    return mask & there if mask.dtype == torch.bool else mask.masked_fill(~there, -torch.inf)


def seen_rows(call: Plain, seen: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values, with zeros where the options hide them from every query."""
    o = call.options.visibility
    all_used = o.left is None and o.start is None and o.lengths is None and o.mask is None
    if seen is None or all_used:
        return call.k, call.v
    return without_unseen(call.k, seen), without_unseen(call.v, seen)
