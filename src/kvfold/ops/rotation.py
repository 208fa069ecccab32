"""The Hadamard rotation of keys that are stored coarsely."""

import torch


def rotate(rows: torch.Tensor, size: int) -> torch.Tensor:
    """Multiply consecutive blocks of ``size`` dimensions by the normalised Hadamard matrix.

    Symmetric and orthogonal, so its own inverse, and q . k does not change when both are rotated.

    Args:
        rows: ``[..., D]``, D a multiple of ``size``, a power of two; 0 changes nothing.

    >>> x = torch.randn(3, 64)
    >>> torch.allclose(rotate(rotate(x, 64), 64), x, atol=1e-5)
    True
    """
    if size == 0:
        return rows
    blocks = rows.unflatten(-1, (-1, size))
    half = 1
    while half < size:
        pairs = blocks.unflatten(-1, (-1, 2, half))
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        blocks = torch.stack([a + b, a - b], -2).flatten(-3)
        half *= 2
    one, of = torch.tensor([1.0, size], dtype=torch.float32, device=rows.device)
    return (blocks * (one / of.sqrt())).flatten(-2)
