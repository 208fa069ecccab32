"""Pages read and written by PyTorch alone: for machines without kernels, and to look into them.

Where the CPU kernels are, they read back what they hold; this is what they are tested by.
"""

from collections.abc import Sequence

import torch

from kvfold.kernels.backend import Call
from kvfold.kernels.cpu.read_back import read_back, reader
from kvfold.kernels.layout import Layout
from kvfold.kernels.view import KVView, Positions, Rows
from kvfold.ops.formats import decode, encode
from kvfold.ops.rotation import rotate

CPU = torch.device("cpu")


def decoded(
    views: Sequence[KVView], keys: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys ``[B, Hkv, keys, D]`` and values ``[B, Hkv, keys, Dv]``; zeros where nothing is held."""
    lib = reader(views, dtype)
    if lib is None:
        return decoded_by_pytorch(views, keys, dtype)
    k, v = _zeros(views[0], keys, dtype)
    for view in views:
        read_back(lib, view, k, v)
    return k, v


def _zeros(view: KVView, keys: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    batch, heads = len(view.table), view.keys.data.shape[1]
    shape, device = (batch, heads, keys), view.keys.data.device
    k, v = (
        torch.zeros(*shape, rows.dim, dtype=dtype, device=device)
        for rows in (view.keys, view.values)
    )
    return k, v


def decoded_by_pytorch(
    views: Sequence[KVView], keys: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """``decoded``, whatever kernels there are."""
    k, v = _zeros(views[0], keys, dtype)
    for view in views:
        for own, part in by_head(view):
            for b, low, high in ranges(part):
                if low < min(high, keys):
                    k[b, own, low:high], v[b, own, low:high] = read(part, b, low, min(high, keys))
    return k, v


def held(call: Call) -> torch.Tensor | None:
    """Which positions ``[B, Hq or 1, 1, keys]`` views hold; None if they hold all there are."""
    lengths = listed(call.lengths, len(call.q))
    there = held_by_head(call.views, call.keys)
    inside = torch.arange(call.keys, device=CPU) < torch.tensor(lengths, device=CPU)[:, None]
    if bool((there | ~inside[:, None]).all()):
        return None
    group = call.q.shape[1] // call.num_kv_heads
    return there.repeat_interleave(group, 1)[:, :, None].to(call.q.device)


def held_by_head(views: Sequence[KVView], keys: int) -> torch.Tensor:
    """Which positions views hold: bool ``[B, Hkv, keys]`` on the CPU."""
    batch, heads = len(views[0].table), views[0].keys.data.shape[1]
    there = torch.zeros(batch, heads, keys, dtype=torch.bool, device=CPU)
    for view in views:
        for own, part in by_head(view):
            for b, low, high in ranges(part):
                there[b, own, low:high] = True
    return there


def by_head(view: KVView) -> list[tuple[slice, KVView]]:
    """Views with one table and range for each sequence, and the KV heads that they are of."""
    if not view.per_head:
        return [(slice(None), view)]
    batch, heads = view.table.shape[:2]
    found = []
    for head in range(heads):
        own = slice(head, head + 1)
        ends = listed(view.end, batch * heads)[head::heads]
        begins = listed(view.begin, batch * heads)[head::heads]
        keys, values = view.keys.of_heads(own), view.values.of_heads(own)
        table = view.table[:, head]
        found.append(
            (own, view._replace(keys=keys, values=values, table=table, begin=begins, end=ends))
        )
    return found


def ranges(view: KVView) -> list[tuple[int, int, int]]:
    """Each sequence, and where what the view holds of it begins and ends."""
    batch = len(view.table)
    begins, ends = listed(view.begin, batch), listed(view.end, batch)
    return list(zip(range(batch), begins, ends, strict=True))


def listed(positions: Positions | None, batch: int) -> list[int]:
    """Positions for Python; waits if they are on a GPU."""
    if positions is None:
        return [0] * batch
    found: list[int] = positions if isinstance(positions, list) else positions.tolist()
    return found


def read(view: KVView, b: int, low: int, high: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions ``low <= j < high`` decoded: float32 ``[Hkv, high - low, D]`` and ``Dv``.

    Positions without a page are zeros.
    """
    size = view.page_size
    first, last = low // size, max(-(-high // size), low // size)
    pages = view.table[b, first:last].to(CPU, torch.long)
    pages = torch.nn.functional.pad(pages, (0, last - first - len(pages)), value=-1)
    held = (pages >= 0).repeat_interleave(size)
    cut = slice(low - first * size, high - first * size)

    def numbers(rows: Rows, key: bool) -> torch.Tensor:
        device = rows.data.device
        shape = rows.data.shape[1], len(held), rows.dim
        found = torch.zeros(shape, dtype=torch.float32, device=device)
        found[:, held.to(device)] = _whole(rows, pages[pages >= 0].to(device), size, key)
        return found[:, cut]

    return numbers(view.keys, True), numbers(view.values, False)


def _whole(rows: Rows, pages: torch.Tensor, page_size: int, key: bool) -> torch.Tensor:
    """Pages ``[n]`` decoded: float32 ``[H, n * page_size, D]``."""
    data = rows.data[pages]
    scales = data.new_empty(0) if rows.scales is None else rows.scales[pages]
    if rows.packed:
        layout = Layout(rows.fmt, rows.dim, page_size, True, key)
        data, scales = layout.rows(data), layout.scales(scales)
    dim = rows.fmt.stored_dim(rows.dim) if rows.rotation else rows.dim
    numbers = rotate(decode(data, scales, rows.fmt, dim), rows.rotation)
    return numbers[..., : rows.dim].transpose(0, 1).flatten(1, 2)


def write(k: torch.Tensor, v: torch.Tensor, view: KVView) -> None:
    """Write tokens ``[B, Hkv, T, D]`` from the view's ends on, where there is a page."""
    for b, first in enumerate(listed(view.end, len(view.table))):
        positions = torch.arange(first, first + k.shape[2], device=CPU)
        pages = view.table[b].to(CPU, torch.long)[positions // view.page_size]
        held = pages >= 0
        for x, rows in ((k, view.keys), (v, view.values)):
            device = rows.data.device
            slots = (positions % view.page_size)[held].to(device)
            new = x[b].transpose(0, 1)[held.to(x.device)]
            _put(rows, pages[held].to(device), slots, new)


def _put(rows: Rows, pages: torch.Tensor, slots: torch.Tensor, new: torch.Tensor) -> None:
    """Write numbers ``[n, H, D]`` at slots ``[n]`` of pages ``[n]`` (as rows, not packed)."""
    new = new.float()
    if rows.rotation:
        padding = rows.fmt.stored_dim(rows.dim) - rows.dim
        new = rotate(torch.nn.functional.pad(new, (0, padding)), rows.rotation)
    data, scales = encode(new, rows.fmt)
    rows.data[pages, :, slots] = data.view(rows.data.dtype)
    if rows.scales is not None and scales.shape[-1]:
        rows.scales[pages, :, slots] = scales
