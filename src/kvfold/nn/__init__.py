"""Layers: one class for MHA, GQA and MQA, which are settings of it, and one for MLA."""

from kvfold.nn.attention import GroupedQueryAttention
from kvfold.nn.latent import LatentAttention
from kvfold.ops.rope import Rotary

__all__ = ["GroupedQueryAttention", "LatentAttention", "Rotary"]
