"""Layers."""

from kvfold.nn.attention import GroupedQueryAttention

__all__ = ["GroupedQueryAttention"]
