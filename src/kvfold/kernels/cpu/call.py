"""One call of the CPU kernels, and the tensors that must live as long as it runs."""

from typing import TypeVar

import torch

from kvfold.errors import InputError
from kvfold.kernels.cpu.library import Attend, Library, Part, Tensor
from kvfold.kernels.cpu.pointer import Buffer, Int32s, has_contiguous_rows
from kvfold.ops.options import Options, Scoring, Visibility, limit

_QUERIES, _OUT, _LSE = Buffer("q"), Buffer("out"), Buffer("lse", torch.float32)
_START, _MASK = Buffer("start", torch.int32), Buffer("mask", torch.float32)
_SLOPES, _SINKS = (Buffer(name, torch.float32) for name in ("alibi_slopes", "sink_logits"))

Kept = TypeVar("Kept", torch.Tensor, Int32s)


class KernelCall:
    """Attention of ``q`` ``[B, Hq, T, D]`` over stores of ``num_kv_heads`` heads.

    Args:
        lengths: of each sequence; its last query stands at position ``lengths[b] - 1``.
        options: their own ``lengths`` are not read.
        keys: the most positions of a sequence, for which the mask has entries.

    Raises:
        InputError: for tensors that the kernels cannot read as they are meant.
    """

    def __init__(
        self,
        q: torch.Tensor,
        num_kv_heads: int,
        lengths: list[int],
        options: Options,
        keys: int,
    ) -> None:
        self._q = readable(q)
        self.lengths = Int32s(lengths)
        self._kept: list[object] = []
        self._call = call = Attend()
        shape = self._q.shape
        call.batch, call.num_heads, call.tokens, call.head_dim = shape
        call.num_kv_heads = num_kv_heads
        call.q = Tensor.of(self._q, shape, _QUERIES)
        if len(lengths) != call.batch:
            raise InputError(f"{len(lengths)} lengths for {call.batch} sequences of queries")
        call.length = self.lengths.address
        sight, scoring = options
        call.scale = call.head_dim**-0.5 if scoring.scale is None else scoring.scale
        call.softcap = scoring.softcap or 0.0
        call.left, call.right = limit(sight.left), limit(sight.right)
        call.sinks = sight.sinks
        self._hide(sight, scoring, keys)

    def kept(self, x: Kept) -> Kept:
        """Keep what C reads alive until the call has run."""
        self._kept.append(x)
        return x

    def _hide(self, sight: Visibility, scoring: Scoring, keys: int) -> None:
        """Set the tensors that hide or bias scores."""
        call, start, mask, slopes = self._call, sight.start, sight.mask, scoring.alibi_slopes
        if start is not None:
            first = self.kept(start.to(torch.int32).contiguous())
            call.start = _START.address(first, (call.batch,))
        if slopes is not None:
            call.slopes = self._per_head(slopes, _SLOPES)
        if scoring.sink_logits is not None:
            call.sink_logits = self._per_head(scoring.sink_logits, _SINKS)
        if mask is not None:
            shape = (call.batch, call.num_heads, call.tokens, keys)
            full = _additive(mask)
            if full.shape[-1] != keys:
                full = full.expand(*full.shape[:-1], keys).contiguous()
            view = self.kept(full).expand(shape)
            call.mask = _MASK.row_address(view, shape)
            strides = view.stride()
            call.mask_batch_stride, call.mask_head_stride, call.mask_token_stride = strides[:3]

    def _per_head(self, numbers: torch.Tensor, buffer: Buffer) -> int:
        each = self.kept(numbers.detach().resolve_neg().float().contiguous())
        return buffer.address(each, (self._call.num_heads,))

    def run(
        self, lib: Library, parts: list[Part], v_head_dim: int, return_lse: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The output ``[B, Hq, T, Dv]`` in q's dtype, and perhaps the log-sum-exp."""
        call, shape = self._call, self._q.shape[:3]
        out = self._q.new_empty(*shape, v_head_dim)
        call.v_head_dim = v_head_dim
        call.out = Tensor.of(out, (*shape, v_head_dim), _OUT)
        lse = None
        if return_lse:
            lse = torch.empty(shape, dtype=torch.float32, device=out.device)
            call.lse = _LSE.address(lse, shape)
        call.num_parts = len(parts)
        for index, part in enumerate(parts):
            call.parts[index] = part
        lib.attend(call)
        return out, lse


def readable(x: torch.Tensor) -> torch.Tensor:
    """Numbers as they are, the last dimension contiguous: what the kernels need, nothing else."""
    if x.requires_grad:
        x = x.detach()
    if x.is_neg():  # the imaginary part of a conjugate: its memory holds the other sign
        x = x.resolve_neg()
    return x if has_contiguous_rows(x) else x.clone(memory_format=torch.contiguous_format)


def _additive(mask: torch.Tensor) -> torch.Tensor:
    mask = mask.detach().resolve_neg()
    if mask.dtype == torch.bool:
        nothing = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
        return nothing.masked_fill(~mask, -torch.inf)
    return mask.float().contiguous()
