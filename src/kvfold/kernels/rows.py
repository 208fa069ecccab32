"""The CPU kernel over plain tensors, as a PyTorch operator that ``torch.compile`` understands."""

import torch

from kvfold.kernels.call import KernelCall, readable
from kvfold.kernels.checks import check_range
from kvfold.kernels.library import Part, library, rows_side
from kvfold.ops.quantize import format_of


@torch.library.custom_op("kvfold::attend_rows", mutates_args=(), device_types="cpu")
def attend_rows(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    start: torch.Tensor | None,
    lengths: torch.Tensor | None,
    mask: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    causal: bool,
    window: int,
    sinks: int,
    scale: float,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``kvfold.attention`` for few queries on the CPU; output and log-sum-exp (float32)."""
    lib = library()
    assert lib is not None
    batch, keys = k.shape[0], k.shape[2]
    k, v = readable(k), readable(v)
    end = torch.full((batch,), keys) if lengths is None else lengths
    end = end.to(torch.int32).contiguous()
    call = KernelCall(
        q, k.shape[1], end, causal=causal, window=window, sinks=sinks, scale=scale, softcap=softcap
    )
    check_range("start", start, batch, keys)  # unchecked until now under torch.compile
    check_range("lengths", lengths, batch, keys)
    call.hide(start, mask, alibi_slopes, keys)
    pages = call.kept(torch.arange(batch, dtype=torch.int32))
    fmt = format_of(k.dtype)
    sides = rows_side(k, fmt), rows_side(v, fmt)
    part = Part(*sides, pages.data_ptr(), 1, max(keys, 1), None, end.data_ptr())
    out, lse = call.run(lib, [part], v.shape[3], return_lse=True)
    assert lse is not None
    return out, lse


@attend_rows.register_fake
def _(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *others: object, **options: object
) -> tuple[torch.Tensor, torch.Tensor]:
    out = q.new_empty(*q.shape[:3], v.shape[3])
    return out, q.new_empty(q.shape[:3], dtype=torch.float32)
