"""Layers and inputs for the tests of ``kvfold.nn``."""

import math
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


def close(out: torch.Tensor, truth: torch.Tensor, terms: int, dtype: torch.dtype = F64) -> None:
    """Equal but for rounding: sums of at most ``terms`` terms, in ``dtype``.

    The rounding error of such a sum is around eps * sqrt(terms) of its terms' size. Four products
    and a softmax follow each other, and 16 leaves room for results smaller than their terms.
    """
    bound = 16 * torch.finfo(dtype).eps * math.sqrt(terms) * truth.abs().max()
    assert out.shape == truth.shape
    assert (out.to(F64) - truth.to(F64)).abs().max() <= bound


def repeated(gqa: Any) -> Any:
    """The same function as multi-head attention: every KV head once per query head."""
    g = gqa.geometry
    options = {"rotary": gqa.rotary, "causal": gqa.causal, "v_head_dim": g.v_head_dim}
    mha = layer(g.hidden_size, g.num_heads, g.num_heads, head_dim=g.head_dim, **options)
    state = gqa.state_dict()
    for name, dim in (("k_proj.weight", g.head_dim), ("v_proj.weight", g.v_head_dim)):
        heads = state[name].unflatten(0, (-1, dim))
        state[name] = heads.repeat_interleave(g.group_size, 0).flatten(0, 1)
    mha.load_state_dict(state)
    return mha
