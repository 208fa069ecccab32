"""Attention written out naively, with K and V repeated: the truth that kernels are held to."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from kvfold.cache.kv import KVCache
from kvfold.cache.store import Store
from kvfold.kernels.cpu.library import Library, library
from kvfold.ops.options import Window

HALF = (torch.float16, torch.bfloat16)
DTYPES = (torch.float32, *HALF)
FOUND = library()
ISAS = FOUND.isas if FOUND else []
needs_kernels = pytest.mark.skipif(FOUND is None, reason="the CPU kernels were not built")


def skip_without_kernels() -> None:
    """For fixtures, whose markers come too late to skip."""
    if FOUND is None:
        pytest.skip("the CPU kernels were not built")


def use_backend(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute with the kernels ``cpu``, ``triton`` or ``torch``, or skip."""
    if name == "cpu":
        skip_without_kernels()
    if name == "triton":
        pytest.importorskip("triton")
    monkeypatch.setenv("KVFOLD_BACKEND", name)


def kernels() -> Library:
    assert FOUND is not None
    return FOUND


@contextmanager
def using(isa: str) -> Iterator[Library]:
    """Run with one instruction set's kernels."""
    lib = kernels()
    before = lib.asked
    lib.use(isa)
    try:
        yield lib
    finally:
        lib.use(before)


DEFAULT_DTYPES = ("bfloat16", "float16", "float64")


