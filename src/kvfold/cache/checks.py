"""What caches refuse, in one line each."""

from numbers import Integral
from typing import TypeGuard

import torch

from kvfold.errors import InputError
from kvfold.kernels.backend import need_gradients
from kvfold.kernels.limits import MAX_DIM
from kvfold.names import shown
from kvfold.ops.evict import Evict
from kvfold.ops.format import Format
from kvfold.ops.formats import format_of
from kvfold.ops.options import PLACELESS, Options
from kvfold.ops.rope import Rotary
from kvfold.ops.select import Select

KINDS = ("contiguous", "paged", "sliding")
_RANGES = {
    "num_heads": (1, 1 << 16),
    "num_kv_heads": (1, 1 << 16),
    "hidden_size": (1, 1 << 22),
    "kv_hidden_size": (1, 1 << 22),
    "head_dim": (1, MAX_DIM),
    "v_head_dim": (1, MAX_DIM),
    "kv_lora_rank": (1, MAX_DIM),
    "q_lora_rank": (1, 1 << 22),
    "qk_nope_head_dim": (1, MAX_DIM),
    "qk_rope_head_dim": (2, MAX_DIM),
    "batch": (0, 1 << 20),
    "page_size": (1, 1 << 20),
    "exact_first": (0, 1 << 20),
    "exact_recent": (0, 1 << 20),
    "max_length": (1, (1 << 31) - 1),
    "window": (1, (1 << 31) - 1),
    "sinks": (0, 1 << 20),
    "slack": (0, (1 << 31) - 1),
    "queries": (0, (1 << 31) - 1),
    "length": (0, (1 << 31) - 1),
    "splits": (1, 1 << 16),
    "spare": (0, 1 << 24),
}


_MAY_BE_NONE = {
    "max_length", "window", "exact_first", "exact_recent", "queries", "splits", "q_lora_rank",
}  # fmt: skip


def check_sizes(**sizes: object) -> None:
    """Refuse what is no whole number in its range."""
    for name, size in sizes.items():
        low, high = _RANGES[name]
        if size is None and name in _MAY_BE_NONE:
            continue
        if not _is_whole(size) or not low <= size <= high:
            raise InputError(f"{name}={shown(size)}: expected a whole number, {low} to {high}")


def _is_whole(x: object) -> TypeGuard[int]:
    return type(x) is int or (isinstance(x, Integral) and not isinstance(x, bool))


def check_switches(**switches: object) -> None:
    """Refuse what is neither True nor False."""
    for name, on in switches.items():
        if not isinstance(on, bool | int):
            raise InputError(f"{name}={shown(on)}: expected True or False")


def check_tensor(name: str, x: object) -> None:
    """Refuse what is no tensor."""
    if not isinstance(x, torch.Tensor):
        raise InputError(f"{name} is {shown(x)}, expected a tensor", "torch.as_tensor makes one")


def check_formats(dtype: object) -> tuple[Format, Format]:
    """The formats of keys and values."""
    pair = dtype if isinstance(dtype, tuple | list) else (dtype, dtype)
    if len(pair) != 2 or not all(isinstance(x, str | torch.dtype) for x in pair):
        raise InputError(
            f"dtype={shown(dtype)}: expected a cache dtype, or a pair for keys and values",
            'for instance "int8", torch.bfloat16 or ("int8", "int4")',
        )
    return format_of(pair[0]), format_of(pair[1])


def check_dtype(dtype: object) -> None:
    """Refuse what is no dtype of real numbers."""
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        hint = "for instance torch.bfloat16"
        raise InputError(f"dtype={shown(dtype)}: expected a float dtype", hint)


def check_device(device: object) -> torch.device:
    """The device, which must be there."""
    try:
        if not isinstance(device, str | torch.device):
            raise TypeError("expected a name or a torch.device")
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        why = str(error).splitlines()[0] if str(error) else "not there"
        raise InputError(f"device={shown(device)}: {why}", 'for instance "cpu"') from error
    if found.type == "meta":
        raise InputError("device='meta' has no memory for a cache", 'for instance "cpu"')
    return found


def check_select(select: object, kind: str = "paged", window: object = None) -> None:
    """Refuse what chooses no pages, and caches without pages that could be chosen."""
    if select is None:
        return
    if not isinstance(select, Select):
        raise InputError(
            f"select={shown(select)}: expected kvfold.Select(...) or None",
            "kvfold.Select(budget=0.25) reads a quarter",
        )
    if kind != "paged" or window is not None:
        given = f"kind={kind!r}" if window is None else f"window={window}"
        raise InputError(
            f"select reads some pages of a whole sequence, which {given} does not keep",
            'use kind="paged" without a window',
        )


def check_policy(how: object) -> None:
    """Refuse what says nothing of eviction."""
    if not isinstance(how, Evict):
        raise InputError(
            f"evict: {shown(how)}: expected kvfold.Evict(...)",
            "kvfold.Evict(budget=0.5) keeps half",
        )


def check_evict(kind: str, rows: list[int]) -> None:
    """Refuse to forget what cannot be freed."""
    if kind != "paged":
        raise InputError(f"evict frees pages, which kind={kind!r} does not have", 'kind="paged"')
    if len(set(rows)) < len(rows):
        raise InputError(f"sequences={rows}: each can be named once", "for instance [0, 2]")


