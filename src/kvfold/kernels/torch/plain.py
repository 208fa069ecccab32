"""What PyTorch's operators are given: plain tensors, and masks that say what may be seen."""

from typing import NamedTuple

import torch

from kvfold.kernels.backend import Call
from kvfold.kernels.pages import decoded, listed
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
    lengths = torch.tensor(listed(call.lengths, len(k)), dtype=torch.int32, device=k.device)
    padded = call.options.visibility._replace(lengths=lengths)
    return Plain(call.q, k, v, call.options._replace(visibility=padded), call.dropout)


def seen_rows(call: Plain, seen: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values, with zeros where the options hide them from every query."""
    o = call.options.visibility
    all_used = o.left is None and o.start is None and o.lengths is None and o.mask is None
    if seen is None or all_used:
        return call.k, call.v
    return without_unseen(call.k, seen), without_unseen(call.v, seen)
