"""Attention over a cache's stores with the Triton kernels."""

import torch

from kvfold.cache.storage import Uniform
from kvfold.kernels.backend import GPU_MAX_DIM
from kvfold.kernels.cpu.call import readable
from kvfold.kernels.cpu.limits import MAX_TOKENS
from kvfold.ops.options import Options


def suits_gpu_kernel(storage: Uniform, q: torch.Tensor) -> bool:
    """Whether the Triton kernels can do it."""
    shape = storage.main.shape
    fits = max(shape.head_dim, shape.v_head_dim) <= GPU_MAX_DIM
    return storage.main.backend == "triton" and q.shape[2] <= MAX_TOKENS and fits


def attend_on_gpu(
    storage: Uniform, q: torch.Tensor, rows: list[int], lengths: torch.Tensor, options: Options
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp of sequences ``rows``; nothing here waits for the GPU.

    Args:
        lengths: int32 ``[B]`` on the CPU.
    """
    from kvfold.kernels.triton.launch import attend

    there = storage.main.sent(lengths)
    return attend(readable(q), storage.gpu_parts(rows, there), there, options)
