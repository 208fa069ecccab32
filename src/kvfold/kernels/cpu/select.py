"""Choosing pages, by the CPU kernels."""

import torch

from kvfold.errors import InputError
from kvfold.kernels.cpu.call import side_of
from kvfold.kernels.cpu.header import CONSTANTS
from kvfold.kernels.cpu.library import Library, Select, Tensor
from kvfold.kernels.cpu.pointer import Buffer, Int32s
from kvfold.kernels.selection import Chosen, Question
from kvfold.kernels.view import readable
from kvfold.ops.select import SPREADS

_KINDS = {"spread": CONSTANTS["KVF_SPREAD"], "box": CONSTANTS["KVF_BOX"]}
_QUERIES, _TABLE, _CHOSEN = Buffer("q"), Buffer("table", torch.int32), Buffer("pages", torch.int32)
_COUNTS, _WEIGHTS = Buffer("counts", torch.int32), Buffer("weights", torch.float32)


def choose(lib: Library, question: Question, weights: torch.Tensor | None = None) -> Chosen:
    """As ``choose_by_pytorch``.

    Args:
        weights: float32 ``[B, Hkv, pages]`` to be filled with what pages count that may be left
            out, the first of them first.
    """
    q, rows, table = readable(question.q), question.summaries, question.table
    readings = question.readings
    if len(readings) != q.shape[0] or len(table) != q.shape[0]:
        raise InputError(f"{len(readings)} readings of {len(table)} rows for {q.shape[0]} queries")
    if any(not 0 <= r.always <= r.last <= table.shape[1] or r.keep < 0 for r in readings):
        raise InputError(f"readings {readings} of {table.shape[1]} pages")
    batch, heads = q.shape[0], rows.data.shape[1]
    most = max((r.always + min(r.keep, r.last - r.always) for r in readings), default=0)
    found = torch.empty(batch, heads, most, dtype=torch.int32, device=q.device)
    counts = torch.empty(batch, heads, dtype=torch.int32, device=q.device)
    always = Int32s(r.always for r in readings)
    last, keep = Int32s(r.last for r in readings), Int32s(r.keep for r in readings)
    call = Select(batch, q.shape[1], heads, *q.shape[2:])
    call.q, call.summary = Tensor.of(q, q.shape, _QUERIES), side_of(rows, 2, True)
    call.table = _TABLE.row_address(table, table.shape)
    call.table_stride = table.stride(0)
    call.always, call.last, call.keep = always.address, last.address, keep.address
    call.scale, call.softcap = question.scale, question.softcap or 0.0
    call.top_p, call.spreads = question.top_p or 0.0, SPREADS
    call.kind = _KINDS[question.by]
    call.chosen, call.room = _CHOSEN.address(found, found.shape), most
    call.count = _COUNTS.address(counts, counts.shape)
    if weights is not None:
        call.weights = _WEIGHTS.address(weights, (batch, heads, weights.shape[2]))
        call.weights_room = weights.shape[2]
    lib.select(call)
    return Chosen(found, counts)
