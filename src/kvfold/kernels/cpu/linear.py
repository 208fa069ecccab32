"""PyTorch's prepacked linear layers (oneDNN), as an operator that ``torch.compile`` takes as it is.

A packed weight is a tensor that only oneDNN can read: blocks in the order its products want them.
"""

from functools import cache
from typing import Any

import torch

_WITHOUT: tuple[str, list[float], str] = ("none", [], "")  # nothing fused behind the product
_LIBRARY = torch.library.Library("kvfold", "FRAGMENT")
_LIBRARY.define("packed_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")


def why_not(weight: torch.Tensor) -> str | None:
    """Why PyTorch has no prepacked product for this weight ``[out, in]``; None if it has."""
    if weight.layout != torch.strided or not weight.is_cpu:
        return f"it is a {weight.layout} tensor on {weight.device}"
    if weight.numel() == 0:
        return "it is empty"
    if not _has(weight.dtype):
        return f"PyTorch has no prepacked product of {weight.dtype} on this machine"
    return None


@cache
def _has(dtype: torch.dtype) -> bool:
    ops = torch.ops.mkldnn
    if not (torch.backends.mkldnn.is_available() and hasattr(ops, "_linear_pointwise")):
        return False
    if dtype == torch.bfloat16:
        return bool(ops._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(ops._is_mkldnn_fp16_supported())
    return dtype == torch.float32


@cache
def _product() -> Any:
    """PyTorch's operator, which not every build of it has."""
    return torch.ops.mkldnn._linear_pointwise.default


def packed(weight: torch.Tensor, rows: int) -> torch.Tensor:
    """A weight ``[out, in]`` as products of so many rows want it; ``to_dense`` gives it back."""
    found: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)
    return found


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """``torch.nn.functional.linear`` of ``x`` ``[..., in]`` with a packed weight."""
    if torch.compiler.is_compiling():
        # PyTorch compiles its own operator only for weights that are constants of the graph.
        through_graph: torch.Tensor = torch.ops.kvfold.packed_linear(x, weight, bias)
        return through_graph
    return _linear(x, weight, bias)


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    if x.numel() == 0:
        return _like_output(x, weight, bias)
    found: torch.Tensor = _product()(x, weight, bias, *_WITHOUT)
    return found


def _like_output(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


for _key in ("CPU", "MkldnnCPU"):  # the second is that of packed weights
    _LIBRARY.impl("packed_linear", _linear, _key)
_LIBRARY.impl("packed_linear", _like_output, "Meta")
