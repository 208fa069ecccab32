"""Pages back as plain rows, by the CPU kernels."""

import os
from collections.abc import Sequence

import torch

from kvfold.kernels.cpu.call import part_of
from kvfold.kernels.cpu.library import Library, ReadBack, Tensor, library
from kvfold.kernels.cpu.pointer import Buffer, Int32s
from kvfold.kernels.limits import MAX_DIM
from kvfold.kernels.view import KVView

_KEYS, _VALUES = Buffer("k"), Buffer("v")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def reader(views: Sequence[KVView], dtype: torch.dtype) -> Library | None:
    """The kernels, if they can read these views back and nobody asked for others."""
    if os.environ.get("KVFOLD_BACKEND") not in (None, "", "cpu") or dtype not in _DTYPES:
        return None
    rows = [rows for view in views for rows in (view.keys, view.values)]
    if all(x.data.is_cpu and 0 < x.dim <= MAX_DIM for x in rows):
        return library()
    return None


def read_back(lib: Library, view: KVView, k: torch.Tensor, v: torch.Tensor) -> None:
    """Write what a view holds into ``[B, Hkv, S, D]`` and ``[B, Hkv, S, Dv]``; nothing else."""
    call = ReadBack(*k.shape[:3], Tensor.of(k, k.shape, _KEYS), Tensor.of(v, v.shape, _VALUES))
    begin = None if view.begin is None else Int32s(view.begin)
    # Of a sliding cache's positions that are gone there may be no entry in the table.
    listed = view.table.shape[-1] * view.page_size
    end = Int32s(min(int(position), listed) for position in view.end)
    call.part = part_of(view, begin, end)
    lib.read_back(call)
