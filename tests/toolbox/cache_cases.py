"""Caches, what is appended to them, and what they are held to."""

from typing import Any

import torch

from kvfold.cache.kv import KVCache
from kvfold.ops.formats import FORMATS, decode, encode
from kvfold.ops.rotation import rotate
from tests.toolbox.attention_cases import (
    check_as_good_as_pytorch,
    noise,
    one_byte_weights,
)

DTYPES: list[Any] = [*FORMATS, ("int8", "int4"), ("fp8", "bf16"), torch.float16]
PLAIN: dict[str, Any] = {"exact_first": 0, "exact_recent": 0}  # no tokens kept in bfloat16


def make(dtype: Any = "bf16", kind: str = "paged", batch: int = 1, **options: Any) -> KVCache:
    options = {"head_dim": 20, "v_head_dim": 13} | options
    if kind == "sliding":
        options.setdefault("window", 24)
    return KVCache(2, batch=batch, dtype=dtype, kind=kind, **options)


def tokens(count: int, batch: int = 1, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    return noise(batch, 2, count, 20, seed=seed), noise(batch, 2, count, 13, seed=seed + 1)


def as_stored(x: torch.Tensor, name: str, key: bool) -> torch.Tensor:
    """Rows through the format, as its definition says."""
    fmt, dim = FORMATS[name], x.shape[-1]
    size = fmt.rotation(dim) if key else 0
    padded = torch.nn.functional.pad(x, (0, -dim % (size or 1)))
    rows = decode(*encode(rotate(padded, size), fmt), fmt, padded.shape[-1])
    return rotate(rows, size)[..., :dim]


def names_of(cache: KVCache) -> tuple[str, str]:
    return cache.formats[0].name, cache.formats[1].name


def check_holds(cache: KVCache, k: torch.Tensor, v: torch.Tensor, b: int = 0) -> None:
    """The sequence reads as ``k`` and ``v`` ``[Hkv, S, D]``, encoded.

    Rotating back is done in float32: 2^-20 for sums of at most 32 numbers of size one.
    """
    got = cache.read(b)
    for x, y, name, key in zip(got, (k, v), names_of(cache), (True, False), strict=True):
        torch.testing.assert_close(x, as_stored(y, name, key), atol=2**-20, rtol=0)


def check_attends(cache: KVCache, seed: int = 50, tokens: int = 1, **options: Any) -> None:
    """Attention is that over what ``read`` gives, each sequence at its own length.

    Held to bfloat16's error, to which kernels round weights, INT4's to one byte; queries are
    bfloat16 numbers.
    """
    q = noise(cache.batch, 6, tokens, cache.head_dim, dtype=torch.bfloat16, seed=seed).float()
    out, lse = cache.attend(q, return_lse=True, **options)
    if cache.kind == "sliding":
        options |= {"window": cache.window, "sinks": cache.sinks}
    for b in range(cache.batch):
        k, v = (x[None] for x in cache.read(b))
        assert k.shape[2] == v.shape[2] == cache.lengths[b]
        given = {name: x[b : b + 1] if name == "start" else x for name, x in options.items()}
        given["slack"] = one_byte_weights(cache, v)
        check_as_good_as_pytorch(
            out[b : b + 1], q[b : b + 1], k, v, torch.bfloat16, lse[b : b + 1], **given
        )
