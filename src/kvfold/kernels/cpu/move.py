"""Moving stored tokens, by the CPU kernels."""

from itertools import accumulate

import torch

from kvfold.errors import InputError
from kvfold.kernels.cpu.call import part_of
from kvfold.kernels.cpu.library import Library, Move
from kvfold.kernels.cpu.pointer import Buffer, Int32s
from kvfold.kernels.pages import listed
from kvfold.kernels.view import KVView

_FROM, _OFFSETS = Buffer("from", torch.int32), Buffer("offset", torch.int64)


def move(lib: Library, view: KVView, sources: list[torch.Tensor]) -> None:
    """As ``pages.move``."""
    batch, heads = len(view.table), view.keys.data.shape[1]
    begins, ends = listed(view.begin, batch), listed(view.end, batch)
    counts = [len(source) for source in sources]
    if heads != 1 or counts != [high - low for low, high in zip(begins, ends, strict=True)]:
        raise InputError(f"{counts} tokens of {heads} KV heads to move to {begins} to {ends}")
    most = view.table.shape[1] * view.page_size
    if any(len(x) and not 0 <= int(x.min()) <= int(x.max()) < most for x in sources):
        raise InputError(f"tokens to be moved from beyond the table's {most} positions")
    starts = torch.tensor([0, *accumulate(counts)], dtype=torch.int64, device="cpu")
    flat = torch.cat(sources).to("cpu", torch.int32)
    call = Move(batch, _FROM.address(flat, flat.shape), _OFFSETS.address(starts, starts.shape))
    low, high = Int32s(begins), Int32s(ends)
    call.part = part_of(view, low, high)
    lib.move(call)
