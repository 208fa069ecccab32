"""The kernels over plain tensors, as a PyTorch operator that ``torch.compile`` understands."""

from typing import Any

import torch

from kvfold.kernels.backend import backend_of
from kvfold.kernels.cpu.call import KernelCall, readable
from kvfold.kernels.cpu.library import Part, library, rows_side
from kvfold.ops.formats import format_of
from kvfold.ops.kinds import check_range
from kvfold.ops.options import SCHEMA, Options, unflattened


@torch.library.custom_op(
    "kvfold::attend_rows",
    mutates_args=(),
    device_types=("cpu", "cuda"),
    schema=f"(Tensor q, Tensor k, Tensor v, {SCHEMA}) -> (Tensor, Tensor)",
)
def attend_rows(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *flat: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """``kvfold.attention`` for few queries; output and log-sum-exp (float32).

    Args:
        flat: ``Options.flat``.
    """
    options = unflattened(flat)
    start, lengths = options.visibility.start, options.visibility.lengths
    if backend_of(q.device) == "triton":
        return _on_gpu(q, k, v, options)
    lib = library()
    assert lib is not None
    batch, keys = k.shape[0], k.shape[2]
    k, v = readable(k), readable(v)
    check_range("start", start, batch, keys)  # unchecked until now under torch.compile
    check_range("lengths", lengths, batch, keys)
    ends = [keys] * batch if lengths is None else lengths.tolist()
    call = KernelCall(q, k.shape[1], ends, options, keys)
    pages = call.kept(torch.arange(batch, dtype=torch.int32, device=q.device)[:, None])
    part = Part.of(rows_side(k), rows_side(v), pages, max(keys, 1), None, call.lengths)
    out, lse = call.run(lib, [part], v.shape[3], return_lse=True)
    assert lse is not None
    return out, lse


def _on_gpu(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    options: Options,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A plain tensor is one page per sequence."""
    from kvfold.kernels.triton.launch import GpuPart, Rows, attend

    batch, keys = k.shape[0], k.shape[2]
    whole = torch.full((batch,), keys, dtype=torch.int32, device=q.device)
    lengths = options.visibility.lengths
    end = whole if lengths is None else lengths.to(torch.int32).contiguous()
    none = q.new_empty(1, 1, 1, 0, dtype=torch.bfloat16)  # plain numbers have no scales
    sides = [Rows(format_of(x.dtype), readable(x), none, x.shape[3]) for x in (k, v)]
    table = torch.arange(batch, dtype=torch.int32, device=q.device)[:, None]
    part = GpuPart(sides[0], sides[1], table, max(keys, 1), None, end, keys)
    return attend(readable(q), [part], end, options)


@attend_rows.register_fake
def _(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *flat: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    out = q.new_empty(*q.shape[:3], v.shape[3])
    return out, q.new_empty(q.shape[:3], dtype=torch.float32)
