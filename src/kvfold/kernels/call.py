"""One call of the CPU kernels, and the tensors that must live as long as it runs."""

import torch

from kvfold.kernels.library import Attend, Library, Part, Tensor


class KernelCall:
    """Attention of ``q`` ``[B, Hq, T, D]`` over stores of ``num_kv_heads`` heads.

    Args:
        lengths: int32 ``[B]``; the last query stands at position ``lengths[b] - 1``.
        window: 0 for none. softcap: 0 for none.
    """

    def __init__(
        self,
        q: torch.Tensor,
        num_kv_heads: int,
        lengths: torch.Tensor,
        *,
        causal: bool,
        window: int,
        sinks: int,
        scale: float | None,
        softcap: float,
    ) -> None:
        self._q = readable(q)
        self._kept: list[torch.Tensor] = [lengths]
        self._call = call = Attend()
        call.batch, call.num_heads, call.tokens, call.head_dim = self._q.shape
        call.num_kv_heads = num_kv_heads
        call.q = Tensor.of(self._q)
        call.length = lengths.data_ptr()
        call.scale = call.head_dim**-0.5 if scale is None else scale
        call.softcap = softcap
        call.causal = causal
        call.window = window
        call.sinks = sinks

    def kept(self, x: torch.Tensor) -> torch.Tensor:
        """Keep a tensor alive until the call has run."""
        self._kept.append(x)
        return x

    def hide(
        self,
        start: torch.Tensor | None,
        mask: torch.Tensor | None,
        slopes: torch.Tensor | None,
        keys: int,
    ) -> None:
        """Set what is hidden or biased; ``mask`` broadcasts to ``[B, Hq, T, keys]``."""
        call = self._call
        if start is not None:
            call.start = self.kept(start.to(torch.int32).contiguous()).data_ptr()
        if slopes is not None:
            call.slopes = self.kept(slopes.detach().float().contiguous()).data_ptr()
        if mask is not None:
            shape = (call.batch, call.num_heads, call.tokens, keys)
            full = _additive(mask)
            if full.shape[-1] != keys:
                full = full.expand(*full.shape[:-1], keys).contiguous()
            view = self.kept(full).expand(shape)
            call.mask = view.data_ptr()
            strides = view.stride()
            call.mask_batch_stride, call.mask_head_stride, call.mask_token_stride = strides[:3]

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
