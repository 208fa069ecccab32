"""The compiled C++ kernels as a backend: decoding and prompts on CPUs."""

from typing import Any

import torch

from kvfold.errors import RunError
from kvfold.kernels.backend import Call, Found, Kernels
from kvfold.kernels.cpu.call import KNOWN, KernelCall, append
from kvfold.kernels.cpu.fixed import append_fixed, attend_fixed
from kvfold.kernels.cpu.library import Library, library, why_missing
from kvfold.kernels.cpu.move import move
from kvfold.kernels.cpu.rows import attend_rows
from kvfold.kernels.cpu.select import choose
from kvfold.kernels.limits import BLOCK, MAX_DIM, MAX_TOKENS
from kvfold.kernels.selection import Chosen, Question
from kvfold.kernels.view import Angles, KVView

# Products of numbers of queries and of keys from which many queries over tensors are faster here
# than by PyTorch. Measured on an EPYC with AVX-512 BF16, one thread, causal, prompts of 512 to
# 8,192 tokens, 9 heads of 64 to 32 of 128: 3.1 to 5.7 times PyTorch's speed in bfloat16, 2.2 to 3.6
# in float32, 3.4 to 6.8 in float16; with AVX2 alone 1.7 to 3.4; without vectors 0.7 to 0.9: not
# taken. At 2^20 products it is 1.4, 1.0 and 2.4, at 2^17 0.8, 0.7 and 1.2: a call costs 40 us.
_WORTH = 1 << 21
_NO_VECTORS = "baseline"


class Cpu(Kernels):
    """Kernels for few queries, which read each key and value once, and for many."""

    name = "cpu"
    max_dim = MAX_DIM
    replays = True
    prompts = True
    knows = KNOWN

    def here(self, device: torch.device) -> bool:
        return device.type == "cpu" and library() is not None

    def why_not(self, call: Call) -> str | None:
        if call.gradients or call.dropout:
            return "gradients are needed, which the kernels do not have"
        if not call.few and _pytorch_is_faster(call):
            return "what PyTorch multiplies faster"
        if call.q.dtype is torch.float64 or max(call.q.shape[3], call.v_head_dim) > MAX_DIM:
            return "a dtype or head size without a kernel"
        if call.home != self.name:
            return _missing() or f"the kernels that are asked for are {call.home}"
        return None

    def why(self, call: Call) -> str:
        if call.q.shape[2] > MAX_TOKENS:
            return "many queries on the CPU: tiles of keys are multiplied with all that see them"
        return "few queries on the CPU: each key and value is read once"

    def attend(self, call: Call) -> Found:
        if call.tensors is not None:
            return attend_rows(call.q, *call.tensors, *call.options.flat())
        if isinstance(call.lengths, torch.Tensor) and torch.compiler.is_compiling():
            return attend_fixed(call.q, call.views[0], call.options, call.v_head_dim)
        kept: dict[str, Any] = {} if call.kept is None else call.kept
        run: KernelCall | None = kept.get(self.name)
        if run is None:
            run = KernelCall(call.q, call.num_kv_heads, call.lengths, call.options, call.keys)
            kept[self.name] = run
        else:
            run.ask(call.q)
        return run.run(_library(), call.views, call.v_head_dim, call.return_lse, call.out)

    def packs(self, page_size: int) -> bool:
        """They read blocks of 16 tokens; smaller pages hold plain rows."""
        return page_size % BLOCK == 0

    def append(
        self,
        k: torch.Tensor,
        v: torch.Tensor,
        view: KVView,
        angles: Angles | None = None,
        kept: dict[str, Any] | None = None,
    ) -> None:
        if isinstance(view.end, torch.Tensor):
            append_fixed(k, v, view)
        else:
            append(_library(), k, v, view, kept)

    def move(self, view: KVView, sources: list[torch.Tensor]) -> None:
        move(_library(), view, sources)

    def choose(self, question: Question) -> Chosen:
        return choose(_library(), question)


def _pytorch_is_faster(call: Call) -> bool:
    """Whether PyTorch computes what is no step of decoding in less time."""
    batch, heads, tokens, dim = call.q.shape
    if call.views:  # which it would have to decode
        return False
    if tokens > MAX_TOKENS and call.q.dtype is torch.bfloat16 and _has_amx():
        return True  # by AMX, 0.8 to 1.3 times as fast as these (benchmarks/LOG.md)
    return batch * heads * tokens * call.keys * dim < _WORTH or not _has_vectors()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _has_vectors() -> bool:
    found = library()
    return found is None or found.isa != _NO_VECTORS


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _has_amx() -> bool:
    return bool(torch.cpu._is_amx_tile_supported())


def _library() -> Library:
    found = library()
    if found is None:
        raise RunError("the CPU kernels that this cache was made for are missing")
    return found


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _missing() -> str:
    """Why there are no kernels, or nothing; torch.compile takes it as it is."""
    return "" if library() is not None else f"the CPU kernels are missing ({why_missing()})"
