"""Calling the decoding kernels: sizes of tiles, splits, scratch memory."""

import os
from dataclasses import dataclass
from functools import cache

import torch
import triton.language as tl

from kvfold.kernels.triton.append import append_kernel
from kvfold.kernels.triton.decode import (
    FP8,
    INT4,
    INT8,
    PLAIN,
    attend_kernel,
    merge_kernel,
)
from kvfold.kernels.triton.splits import Gpu, choose_splits
from kvfold.ops.format import Format
from kvfold.ops.options import FIELDS, Options, limit, unflattened
from kvfold.ops.rotation import rotate

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
LEAST_ROWS = 16  # the smallest M of a matrix product
MOST_ROWS = 64
_HALVES = 32  # numbers that the append kernel splits into pairs at once
_KINDS = {"fp8": FP8, "int8": INT8, "int4": INT4}
# The dtype of products; the interpreter has none of bfloat16.
_DOTS = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.float32 if INTERPRETED else tl.bfloat16,
}


@dataclass(frozen=True)
class Rows:
    """Encoded rows of keys, or of values: pages of one head after another.

    Attributes:
        data: ``[P, Hkv, page_size, row]``: floats, or bytes of an encoded format.
        scales: ``[P, Hkv, page_size, groups]`` bfloat16; no groups for plain numbers.
        dim: numbers of a row.
    """

    fmt: Format
    data: torch.Tensor
    scales: torch.Tensor
    dim: int

    @property
    def kind(self) -> int:
        return _KINDS.get(self.fmt.name, PLAIN)

    @property
    def groups(self) -> int:
        return self.fmt.groups(self.dim)

    def strides(self) -> tuple[int, int, int]:
        return self.data.stride(0), self.data.stride(1), self.data.stride(2)


@dataclass(frozen=True)
class GpuPart:
    """A store and which positions of each sequence it holds.

    Attributes:
        table: int32 ``[B, pages]``. begin, end: int32 ``[B]``; begin None is 0.
        keys: the most positions any sequence holds here, or may hold when a graph is replayed.
    """

    k: Rows
    v: Rows
    table: torch.Tensor
    page_size: int
    begin: torch.Tensor | None
    end: torch.Tensor
    keys: int


