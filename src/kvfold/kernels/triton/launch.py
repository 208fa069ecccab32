"""Calling the decoding kernels: sizes of tiles, splits, scratch memory."""

import os
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
import triton.language as tl

from kvfold.kernels.triton.append import append_kernel
from kvfold.kernels.triton.decode import attend_kernel, merge_kernel
from kvfold.kernels.triton.options import arguments, ready
from kvfold.kernels.triton.splits import Gpu, choose_splits
from kvfold.kernels.view import Angles, KVView, Rows
from kvfold.ops.options import Options
from kvfold.ops.rotation import rotate

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
LEAST_ROWS = 16  # the smallest M of a matrix product
MOST_ROWS = 64
_MERGED = 128  # numbers of an output row that one program merges
# The dtype of products; the interpreter has none of bfloat16.
_DOTS = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.float32 if INTERPRETED else tl.bfloat16,
}


class Tile(NamedTuple):
    """What a program computes at a time: query rows times keys.

    Attributes:
        stages: tiles of keys that are in flight at once.
    """

    rows: int
    keys: int
    warps: int = 4
    stages: int = 3


def tile_of(view: KVView, rows: int, shared: int, wide: bool = False) -> Tile:
    """How many query rows and keys a program takes at once, given ``shared`` bytes of memory.

    Heads up to 256: keys that keep about 32 KiB in flight, so 64 of 128 bf16 numbers.

    Latents: a tile of 32 keys of 512 + 64 bf16 numbers takes 36 KiB, 16 rows of queries 18 KiB.
    With two tiles in flight that is 90 of the 99 KiB that the smaller cards give a program, with
    one 54 of AMD's 64. Sums are 16 x 512 floats, 64 registers of each of 128 threads. From 160 KiB
    on (A100: 163, H100: 227) 64 rows share a tile of plain numbers: 72 KiB of queries and two
    tiles make 144 KiB, and sums are 128 registers of each of 256 threads, which leaves none to
    decode encoded ones with.

    Args:
        rows: of queries, all that share a KV head. wide: they are float32, and so are products.
    """
    k, v = view.keys, view.values
    row_bytes = max(k.fmt.row_bytes(k.dim), v.fmt.row_bytes(v.dim))
    most = min(MOST_ROWS, max(LEAST_ROWS, _power(rows)))
    if not view.within:
        return Tile(most, min(128, max(32, _power(8192 // row_bytes))))
    if wide or row_bytes > 4 * 512:
        return Tile(LEAST_ROWS, LEAST_ROWS, stages=2)
    if most > LEAST_ROWS and k.fmt.plain and shared >= 160 << 10:
        return Tile(most, 32, warps=8)
    return Tile(LEAST_ROWS, 32, stages=3 if shared >= 96 << 10 else 2)


def attend(
    q: torch.Tensor,
    views: Sequence[KVView],
    lengths: torch.Tensor,
    options: Options,
    splits_each: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of ``q`` ``[B, Hq, T, D]`` over the positions that ``views`` hold.

    Nothing here waits for the GPU, and the number of launches depends on shapes alone, so a call
    can be captured in a CUDA graph and replayed as lengths grow within ``keys``.

    Args:
        views: keys of some formats are rotated; ``q`` must be given unrotated, and is rotated here.
        lengths: int32 ``[B]``; the last query stands at ``lengths[b] - 1``.
        options: their own ``lengths`` are not read.
        splits_each: of every view, to override the rule.

    Returns:
        ``[B, Hq, T, Dv]`` in q's dtype and the log-sum-exp ``[B, Hq, T]`` float32.
    """
    batch, heads, tokens, _ = q.shape
    v_head_dim = views[0].values.dim
    out = q.new_empty(batch, heads, tokens, v_head_dim)
    lse = torch.empty(batch, heads, tokens, dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    kv_heads = views[0].keys.data.shape[1]
    rows = heads // kv_heads * tokens
    memory, wide = _shared_memory(q.device), q.dtype is torch.float32
    sizes = [tile_of(view, rows, memory, wide) for view in views]
    tiles = -(-rows // sizes[0].rows)
    splits = [
        splits_each or choose_splits(batch * kv_heads * tiles, view.most, gpu_of(q.device))
        for view in views
    ]
    slots = sum(splits)
    scratch = torch.empty(
        batch * heads * tokens, slots, v_head_dim, dtype=torch.float32, device=q.device
    )
    part_lse = torch.empty(scratch.shape[:2], dtype=torch.float32, device=q.device)
    options = ready(options, views[0].keys.dim, q.device)
    slot = 0
    for view, count, tile in zip(views, splits, sizes, strict=True):
        grid = (count, tiles, batch * kv_heads)
        turned = _rotated(q, view.keys)
        _launch(grid, turned, view, lengths, options, tile, scratch, part_lse, slot)
        slot += count
    merge_kernel[(scratch.shape[0], -(-v_head_dim // _MERGED))](
        scratch, scratch.stride(1), part_lse, slots,
        heads, tokens, out, lse, v_head_dim,
        SLOTS=_power(slots), DV=min(_MERGED, _power(v_head_dim)),
        **arguments(merge_kernel, options, lse),
    )  # fmt: skip
    return out, lse


def append(
    x: torch.Tensor,
    rows: Rows,
    table: torch.Tensor,
    page_size: int,
    first: torch.Tensor,
    *,
    rotated: bool = False,
    rotary: Angles | None = None,
) -> None:
    """Encode ``x`` ``[B, Hkv, T, D]`` into ``rows`` at positions ``first[b] + t``, in one pass.

    Args:
        table: int32 ``[B, P]``; positions without a page are skipped. first: int32 ``[B]``.
        rotated: rows are keys, and their format rotates them.
        rotary: applied before anything else.
    """
    batch, heads, tokens, dim = x.shape
    if x.numel() == 0:
        return
    none = first  # a pointer that is never followed
    cos = none if rotary is None else rotary.cos
    groups, width = _groups(rows), max(2 * LEAST_ROWS, _power(rows.fmt.stored_dim(dim)))
    append_kernel[(tokens, heads, batch)](
        x, *x.stride()[:3],
        rows.data, *rows.data.stride()[:3], *_scales(rows), groups,
        table, table.stride(0), page_size, page_size * table.shape[1], first,
        cos, none if rotary is None else rotary.sin,
        0 if rotary is None else cos.stride(0), 0 if rotary is None else cos.stride(1),
        0 if rotary is None else 2 * cos.shape[-1],
        heads, tokens, dim,
        D=width, GROUPS=width // rows.fmt.group if rows.fmt.grouped else 1,
        FORMAT=rows.fmt.code, PLAIN=rows.fmt.plain, HALVES=_halves(rows),
        ROTATION=rows.fmt.rotation(dim) if rotated else 0,
        ROTARY=rotary is not None, INTERLEAVED=rotary is not None and rotary.interleaved,
        num_warps=4 if _halves(rows) else 1,
    )  # fmt: skip


def _launch(
    grid: tuple[int, int, int],
    q: torch.Tensor,
    view: KVView,
    lengths: torch.Tensor,
    options: Options,
    tile: Tile,
    scratch: torch.Tensor,
    part_lse: torch.Tensor,
    slot: int,
) -> None:
    k, v = view.keys, view.values
    _, heads, tokens, head_dim = q.shape
    rope = head_dim - v.dim if view.within else 0
    kv_heads = k.data.shape[1]
    none, own = lengths, view.per_head  # a pointer that is never followed
    mask, kind = _mask(options.visibility.mask, q.shape)
    attend_kernel[grid](
        q, *q.stride()[:3],
        k.data, *k.data.stride()[:3], *_scales(k), v.data, *v.data.stride()[:3], *_scales(v),
        view.table, view.table.stride(0), view.table.stride(1) if own else 0, view.page_size,
        *((kv_heads, 1) if own else (1, 0)),
        none if view.begin is None else view.begin, view.end, lengths,
        none if mask is None else mask, *(mask.stride()[:3] if mask is not None else (0, 0, 0)),
        int(mask is not None and mask.shape[-1] > 1),
        scratch, scratch.stride(1), part_lse, scratch.shape[1], slot,
        kv_heads, heads // kv_heads, tokens,
        head_dim=head_dim - rope, v_head_dim=v.dim, rope_dim=rope,
        k_width=(v if rope else k).data.shape[-1], v_width=v.data.shape[-1],
        k_groups=_groups(k), v_groups=_groups(v),
        SPLITS=grid[0], M=tile.rows, N=tile.keys,
        D=_padded(v if rope else k), DV=_padded(v),
        ROPE=max(LEAST_ROWS, _power(rope)) if rope else 0,
        K_GROUPS=_power(_groups(k)), V_GROUPS=_power(_groups(v)),
        K_FORMAT=k.fmt.code, V_FORMAT=v.fmt.code, K_HALVES=_halves(k), V_HALVES=_halves(v),
        DOT=_DOTS[q.dtype],
        # Queries of float32 ask for its digits; tensor cores would keep ten bits of them.
        PRECISION="ieee" if q.dtype is torch.float32 else "tf32",
        ONE_PAGE=view.table.shape[-1] == 1, HAS_BEGIN=view.begin is not None, MASK_KIND=kind,
        **arguments(attend_kernel, options, none),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def _mask(mask: torch.Tensor | None, shape: torch.Size) -> tuple[torch.Tensor | None, int]:
    """The mask as ``[B, Hq, T, S]``, S contiguous or 1 for all keys, and its kind."""
    if mask is None:
        return None, 0
    mask = mask.detach()
    mask, kind = (mask.view(torch.uint8), 1) if mask.dtype == torch.bool else (mask.float(), 2)
    if mask.stride(-1) != 1:
        mask = mask.contiguous()
    return mask.expand(*shape[:3], mask.shape[-1]), kind


def _halves(rows: Rows) -> bool:
    """Whether a byte holds two numbers."""
    return rows.fmt.bits == 4


def _groups(rows: Rows) -> int:
    return rows.fmt.groups(rows.dim)


def _scales(rows: Rows) -> tuple[torch.Tensor, int, int]:
    """The scales and their strides; plain numbers have none, and their pointer is not followed."""
    if rows.scales is None:
        return rows.data, 0, 0
    return rows.scales, rows.scales.stride(0), rows.scales.stride(1)


def _padded(rows: Rows) -> int:
    """Numbers of a row as the kernel's arrays have them: a power of two, at least one product."""
    least = 2 * LEAST_ROWS if _halves(rows) else LEAST_ROWS
    return max(least, _power(rows.fmt.stored_dim(rows.dim)))


def _power(n: int) -> int:
    """The next power of two.

    >>> [_power(n) for n in (0, 1, 3, 80)]
    [1, 1, 4, 128]
    """
    return 1 << max(0, n - 1).bit_length()


def _rotated(q: torch.Tensor, k: Rows) -> torch.Tensor:
    """Queries for keys that are stored rotated; one matrix product."""
    size = k.fmt.rotation(k.dim)
    if not size:
        return q
    stored = k.fmt.stored_dim(k.dim)
    padded = torch.nn.functional.pad(q, (0, stored - k.dim))
    matrix = _hadamard(stored, size, q.device)
    return (padded.float() @ matrix).to(q.dtype)


@cache
def _hadamard(stored: int, size: int, device: torch.device) -> torch.Tensor:
    """The block-diagonal rotation of rows of ``stored`` numbers, float32."""
    return rotate(torch.eye(stored, dtype=torch.float32, device=device), size)


@cache
def gpu_of(device: torch.device) -> Gpu:
    """What the split rule needs to know of a device; the interpreter plays a small one."""
    if device.type != "cuda":
        return Gpu(multiprocessors=4, blocks_each=1)
    return Gpu(torch.cuda.get_device_properties(device).multi_processor_count)


@cache
def _shared_memory(device: torch.device) -> int:
    """Bytes that a program may have; the interpreter plays a large GPU."""
    if device.type != "cuda":
        return 227 << 10
    return int(
        getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 0)
    )
