"""Scaling q against k and v against o, so that one learning rate suits all four.

Multiplying the keys of a KV head by c and its queries by 1/c changes no score; the same holds
for values and the output projection. Folding leaves them unequal, and Adam's steps, which are
of one size for every weight, then move some tensors far more than others. c is a power of two:
the model computes the same bits before and after.
"""

import torch

from kvfold.arch.projections import AttentionWeights
from kvfold.checkpoint.source import Checkpoint
from kvfold.geometry import LatentGeometry


def balanced(weights: AttentionWeights, normalised: bool) -> AttentionWeights:
    """The same attention with |q| about |k| and |v| about |o|, KV head by KV head.

    Args:
        normalised: whether queries and keys are normalised after projection, head by head
            (QK-norm); their size means nothing then, and stays, as under norms over all heads.

    >>> balanced(weights, normalised=False)  # doctest: +SKIP
    """
    kv_heads = len(weights.k)
    ones = torch.ones(kv_heads, dtype=torch.float64)
    wide = weights.k_norm is not None
    key = ones if normalised or wide else _factor(weights.q, weights.k)
    value = _factor(weights.o, weights.v)

    def must(tensor: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        each = factor.repeat_interleave(len(tensor) // kv_heads).to(tensor.dtype)
        return tensor * each.reshape(-1, *[1] * (tensor.ndim - 1))

    def times(tensor: torch.Tensor | None, factor: torch.Tensor) -> torch.Tensor | None:
        return None if tensor is None else must(tensor, factor)

    return AttentionWeights(
        q=must(weights.q, 1 / key),
        k=must(weights.k, key),
        v=must(weights.v, value),
        o=must(weights.o, 1 / value),
        q_bias=times(weights.q_bias, 1 / key),
        k_bias=times(weights.k_bias, key),
        v_bias=times(weights.v_bias, value),
        o_bias=weights.o_bias,
        q_norm=weights.q_norm,
        k_norm=weights.k_norm,
    )


def _factor(readers: torch.Tensor, shared: torch.Tensor) -> torch.Tensor:
    """``[Hkv]``, the power of two nearest to sqrt(|readers| / |shared|), by RMS."""
    kv_heads = len(shared)
    read = readers.double().reshape(kv_heads, -1).square().mean(-1).sqrt()
    kept = shared.double().reshape(kv_heads, -1).square().mean(-1).sqrt()
    ratio = (read.clamp_min(1e-12) / kept.clamp_min(1e-12)).sqrt()
    return torch.exp2(ratio.log2().round())


def balanced_tensors(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Every layer's balanced projections, under the checkpoint's names and in its dtype.

    None of a model that caches latents: those are balanced when they are made (``fold.constant``).
    """
    family = checkpoint.family
    if isinstance(checkpoint.geometry, LatentGeometry):
        return {}
    tensors: dict[str, torch.Tensor] = {}
    for layer in range(checkpoint.geometry.num_layers):
        weights = balanced(
            checkpoint.attention(layer), family.normalises(checkpoint.config) is not None
        )
        tensors |= family.projections.write(checkpoint.attention_prefix(layer), weights)
    return tensors
