"""A model as multi-head attention: the same function, with a KV head for every query head."""

from typing import TYPE_CHECKING, Any

from kvfold.arch.projections import AttentionWeights
from kvfold.checkpoint.source import Checkpoint
from kvfold.errors import UnsupportedError
from kvfold.geometry import LatentGeometry

if TYPE_CHECKING:
    import torch


def as_mha(checkpoint: Checkpoint) -> "tuple[dict[str, Any], dict[str, torch.Tensor]]":
    """Config and tensors of the model with a KV head for each query head that reads it.

    That is what attention without grouping computes with, and what GQA (arXiv 2305.13245) saves.

    Raises:
        UnsupportedError: for a model that caches a latent, which has no KV heads.

    >>> config, tensors = as_mha(open_checkpoint("SRC"))  # doctest: +SKIP
    """
    geometry, family = checkpoint.geometry, checkpoint.family
    check_heads(checkpoint)
    tensors = {name: checkpoint.tensor(name) for name in checkpoint.names}
    if geometry.num_kv_heads == geometry.num_heads:
        return dict(checkpoint.config), tensors
    for layer in range(geometry.num_layers):
        weights = _repeated(checkpoint.attention(layer), geometry.num_heads)
        tensors |= family.projections.write(checkpoint.attention_prefix(layer), weights)
    return family.folded_config(checkpoint.config, geometry.num_heads), tensors


def check_heads(checkpoint: Checkpoint) -> None:
    """Refuse a model without KV heads; see :func:`as_mha`."""
    if isinstance(checkpoint.geometry, LatentGeometry):
        raise UnsupportedError(
            f"{checkpoint.label} caches a latent; there are no KV heads to repeat",
            "name a model with KV heads first",
        )


def _repeated(weights: AttentionWeights, heads: int) -> AttentionWeights:
    def each(tensor: "torch.Tensor | None") -> "torch.Tensor | None":
        return None if tensor is None else tensor.repeat_interleave(heads // len(tensor), 0)

    k, v = each(weights.k), each(weights.v)
    assert k is not None
    assert v is not None
    biases: dict[str, Any] = {"k_bias": each(weights.k_bias), "v_bias": each(weights.v_bias)}
    own: dict[str, Any] = {name: getattr(weights, name) for name in ("q_bias", "o_bias", "q_norm")}
    # Over all heads, a mean is that of the heads before they were repeated.
    return AttentionWeights(
        weights.q, k, v, weights.o, **own, **biases, k_norm=each(weights.k_norm)
    )
