"""One call of the CPU kernels, and the tensors that must live as long as it runs."""

import torch

from kvfold.kernels.library import Attend, Library, Part, Tensor
from kvfold.ops.options import Options, limit


class KernelCall:
    """Attention of ``q`` ``[B, Hq, T, D]`` over stores of ``num_kv_heads`` heads.

    Args:
        lengths: int32 ``[B]``; the last query stands at position ``lengths[b] - 1``.
        options: their own ``lengths`` are not read.
        keys: the most positions of a sequence, for which ``options.mask`` has entries.
    """

    def __init__(
        self,
        q: torch.Tensor,
        num_kv_heads: int,
        lengths: torch.Tensor,
        options: Options,
        keys: int,
    ) -> None:
        self._q = readable(q)
        self._kept: list[torch.Tensor] = [lengths]
        self._call = call = Attend()
        call.batch, call.num_heads, call.tokens, call.head_dim = self._q.shape
        call.num_kv_heads = num_kv_heads
        call.q = Tensor.of(self._q)
        call.length = lengths.data_ptr()
        call.scale = call.head_dim**-0.5 if options.scale is None else options.scale
        call.softcap = options.softcap or 0.0
        call.left, call.right = limit(options.left), limit(options.right)
        call.sinks = options.sinks
        self._hide(options, keys)

    def kept(self, x: torch.Tensor) -> torch.Tensor:
        """Keep a tensor alive until the call has run."""
        self._kept.append(x)
        return x

    def _hide(self, options: Options, keys: int) -> None:
        """Set the tensors that hide or bias scores."""
        call, start, mask, slopes = self._call, options.start, options.mask, options.alibi_slopes
        if start is not None:
            call.start = self.kept(start.to(torch.int32).contiguous()).data_ptr()
        if slopes is not None:
            call.slopes = self._per_head(slopes)
        if options.sink_logits is not None:
            call.sink_logits = self._per_head(options.sink_logits)
        if mask is not None:
            shape = (call.batch, call.num_heads, call.tokens, keys)
            full = _additive(mask)
            if full.shape[-1] != keys:
                full = full.expand(*full.shape[:-1], keys).contiguous()
            view = self.kept(full).expand(shape)
            call.mask = view.data_ptr()
            strides = view.stride()
            call.mask_batch_stride, call.mask_head_stride, call.mask_token_stride = strides[:3]

    def _per_head(self, numbers: torch.Tensor) -> int:
        return self.kept(numbers.detach().float().contiguous()).data_ptr()

    def run(
        self, lib: Library, parts: list[Part], v_head_dim: int, return_lse: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The output ``[B, Hq, T, Dv]`` in q's dtype, and perhaps the log-sum-exp."""
        call, shape = self._call, self._q.shape[:3]
        out = self._q.new_empty(*shape, v_head_dim)
        lse = torch.empty(shape) if return_lse else None
        call.v_head_dim = v_head_dim
        call.out = Tensor.of(out)
        call.lse = None if lse is None else lse.data_ptr()
        call.num_parts = len(parts)
        for index, part in enumerate(parts):
            call.parts[index] = part
        lib.attend(call)
        return out, lse


def readable(x: torch.Tensor) -> torch.Tensor:
    """The kernels need the last dimension contiguous, nothing else."""
    x = x.detach()
    return x if x.stride(-1) == 1 else x.contiguous()


def _additive(mask: torch.Tensor) -> torch.Tensor:
    mask = mask.detach()
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    return mask.float().contiguous()
