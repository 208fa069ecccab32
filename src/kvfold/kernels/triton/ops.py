"""The GPU kernels as PyTorch operators, which ``torch.compile`` takes as they are."""

from typing import Any

import torch

from kvfold.kernels.triton.launch import append, attend
from kvfold.kernels.view import Angles, KVView, Rows, readable
from kvfold.ops.formats import FORMATS
from kvfold.ops.options import SCHEMA, unflattened

_DEVICES = ("cuda", "cpu")  # a CPU for Triton's interpreter


@torch.library.custom_op(
    "kvfold::gpu_append", mutates_args=("data", "scales"), device_types=_DEVICES
)
def gpu_append(
    x: torch.Tensor,
    data: torch.Tensor,
    scales: torch.Tensor,
    table: torch.Tensor,
    first: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    fmt: str,
    rotated: bool,
    interleaved: bool,
) -> None:
    """``launch.append`` to rows ``data`` ``[P, Hkv, page_size, row]`` and their scales."""
    rows = Rows(FORMATS[fmt], data, scales, x.shape[3])
    angles = None if cos is None or sin is None else Angles(cos, sin, interleaved)
    append(x, rows, table, data.shape[2], first, rotated=rotated, rotary=angles)


@torch.library.custom_op(
    "kvfold::gpu_attend",
    mutates_args=(),
    device_types=_DEVICES,
    schema="(Tensor q, Tensor k_data, Tensor? k_scales, Tensor v_data, Tensor? v_scales,"
    " Tensor table, Tensor ends, str k_format, str v_format, SymInt v_head_dim, SymInt? splits,"
    f" {SCHEMA}) -> (Tensor, Tensor)",
)
def gpu_attend(
    q: torch.Tensor,
    k_data: torch.Tensor,
    k_scales: torch.Tensor | None,
    v_data: torch.Tensor,
    v_scales: torch.Tensor | None,
    table: torch.Tensor,
    ends: torch.Tensor,
    k_format: str,
    v_format: str,
    v_head_dim: int,
    splits: int | None,
    *flat: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``launch.attend`` over one view; output and log-sum-exp (float32).

    Args:
        flat: ``Options.flat``.
    """
    page_size = max(k_data.shape[2], 1)
    view = KVView(
        Rows(FORMATS[k_format], readable(k_data), k_scales, q.shape[3]),
        Rows(FORMATS[v_format], readable(v_data), v_scales, v_head_dim),
        table, page_size, None, ends, table.shape[1] * page_size,
    )  # fmt: skip
    return attend(readable(q), [view], ends, unflattened(flat), splits)


@gpu_attend.register_fake
def _(
    q: torch.Tensor,
    k_data: torch.Tensor,
    k_scales: torch.Tensor | None,
    v_data: torch.Tensor,
    v_scales: torch.Tensor | None,
    table: torch.Tensor,
    ends: torch.Tensor,
    k_format: str,
    v_format: str,
    v_head_dim: int,
    *others: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    out = q.new_empty(*q.shape[:3], v_head_dim)
    return out, q.new_empty(q.shape[:3], dtype=torch.float32)
