"""Layers: one class, of which MHA, GQA and MQA are settings."""

from kvfold.nn.attention import GroupedQueryAttention
from kvfold.ops.rope import Rotary

__all__ = ["GroupedQueryAttention", "Rotary"]
