"""Layers and inputs for the tests of ``kvfold.nn``."""

from typing import Any

import torch
from torch import nn

from kvfold.nn import GroupedQueryAttention

F32, F64 = torch.float32, torch.float64


def layer(*sizes: int, seed: int = 0, dtype: torch.dtype = F64, **options: Any) -> Any:
    torch.manual_seed(seed)
    made = GroupedQueryAttention(*sizes, dtype=dtype, **options)
    for norm in (made.q_norm, made.k_norm):
        if norm is not None:
            nn.init.uniform_(norm.weight, 0.5, 2.0)
    return made.eval()


def tokens(*shape: int, seed: int = 1, dtype: torch.dtype = F64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=F64).to(dtype)
