"""What caches refuse, in one line each."""

import torch

from kvfold.errors import InputError
from kvfold.kernels.library import MAX_DIM

KINDS = ("contiguous", "paged", "sliding")
_RANGES = {
    "num_kv_heads": (1, 1 << 16),
    "head_dim": (1, MAX_DIM),
    "v_head_dim": (1, MAX_DIM),
    "batch": (0, 1 << 20),
    "page_size": (1, 1 << 20),
    "exact_first": (0, 1 << 20),
    "exact_recent": (0, 1 << 20),
    "max_length": (1, (1 << 31) - 1),
    "window": (1, (1 << 31) - 1),
    "sinks": (0, 1 << 20),
    "slack": (0, (1 << 31) - 1),
}


def check_sizes(**sizes: int | None) -> None:
    """Refuse sizes out of range; None is not given."""
    for name, size in sizes.items():
        low, high = _RANGES[name]
        if size is not None and not low <= size <= high:
            raise InputError(f"{name}={size}: expected {low} to {high}")


def check_kind(kind: str, window: int | None) -> None:
    """A sliding cache needs a window; other kinds are given theirs when attending."""
    if kind not in KINDS:
        raise InputError(f"unknown kind of cache {kind!r}", f"choose one of {', '.join(KINDS)}")
    if (kind == "sliding") != (window is not None):
        raise InputError(
            f"kind={kind!r} with window={window}",
            "a sliding cache needs a window; give other kinds theirs when attending",
        )


def check_rows(
    name: str, x: torch.Tensor, batch: int, heads: int | None, dim: int, device: torch.device
) -> None:
    """Refuse anything but float ``[batch, heads, T, dim]`` on ``device``; None: any heads."""
    fits = x.dim() == 4 and x.shape[0] == batch and x.shape[3] == dim
    if not fits or (heads is not None and x.shape[1] != heads):
        expected = f"[{batch}, {'Hq' if heads is None else heads}, T, {dim}]"
        raise InputError(f"{name} has shape {list(x.shape)}, expected {expected}")
    if x.device.type != device.type:
        raise InputError(
            f"{name} is on {x.device}, but this cache is on {device}",
            "give the cache the device of the model: KVCache(..., device=...)",
        )
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise InputError(f"{name} is {x.dtype}, expected float32, float16 or bfloat16")


def need_gradients(*tensors: torch.Tensor | None) -> bool:
    """Whether anyone waits for the gradient of one of these."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def refuse_gradients(*tensors: torch.Tensor | None) -> None:
    """Caches keep numbers, not what they were computed from.

    Raises:
        InputError: if gradients would be lost.
    """
    if need_gradients(*tensors):
        raise InputError(
            "a KV cache is for inference, but gradients are needed here",
            "call the model under torch.inference_mode() or torch.no_grad()",
        )
