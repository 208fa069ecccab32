"""What kvfold's attention is compared with. To add a peer, write one function here.

A peer gets bfloat16 ``q [B, Hq, 1, D]`` and ``k, v [B, Hkv, S, D]``, contiguous, which is what a
transformers cache holds, and returns ``[B, Hq, 1, D]``. PyTorch is imported only to build one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Peer:
    """Attention by other means.

    Attributes:
        summary: how it computes. build: makes the function; may fail where it cannot be had.
    """

    name: str
    summary: str
    build: "Callable[[], Attend]"


PEERS: dict[str, Peer] = {}


def _peer(name: str, summary: str) -> "Callable[[Callable[[], Attend]], Callable[[], Attend]]":
    def register(build: "Callable[[], Attend]") -> "Callable[[], Attend]":
        PEERS[name] = Peer(name, summary, build)
        return build

    return register


@_peer("sdpa", "PyTorch's scaled_dot_product_attention(enable_gqa=True)")
def _sdpa() -> "Attend":
    from torch.nn.functional import scaled_dot_product_attention

    def attend(q: "Tensor", k: "Tensor", v: "Tensor") -> "Tensor":
        return scaled_dot_product_attention(q, k, v, enable_gqa=True)

    return attend


@_peer("sdpa-grouped", "the same, given the query heads of a KV head as so many tokens")
def _sdpa_grouped() -> "Attend":
    from torch.nn.functional import scaled_dot_product_attention

    def attend(q: "Tensor", k: "Tensor", v: "Tensor") -> "Tensor":
        # One query token and no mask: heads that share K and V are rows of one product.
        out = scaled_dot_product_attention(q.view(*k.shape[:2], -1, q.shape[-1]), k, v)
        return out.reshape(*q.shape[:3], -1)

    return attend


@_peer("repeat", "K and V repeated for every query head, then sdpa (transformers' repeat_kv)")
def _repeat() -> "Attend":
    from torch.nn.functional import scaled_dot_product_attention

    def attend(q: "Tensor", k: "Tensor", v: "Tensor") -> "Tensor":
        times = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(times, 1), v.repeat_interleave(times, 1)
        return scaled_dot_product_attention(q, k, v)

    return attend


@_peer("matmul", "two batched matrix products over grouped queries, and a softmax")
def _matmul() -> "Attend":
    def attend(q: "Tensor", k: "Tensor", v: "Tensor") -> "Tensor":
        grouped = q.view(*k.shape[:2], -1, q.shape[-1])
        weights = (grouped @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
        return (weights @ v).view(*q.shape[:3], -1)

    return attend


@_peer("flex", "PyTorch's FlexAttention, compiled (up to a minute for each shape)")
def _flex() -> "Attend":
    import torch
    from torch.nn.attention.flex_attention import flex_attention

    torch.compiler.reset()  # each shape is compiled for itself, as its best configuration
    compiled = torch.compile(flex_attention, dynamic=False)

    def attend(q: "Tensor", k: "Tensor", v: "Tensor") -> "Tensor":
        out: Tensor = compiled(q, k, v, enable_gqa=True)
        return out

    return attend