def attend(
    q: torch.Tensor,
    parts: list[GpuPart],
    lengths: torch.Tensor,
    options: Options,
    splits_each: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of ``q`` ``[B, Hq, T, D]`` over the positions that ``parts`` hold.

    Nothing here waits for the GPU, and the number of launches depends on shapes alone, so a call
    can be captured in a CUDA graph and replayed as lengths grow within ``keys``.

    Args:
        parts: their INT4 keys are rotated; ``q`` must be given unrotated, and is rotated here.
        lengths: int32 ``[B]``; the last query stands at ``lengths[b] - 1``.
        options: their own ``lengths`` are not read.
        splits_each: of every part, to override the rule.

    Returns:
        ``[B, Hq, T, Dv]`` in q's dtype and the log-sum-exp ``[B, Hq, T]`` float32.
    """
    batch, heads, tokens, _ = q.shape
    v_head_dim = parts[0].v.dim
    out = q.new_empty(batch, heads, tokens, v_head_dim)
    lse = torch.empty(batch, heads, tokens, dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    kv_heads = parts[0].k.data.shape[1]
    rows = heads // kv_heads * tokens
    tile = min(MOST_ROWS, max(LEAST_ROWS, _power(rows)))
    tiles = -(-rows // tile)
    splits = [
        splits_each or choose_splits(batch * kv_heads * tiles, part.keys, gpu_of(q.device))
        for part in parts
    ]
    slots = sum(splits)
    scratch = torch.empty(
        batch * heads * tokens, slots, v_head_dim, dtype=torch.float32, device=q.device
    )
    part_lse = torch.empty(scratch.shape[:2], dtype=torch.float32, device=q.device)
    options = _ready(options, q.device)
    slot = 0
    for part, count in zip(parts, splits, strict=True):
        grid = (count, tiles, batch * kv_heads)
        _launch(grid, _rotated(q, part.k), part, lengths, options, tile, scratch, part_lse, slot)
        slot += count
    merge_kernel[(scratch.shape[0],)](
        scratch, scratch.stride(1), part_lse, slots,
        lse if options.scoring.sink_logits is None else options.scoring.sink_logits, heads, tokens,
        out, lse, v_head_dim,
        SLOTS=_power(slots), DV=_power(v_head_dim),
        HAS_SINKS=options.scoring.sink_logits is not None,
    )  # fmt: skip
    return out, lse


@dataclass(frozen=True)
class Angles:
    """Rotary embedding to apply while appending keys.

    Attributes:
        cos, sin: float32 ``[B, T, r / 2]``. interleaved: pairs are (2j, 2j + 1), else
            (j, j + r/2).
    """

    cos: torch.Tensor
    sin: torch.Tensor
    interleaved: bool = False


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
        rotated: rows are keys whose format rotates them (INT4).
        rotary: applied before anything else.
    """
    batch, heads, tokens, dim = x.shape
    if x.numel() == 0:
        return
    none = first  # a pointer that is never followed
    cos = none if rotary is None else rotary.cos
    width = rows.fmt.stored_dim(dim)
    append_kernel[(tokens, heads, batch)](
        x, *x.stride()[:3],
        rows.data, *rows.strides(), rows.scales, rows.scales.stride(0), rows.scales.stride(1),
        rows.groups, table, table.stride(0), page_size, page_size * table.shape[1], first,
        cos, none if rotary is None else rotary.sin,
        0 if rotary is None else cos.stride(0), 0 if rotary is None else cos.stride(1),
        0 if rotary is None else 2 * cos.shape[-1],
        heads, tokens, dim,
        D=max(_HALVES, _power(width)), GROUPS=max(1, _power(width) // _HALVES),
        FORMAT=rows.kind, ROTATION=rows.fmt.rotation(dim) if rotated else 0,
        ROTARY=rotary is not None, INTERLEAVED=rotary is not None and rotary.interleaved,
        num_warps=1 if rows.kind != INT4 else 4,
    )  # fmt: skip


def _launch(
    grid: tuple[int, int, int],
    q: torch.Tensor,
    part: GpuPart,
    lengths: torch.Tensor,
    options: Options,
    tile: int,
    scratch: torch.Tensor,
    part_lse: torch.Tensor,
    slot: int,
) -> None:
    k, v = part.k, part.v
    _, heads, tokens, head_dim = q.shape
    kv_heads = k.data.shape[1]
    none = lengths  # a pointer that is never followed
    sight, scoring = options
    mask, kind = _mask(sight.mask, q.shape)
    scale = scoring.scale if scoring.scale is not None else k.dim**-0.5
    attend_kernel[grid](
        q, *q.stride()[:3],
        k.data, *k.strides(), k.scales, k.scales.stride(0), k.scales.stride(1),
        v.data, *v.strides(), v.scales, v.scales.stride(0), v.scales.stride(1),
        part.table, part.table.stride(0), part.page_size,
        none if part.begin is None else part.begin, part.end, lengths,
        none if sight.start is None else sight.start,
        none if scoring.alibi_slopes is None else scoring.alibi_slopes,
        none if mask is None else mask, *(mask.stride()[:3] if mask is not None else (0, 0, 0)),
        int(mask is not None and mask.shape[-1] > 1),
        scratch, scratch.stride(1), part_lse, scratch.shape[1], slot,
        kv_heads, heads // kv_heads, tokens,
        scale, scoring.softcap or 1.0, limit(sight.left), limit(sight.right), sight.sinks,
        head_dim=head_dim, v_head_dim=v.dim, k_groups=k.groups, v_groups=v.groups,
        SPLITS=grid[0], M=tile, N=_tile_keys(k, v),
        D=_padded(k), DV=_padded(v), K_GROUPS=_power(k.groups), V_GROUPS=_power(v.groups),
        K_FORMAT=k.kind, V_FORMAT=v.kind, DOT=_DOTS[q.dtype],
        # Queries of float32 ask for its digits; tensor cores would keep ten bits of them.
        PRECISION="ieee" if q.dtype is torch.float32 else "tf32",
        ONE_PAGE=part.table.shape[1] == 1, HAS_LEFT=sight.left is not None,
        HAS_RIGHT=sight.right is not None, SOFTCAP=scoring.softcap is not None,
        HAS_BEGIN=part.begin is not None, HAS_START=sight.start is not None,
        HAS_SLOPES=scoring.alibi_slopes is not None, MASK_KIND=kind,
        num_warps=4, num_stages=3,
    )  # fmt: skip


def _ready(options: Options, device: torch.device) -> Options:
    """With tensors of the dtypes that the kernels read, where they run."""

    values = [
        x if x is None or kind.dtype is None else x.detach().to(device, kind.dtype).contiguous()
        for x, kind in zip(options.flat(), FIELDS.values(), strict=True)
    ]
    return unflattened(values)


def _mask(mask: torch.Tensor | None, shape: torch.Size) -> tuple[torch.Tensor | None, int]:
    """The mask as ``[B, Hq, T, S]``, S contiguous or 1 for all keys, and its kind."""
    if mask is None:
        return None, 0
    mask = mask.detach()
    mask, kind = (mask.view(torch.uint8), 1) if mask.dtype == torch.bool else (mask.float(), 2)
    if mask.stride(-1) != 1:
        mask = mask.contiguous()
    return mask.expand(*shape[:3], mask.shape[-1]), kind


def _tile_keys(k: Rows, v: Rows) -> int:
    """Keys of a tile: what keeps about 32 KiB in flight, so 64 for 128 bf16 numbers."""
    row_bytes = max(k.fmt.row_bytes(k.dim), v.fmt.row_bytes(v.dim))
    return min(128, max(32, _power(8192 // row_bytes)))


def _padded(rows: Rows) -> int:
    """Numbers of a row as the kernel's arrays have them: a power of two, at least one product."""
    least = _HALVES if rows.kind == INT4 else LEAST_ROWS
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
