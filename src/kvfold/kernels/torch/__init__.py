"""Attention through PyTorch's own operators."""
