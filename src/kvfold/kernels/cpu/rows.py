"""The CPU kernels over plain tensors, as a PyTorch operator that ``torch.compile`` understands."""

from typing import Any

import torch

from kvfold.kernels.cpu.call import KernelCall
from kvfold.kernels.cpu.library import library
from kvfold.kernels.view import KVView, readable
from kvfold.ops.kinds import check_range
from kvfold.ops.options import SCHEMA, unflattened


@torch.library.custom_op(
    "kvfold::attend_rows",
    mutates_args=(),
    device_types="cpu",
    schema=f"(Tensor q, Tensor k, Tensor v, {SCHEMA}) -> (Tensor, Tensor)",
)
def attend_rows(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *flat: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """``kvfold.attention`` by the kernels; output and log-sum-exp (float32).

    Args:
        flat: ``Options.flat``.
    """
    options = unflattened(flat)
    start, lengths = options.visibility.start, options.visibility.lengths
    lib = library()
    assert lib is not None
    batch, keys = k.shape[0], k.shape[2]
    k, v = readable(k), readable(v)
    check_range("start", start, batch, keys)  # unchecked until now under torch.compile
    check_range("lengths", lengths, batch, keys)
    ends = [keys] * batch if lengths is None else lengths.tolist()
    call = KernelCall(q, k.shape[1], ends, options, keys)
    out, lse = call.run(lib, [KVView.of_tensors(k, v, ends)], v.shape[3], return_lse=True)
    assert lse is not None
    return out, lse


@attend_rows.register_fake
def _(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *flat: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    out = q.new_empty(*q.shape[:3], v.shape[3])
    return out, q.new_empty(q.shape[:3], dtype=torch.float32)
