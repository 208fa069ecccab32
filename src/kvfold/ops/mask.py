"""Which keys a query may see."""

import torch

from kvfold.ops.options import Options


def visible(
    tokens: int,
    keys: int,
    options: Options,
    device: torch.device | None = None,
) -> torch.Tensor:
    """The visibility of keys as a boolean ``[B or 1, 1, tokens, keys]``.

    Sequence b holds keys ``start[b] <= j < lengths[b]`` (int ``[B]``; all of them by default).
    Its last query is at its last key (bottom-right alignment), so query t is at position
    ``p = lengths[b] - tokens + t``, and sees ``p - left <= j <= p + right``, and of the keys
    before those also the first ``sinks`` (arXiv 2309.17453). The mask is left out.

    >>> visible(2, 4, Options(left=1, right=0))[0, 0].int().tolist()
    [[0, 1, 1, 0], [0, 0, 1, 1]]
    """
    j = torch.arange(keys, dtype=torch.long, device=device)
    zero = torch.zeros(1, dtype=torch.long, device=device)
    first = (zero if options.start is None else options.start.long())[:, None, None]
    lengths = options.lengths
    end = (zero + keys if lengths is None else lengths.long())[:, None, None]
    position = (
        end - tokens + torch.arange(tokens, dtype=torch.long, device=device)[:, None]
    )  # [B, T, 1]
    seen = (j >= first) & (j < end)
    if options.right is not None:
        seen = seen & (j <= position + options.right)
    if options.left is not None:
        seen = seen & ((j >= position - options.left) | (j < first + options.sinks))
    return seen[:, None].expand(-1, -1, tokens, -1)


def alibi(slopes: torch.Tensor, tokens: int, keys: int) -> torch.Tensor:
    """ALiBi's bias (arXiv 2108.12409), ``[1, Hq, tokens, keys]``: -slope * distance."""
    position = keys - tokens + torch.arange(tokens, device=slopes.device)
    distance = position[:, None] - torch.arange(keys, device=slopes.device)
    return -slopes.view(1, -1, 1, 1) * distance
