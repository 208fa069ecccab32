"""Which keys a query may see."""

import torch

from kvfold.ops.options import Options, Visibility


def visible(
    tokens: int,
    keys: int,
    visibility: Visibility,
    device: torch.device | None = None,
) -> torch.Tensor:
    """The visibility of keys as a boolean ``[B or 1, 1, tokens, keys]``.

    Sequence b holds keys ``start[b] <= j < lengths[b]`` (int ``[B]``; all of them by default).
    Its last query is at its last key (bottom-right alignment), so query t is at position
    ``p = lengths[b] - tokens + t``, and sees ``p - left <= j <= p + right``, and of the keys
    before those also the first ``sinks`` (arXiv 2309.17453). The mask is left out.

    >>> visible(2, 4, Visibility(left=1, right=0))[0, 0].int().tolist()
    [[0, 1, 1, 0], [0, 0, 1, 1]]
    """
    j = torch.arange(keys, dtype=torch.long, device=device)
    zero = torch.zeros(1, dtype=torch.long, device=device)
    first = (zero if visibility.start is None else visibility.start.long())[:, None, None]
    lengths = visibility.lengths
    end = (zero + keys if lengths is None else lengths.long())[:, None, None]
    position = (
        end - tokens + torch.arange(tokens, dtype=torch.long, device=device)[:, None]
    )  # [B, T, 1]
    seen = (j >= first) & (j < end)
    if visibility.right is not None:
        seen = seen & (j <= position + visibility.right)
    if visibility.left is not None:
        seen = seen & ((j >= position - visibility.left) | (j < first + visibility.sinks))
    return seen[:, None].expand(-1, -1, tokens, -1)


def alibi(
    slopes: torch.Tensor, tokens: int, keys: int, lengths: torch.Tensor | None = None
) -> torch.Tensor:
    """ALiBi's bias (arXiv 2108.12409), ``[B or 1, Hq, tokens, keys]``: -slope * distance.

    The distance has no sign: later keys lose as earlier ones do. Float32, or float64 as slopes.

    >>> alibi(torch.tensor([0.5]), 2, 3)[0, 0].tolist()
    [[-0.5, -0.0, -0.5], [-1.0, -0.5, -0.0]]
    """
    slopes = slopes.to(torch.promote_types(slopes.dtype, torch.float32))
    end = keys if lengths is None else lengths.view(-1, 1, 1, 1)
    t = torch.arange(tokens, dtype=torch.long, device=slopes.device)
    j = torch.arange(keys, dtype=torch.long, device=slopes.device)
    distance = (end - tokens + t[:, None] - j).abs()
    return -slopes.view(1, -1, 1, 1) * distance


def seen_and_bias(
    q: torch.Tensor, keys: int, options: Options
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Visibility (boolean) and additive bias of all options; None for everything, and nothing.

    The bias is float32 at least, as the kernels have it: in bfloat16 a score is off by 2^-9 of it.
    """
    sight, slopes, tokens = options.visibility, options.scoring.alibi_slopes, q.shape[2]
    precise = torch.promote_types(q.dtype, torch.float32)
    limited = sight.left is not None or sight.right is not None
    padded = sight.start is not None or sight.lengths is not None
    seen = visible(tokens, keys, sight, q.device) if limited or padded else None
    bias = None
    if sight.mask is not None:
        if sight.mask.dtype == torch.bool:
            seen = sight.mask if seen is None else seen & sight.mask
        else:
            bias = sight.mask.to(precise)
    if slopes is not None:
        distance = alibi(slopes, tokens, keys, sight.lengths).to(precise)
        bias = distance if bias is None else distance + bias
    return split_hidden(seen, bias)


def split_hidden(
    seen: torch.Tensor | None, bias: torch.Tensor | None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Visibility and bias so that a bias of -inf is a key that is not seen, and all are finite."""
    if bias is None:
        return seen, bias
    hidden = bias == -torch.inf
    return ~hidden if seen is None else seen & ~hidden, bias.masked_fill(hidden, 0.0)


def without_unseen(x: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """Keys or values ``[B, Hkv, S, D]`` with zeros where no query sees them.

    What lies there may be anything, and a weight of zero times NaN would be NaN.

    Args:
        seen: broadcastable to ``[B, Hq, T, S]``.
    """
    shape = (1,) * (4 - seen.dim()) + tuple(seen.shape)
    used = seen.view(shape).any(2)
    if used.shape[1] > 1:  # by query head
        used = used.unflatten(1, (x.shape[1], -1)).any(2)
    return x.masked_fill(~used[..., None], 0.0)


def used_keys(tokens: int, keys: int, visibility: Visibility, device: torch.device) -> torch.Tensor:
    """``visible(...).any(-2, keepdim=True)`` in closed form, ``[B or 1, 1, 1, keys]``."""
    lengths, start = visibility.lengths, visibility.start
    j = torch.arange(keys, dtype=torch.long, device=device)
    end = torch.full_like(j[:1], keys) if lengths is None else lengths.long()
    first = torch.zeros_like(end) if start is None else start.long()
    end, first = end.view(-1, 1), first.view(-1, 1)
    used = (j >= first) & (j < end)
    if visibility.left is not None:
        earliest = end - tokens - visibility.left
        used = used & ((j >= earliest) | (j < first + visibility.sinks))
    return used[:, None, None]
