"""Which kernels a device has."""

import os
from functools import cache
from importlib.util import find_spec

import torch

from kvfold.kernels.cpu.library import library

GPU_MAX_DIM = 256  # larger heads do not fit the registers of the Triton kernels


def backend_of(device: torch.device) -> str:
    """``cpu`` (compiled C++), ``triton``, or ``torch`` where there are no kernels.

    ``KVFOLD_BACKEND`` chooses another one: ``torch`` to compare with, ``triton`` on a CPU for
    Triton's interpreter.
    """
    wished = os.environ.get("KVFOLD_BACKEND")
    if wished in ("cpu", "triton", "torch"):
        return wished
    if device.type == "cuda":
        return "triton" if _has_triton() else "torch"
    return "cpu" if device.type == "cpu" and library() is not None else "torch"


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