def check_budget_of(how: Evict, length: int) -> None:
    """Refuse to forget what is always kept."""
    kept, least = how.tokens(length), how.sinks + how.recent
    if kept < min(least, length):
        raise InputError(
            f"budget={how.budget} of {length} tokens is {kept}, less than sinks + recent: {least}",
            "keep more, or fewer sinks and recent tokens",
        )


def check_placeless(options: Options) -> None:
    """Refuse options that ask where keys stand, of a cache that does not know it of all."""
    names = ["window" if name == "left" else name for name in options.beyond(PLACELESS)]
    if names:
        raise InputError(
            f"{' and '.join(names)}: a cache that evicts does not know where keys stood",
            "leave that out; start= is for padding on the left",
        )


def check_scores(by: object, shape: tuple[int, int, int]) -> torch.Tensor:
    """What positions are kept by: numbers ``[B, Hkv, S]``, or where they stand."""
    batch, heads, most = shape
    if isinstance(by, str):
        if by != "recent":
            raise InputError(
                f"by={by!r}: expected scores [{batch}, {heads}, {most}] or 'recent'",
                "by=cache.scores(q) goes by the attention of queries",
            )
        return torch.arange(most, dtype=torch.float64, device="cpu").expand(shape)
    check_tensor("by", by)
    assert isinstance(by, torch.Tensor)
    if by.shape != shape or not by.is_floating_point() or bool(by.isnan().any()):
        given = f"{by.dtype} {list(by.shape)}" + (", with NaN" if by.shape == shape else "")
        raise InputError(
            f"by is {given}: expected float numbers {list(shape)}", "cache.scores(q) gives them"
        )
    return by.detach()


def check_starts(start: object, lengths: list[int]) -> list[int]:
    """How many first positions of each sequence are padding; none of them for None."""
    if start is None:
        return [0] * len(lengths)
    check_tensor("start", start)
    assert isinstance(start, torch.Tensor)
    if start.shape != (len(lengths),) or start.is_floating_point():
        raise InputError(f"start is {start.dtype} {list(start.shape)}: int [{len(lengths)}]")
    found: list[int] = start.tolist()
    if any(not 0 <= first <= length for first, length in zip(found, lengths, strict=True)):
        raise InputError(f"start={found} for sequences of {lengths} tokens")
    return found


def check_sequences(sequences: object, batch: int) -> list[int]:
    """Indices of sequences of a cache; all of them for None."""
    if sequences is None:
        return list(range(batch))
    if not isinstance(sequences, list | tuple | range):
        raise InputError(
            f"sequences={shown(sequences)}: expected a list of whole numbers", "for instance [0, 2]"
        )
    for b in sequences:
        if not _is_whole(b) or not 0 <= b < batch:
            raise InputError(f"sequence {shown(b)}: the cache has sequences 0 to {batch - 1}")
    return [int(b) for b in sequences]


def check_kind(kind: str, window: int | None) -> None:
    """A sliding cache needs a window; other kinds are given theirs when attending."""
    if not isinstance(kind, str) or kind not in KINDS:
        raise InputError(
            f"unknown kind of cache {shown(kind)}", f"choose one of {', '.join(KINDS)}"
        )
    if (kind == "sliding") != (window is not None):
        raise InputError(
            f"kind={kind!r} with window={shown(window)}",
            "a sliding cache needs a window; give other kinds theirs when attending",
        )


def check_rows(
    name: str, x: torch.Tensor, batch: int, heads: int | None, dim: int, device: torch.device
) -> None:
    """Refuse anything but float ``[batch, heads, T, dim]`` on ``device``; None: any heads."""
    check_tensor(name, x)
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


def check_heads(q: torch.Tensor, num_kv_heads: int) -> None:
    """Query heads ``[B, Hq, T, D]`` share KV heads evenly."""
    if q.shape[1] < 1 or q.shape[1] % num_kv_heads:
        raise InputError(f"q has {q.shape[1]} heads, not a multiple of the cache's {num_kv_heads}")


def check_latents(
    c: torch.Tensor, k_rope: torch.Tensor, batch: int, sizes: tuple[int, int]
) -> None:
    """Latents ``[batch, T, rank]`` and rotary keys ``[batch, T, rope]`` of the same tokens."""
    for name, x, dim in zip(("c", "k_rope"), (c, k_rope), sizes, strict=True):
        check_tensor(name, x)
        if x.dim() != 3 or x.shape[0] != batch or x.shape[2] != dim:
            raise InputError(f"{name} has shape {list(x.shape)}, expected [{batch}, T, {dim}]")
    if c.shape[1] != k_rope.shape[1]:
        raise InputError(f"c has {c.shape[1]} tokens but k_rope has {k_rope.shape[1]}")
    if c.dtype != k_rope.dtype or c.device != k_rope.device:
        kinds = f"{c.dtype} on {c.device} and {k_rope.dtype} on {k_rope.device}"
        raise InputError(f"c and k_rope are {kinds}: expected one dtype and device")


def check_rotary(rotary: object, head_dim: int) -> None:
    """Rotary embedding of heads of ``head_dim``."""
    if not isinstance(rotary, Rotary):
        raise InputError(f"rotary is {shown(rotary)}", "make one: kvfold.nn.Rotary(head_dim)")
    if rotary.dim > head_dim:
        raise InputError(f"rotary dim={rotary.dim} is more than head_dim={head_dim}")
