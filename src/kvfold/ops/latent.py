"""From heads to latents and back: what makes the absorbed form of latent attention."""

import torch


def into_latents(x: torch.Tensor, to_key: torch.Tensor) -> torch.Tensor:
    """Queries in the coordinates of the latent: ``q . (W_k c) = (W_k^T q) . c``.

    Args:
        x: ``[B, H, T, D]``; to_key: ``[H, D, rank]``, what makes keys of a latent.

    Returns:
        ``[B, H, T, rank]``.
    """
    return _by_head(x, to_key)


def out_of_latents(x: torch.Tensor, to_value: torch.Tensor) -> torch.Tensor:
    """A head's output, of the mean latent that its attention found: ``sum p W_v c = W_v sum p c``.

    Args:
        x: ``[B, H, T, rank]``; to_value: ``[H, Dv, rank]``, what makes values of a latent.

    Returns:
        ``[B, H, T, Dv]``.
    """
    return _by_head(x, to_value.mT)


def _by_head(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Each head's ``[B, T, D]`` times its matrix, which is read once for the whole batch."""
    batch, heads, tokens, dim = x.shape
    rows = x.transpose(0, 1).reshape(heads, batch * tokens, dim)
    return (rows @ weight).unflatten(1, (batch, tokens)).transpose(0, 1)