@contextmanager
def default_dtype(name: str) -> Iterator[None]:
    """Let PyTorch make tensors of another dtype where none is named."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, name))
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvfold.kernels.cpu.backend.library", lambda: None)


def prompts_by(monkeypatch: pytest.MonkeyPatch, kernels: bool) -> None:
    """Many queries over tensors go to the CPU kernels, or to PyTorch, whatever their number."""
    monkeypatch.setattr("kvfold.kernels.cpu.backend._pytorch_is_faster", lambda _: not kernels)


def noise(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float32, generator=generator).to(dtype)


def qkv(
    batch: int = 2,
    heads: tuple[int, int] = (4, 2),
    tokens: int = 1,
    keys: int = 65,
    dims: tuple[int, int] = (32, 32),
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q = noise(batch, heads[0], tokens, dims[0], dtype=dtype, seed=seed)
    k = noise(batch, heads[1], keys, dims[0], dtype=dtype, seed=seed + 1)
    v = noise(batch, heads[1], keys, dims[1], dtype=dtype, seed=seed + 2)
    return q, k, v


def hidden_keys(
    b: int,
    tokens: int,
    keys: int,
    causal: bool = True,
    window: Window | None = None,
    sinks: int = 0,
    start: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
) -> torch.Tensor:
    """Which keys the queries of sequence b may not see, ``[tokens, keys]``, one query at a time."""
    first = 0 if start is None else int(start[b])
    end = keys if lengths is None else int(lengths[b])
    j = torch.arange(keys)
    rows = []
    for t in range(tokens):
        position = end - tokens + t
        hidden = (j < first) | (j >= end)
        if causal:
            hidden |= j > position
        if isinstance(window, tuple):
            before, after = window
            if before not in (None, -1):
                hidden |= (j < position - before) & (j >= first + sinks)
            if after not in (None, -1):
                hidden |= j > position + after
        elif window is not None:
            hidden |= (j <= position - window) & (j >= first + sinks)
        rows.append(hidden)
    return torch.stack(rows) if rows else torch.zeros(0, keys, dtype=torch.bool)


def naive(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dtype: torch.dtype = torch.float64,
    *,
    mask: torch.Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: torch.Tensor | None = None,
    sink_logits: torch.Tensor | None = None,
    **seen: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp, computed in ``dtype`` throughout; no visible key: 0 and -inf."""
    q, k, v = (x.detach().to(dtype) for x in (q, k, v))
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    tokens, keys = q.shape[2], k.shape[2]
    scale = q.shape[3] ** -0.5 if scale is None else scale
    scores = (q * scale) @ k.mT
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    for b in range(len(q)):
        if alibi_slopes is not None:
            lengths = seen.get("lengths")
            end = keys if lengths is None else int(lengths[b])
            position = end - tokens + torch.arange(tokens)[:, None]
            distance = (position - torch.arange(keys)).abs().to(dtype)
            scores[b] -= alibi_slopes.detach().to(dtype)[:, None, None] * distance
        scores[b].masked_fill_(hidden_keys(b, tokens, keys, **seen), -torch.inf)
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        scores = scores + mask.detach().to(dtype)
    if sink_logits is not None:  # a last key without value
        logits = sink_logits.detach().to(dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores, v = torch.cat([scores, logits], -1), torch.nn.functional.pad(v, (0, 0, 0, 1))
    lse = torch.logsumexp(scores, -1)
    weights = torch.softmax(scores, -1).masked_fill(lse.isneginf()[..., None], 0)
    return weights @ v, lse


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference; NaN counts as infinite, equal infinities as none."""
    a, b = a.detach().double(), b.detach().double()
    assert a.shape == b.shape
    gap = torch.where(a == b, 0.0, (a - b).abs()).nan_to_num(nan=torch.inf, posinf=torch.inf)
    return float(gap.max()) if gap.numel() else 0.0


def check_as_good_as_pytorch(
    out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    precision: torch.dtype | None = None,
    lse: torch.Tensor | None = None,
    slack: float = 0.0,
    **options: Any,
) -> None:
    """FlashAttention's criterion: at most twice the error PyTorch makes in the same precision.

    1e-5 is added for the cases in which PyTorch happens to make none. A log-sum-exp is float32
    at best, so it may also be off by a few of its units in the last place (2^-24 each).
    """
    truth, true_lse = naive(q, k, v, **options)
    same, same_lse = naive(q, k, v, precision or q.dtype, **options)
    error, allowed = distance(out, truth), 2 * distance(same, truth) + 1e-5 + slack
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"
    if lse is not None:
        size = float(true_lse.nan_to_num(neginf=0).abs().max()) if true_lse.numel() else 0.0
        allowed = 2 * distance(same_lse, true_lse) + 1e-5 + size * 2**-21
        assert distance(lse, true_lse) <= allowed


def filled(cache: KVCache, tokens: int, seed: int = 0, scale: float = 1.0) -> KVCache:
    """The cache with as many tokens of noise appended to every sequence."""
    k = noise(cache.batch, cache.num_kv_heads, tokens, cache.head_dim, seed=seed)
    v = noise(cache.batch, cache.num_kv_heads, tokens, cache.v_head_dim, seed=seed + 1)
    cache.append(k * scale, v)
    return cache


def stores(cache: KVCache) -> list[Store]:
    """The main store, and perhaps that of the exact ends."""
    return cache._storage.stores


def contents(cache: KVCache) -> tuple[torch.Tensor, torch.Tensor]:
    """What the cache holds, ``[B, Hkv, S, D]`` twice; its sequences have one length."""
    read = [cache.read(b) for b in range(cache.batch)]
    return torch.stack([k for k, _ in read]), torch.stack([v for _, v in read])


def one_byte_weights(cache: KVCache, v: torch.Tensor) -> float:
    """Six standard deviations of what weights of one byte do to an output over values of four bits.

    A weight is off by up to half of a step, at most 16 / 255 of the mean weight 1 / S, at random;
    S of them, times values, add up as random numbers do.
    """
    if FOUND is None or not kernels().isa.startswith("avx512_") or cache.formats[1].bits != 4:
        return 0.0
    size = float(v.float().square().mean().sqrt()) if v.numel() else 0.0
    return 6 * 16 / 255 / math.sqrt(12 * max(16, v.shape[-2])) * size


def allowed_error(
    cache: KVCache, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None = None
) -> float:
    """A bound on what the kernels' own rounding does to the output, before its dtype rounds it.

    Scores: where keys are integers, a query is one of 16 bits, off by at most half a unit, max|q|
    / 32512, in each dimension; everything has sums of D float32 products. As max|q| <= |q| and
    sum |k| <= sqrt(D) |k|, whether rotated or not, scores are off by at most d. Weights then are
    off by exp(2 d) - 1 of the largest value in all. Weights become integers of 1/65280 of a tile's
    largest: 64 of them are off by at most half of that each, times a value; bfloat16 instructions,
    which queries of bfloat16 get over keys and values of bfloat16, round them by 2^-9. INT4 values
    have weights of one byte while all these together are off by at most 16 / 510 of the sum of
    weights. Four more 2^-20 are for exp, sums and scales in float32.
    """
    names = [fmt.name for fmt in cache.formats]
    if len(stores(cache)) > 1:
        names += ["bf16"]
    best = kernels().isa.startswith("avx512_")
    integers = best and any(name.startswith(("int", "nl")) for name in names)
    own = q.dtype is torch.bfloat16
    brains = own and kernels().isa in ("avx512_bf16", "avx512_amx") and "bf16" in names
    dim = 32 * -(-cache.head_dim // 32)
    if 0 in (q.numel(), k.numel()):
        return 0.0
    size = abs(cache.head_dim**-0.5 if scale is None else scale)
    size *= float(q.norm(dim=-1).max() * k.norm(dim=-1).max())
    unit = dim * 2**-24 + (dim**0.5 / 65024 if integers else 0)
    shift = math.expm1(2 * unit * size)
    weights = (64 / 130560 if integers else 0) + (2**-9 if brains else 0) + 4 * 2**-20
    if best and cache.formats[1].bits == 4:
        weights += 16 / 510
    return (shift + weights) * float(v.abs().max())


def slopes(heads: int) -> torch.Tensor:
    return 2.0 ** -torch.arange(1, heads + 1)
