"""The CPU kernels for latents: rows that are keys as a whole, and values in their first numbers.

Every copy that this machine can run, and one whose pairs of bfloat16 and AMX tiles are computed in
plain C++, are held to attention in float64 over what the cache holds.
"""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from kvfold import LatentCache
from kvfold.kernels.cpu.build import NAME, build, compiler
from kvfold.kernels.cpu.library import TIMER, Library
from tests.toolbox.attention_cases import ISAS, distance, kernels, naive, needs_kernels, noise

pytestmark = needs_kernels
FORMATS = ("fp32", "fp16", "bf16", "fp8", "int8")
EMULATED = "emulated"
_EMULATED = ("-DKVF_AMX", "-DKVF_EMULATE_AMX", "-DKVF_EMULATE_BF16", "-O0")
SCALE = 0.11
SIZES = ((1, 2), (13, 6), (16, 16), (40, 8), (59, 21), (80, 80), (512, 64), (448, 512), (960, 64))


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Library:
    if compiler() is None:
        pytest.skip("no C++ compiler")
    target = tmp_path_factory.mktemp("latents") / NAME
    build(target, _EMULATED, ("avx2",))
    return Library(target)


@pytest.fixture(params=[*ISAS, EMULATED])
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Compute with one copy."""
    lib = kernels()
    if request.param == EMULATED:
        lib = request.getfixturevalue("emulated")
        monkeypatch.setattr("kvfold.kernels.cpu.backend.library", lambda: lib)
    before = lib.asked
    lib.use(lib.isas[0] if request.param == EMULATED else request.param)
    yield request.param
    lib.use(before)


def filled(rank: int, rope: int, tokens: int, batch: int = 1, **options: Any) -> LatentCache:
    cache = LatentCache(rank, rope, batch=batch, **options)
    rows = noise(batch, tokens, rank + rope, seed=tokens)
    cache.append(rows[..., :rank], rows[..., rank:])
    return cache


def held(cache: LatentCache) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values, as the cache has them."""
    rows = torch.cat(cache.tensors(torch.float32), -1)[:, None]
    return rows, rows[..., : cache.kv_lora_rank]


def check(cache: LatentCache, q: torch.Tensor, **options: Any) -> None:
    """A bound on what the kernels' own rounding does to the output.

    Scores are sums of D float32 products, so they are off by at most d = D 2^-24 |q| |k|, and
    weights by exp(2 d) - 1 of the largest value in all. Where queries are bfloat16 and latents hold
    no more digits, weights may be rounded to 2^-9. Four more 2^-20 are for exp, sums and scales.
    """
    k, v = held(cache)
    out, lse = cache.attend(q, scale=SCALE, return_lse=True, **options)
    truth, true_lse = naive(q, k, v, scale=SCALE, lengths=torch.tensor(cache.lengths), **options)
    size = SCALE * float(q.float().norm(dim=-1).max() * k.norm(dim=-1).max())
    off = q.shape[-1] * 2**-24 * size
    pairs = q.dtype is torch.bfloat16 and cache.format.name in ("bf16", "fp8", "int8")
    own = math.expm1(2 * off) + (2**-9 if pairs else 0) + 4 * 2**-20
    written = torch.finfo(q.dtype).eps / 2
    assert distance(out, truth) <= (own + written) * float(v.abs().max())
    assert distance(lse, true_lse) <= off + 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fmt", FORMATS)
def test_any_number_of_query_heads(fmt: str, dtype: torch.dtype, isa: str) -> None:
    cache = filled(64, 32, 150, dtype=fmt)
    for heads in (*range(1, 10), 14, 16, 17, 33, 128):
        check(cache, noise(1, heads, 1, 96, dtype=dtype, seed=heads))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fmt", FORMATS)
def test_any_size(fmt: str, dtype: torch.dtype, isa: str) -> None:
    for rank, rope in SIZES:
        cache = filled(rank, rope, 70, dtype=fmt)
        check(cache, noise(1, 9, 1, rank + rope, dtype=dtype))


@pytest.mark.parametrize("fmt", FORMATS)
def test_pages_and_ends(fmt: str, isa: str) -> None:
    for page_size in (1, 7, 16, 64):
        for tokens in (1, 15, 16, 63, 64, 65, 111, 257, 600):
            if tokens == 600 and page_size != 16 and isa == EMULATED:
                continue  # slow, and the same
            cache = filled(40, 16, tokens, 2, dtype=fmt, kind="paged", page_size=page_size)
            more = noise(1, 9, 56, seed=3)
            cache.append(more[..., :40], more[..., 40:], sequences=[1])
            check(cache, noise(2, 10, 1, 56, dtype=torch.bfloat16))


@pytest.mark.parametrize("fmt", FORMATS)
def test_many_queries_at_once(fmt: str, isa: str) -> None:
    """Speculative steps and pieces of prompts: some rows of a block do not see some tiles."""
    for heads, tokens in ((5, 2), (16, 3), (9, 16), (3, 17), (5, 40), (130, 17)):
        if heads * tokens > 200 and isa == EMULATED:
            continue  # slow, and the same
        cache = filled(40, 16, 170, dtype=fmt, kind="paged", page_size=16)
        check(cache, noise(1, heads, tokens, 56, dtype=torch.bfloat16), causal=True)


OPTIONS: list[dict[str, Any]] = [
    {"window": 40, "sinks": 2},
    {"softcap": 4.0},
    {"start": torch.tensor([3, 100])},
    {"sink_logits": noise(10, seed=5)},
    {"alibi_slopes": noise(10, seed=6).abs() / 50},
    {"mask": noise(2, 1, 1, 150, seed=7)},
    {"mask": noise(2, 10, 1, 150, seed=8) > 0},
    {"mask": torch.zeros(2, 1, 1, 150, dtype=torch.bool)},
]


@pytest.mark.parametrize("tokens", [1, 3, 9])
@pytest.mark.parametrize("fmt", ["fp16", "bf16", "int8"])
def test_options(fmt: str, tokens: int, isa: str) -> None:
    cache = filled(40, 16, 150, 2, dtype=fmt)
    for options in OPTIONS:
        check(cache, noise(2, 10, tokens, 56, dtype=torch.bfloat16), causal=True, **options)


@pytest.mark.parametrize("tokens", [1, 20])
@pytest.mark.parametrize("fmt", ["fp32", "bf16", "fp8"])
def test_what_nobody_sees_may_hold_anything(fmt: str, tokens: int, isa: str) -> None:
    """Beyond the ends, and where a mask hides a token from all."""
    cache = filled(32, 16, 100, dtype=fmt, max_length=200)
    rows = cache._cache._storage.stores[0].keys.data.view(torch.uint8)
    rows = rows.view(-1, cache.format.row_bytes(48))
    q = noise(1, 9, tokens, 48, dtype=torch.bfloat16)
    mask = torch.arange(100).expand(1, 1, tokens, 100) != 50
    before = cache.attend(q, scale=SCALE, mask=mask, causal=True)
    rows[100:] = 0xFF
    rows[50] = 0xFF
    assert not bool(cache.read()[0][50].isfinite().any())
    after = cache.attend(q, scale=SCALE, mask=mask, causal=True)
    assert isinstance(before, torch.Tensor)
    assert isinstance(after, torch.Tensor)
    assert bool(before.isfinite().all())
    assert torch.equal(before, after)


def test_heads_do_not_depend_on_each_other(isa: str) -> None:
    """Rows are taken some at a time; which ones must not matter. Fewer than eight have no tiles."""
    cache = filled(72, 24, 200, dtype="int8")
    q = noise(1, 7, 1, 96, dtype=torch.bfloat16)
    together, _ = cache.attend(q, scale=SCALE, return_lse=True)
    for head in range(7):
        alone, _ = cache.attend(q[:, head : head + 1], scale=SCALE, return_lse=True)
        assert torch.equal(together[:, head : head + 1], alone)


def test_pairs_and_tiles_are_used(emulated: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are rounded to bfloat16; beside 16 rows others are multiplied in pairs of tokens."""
    cache, plain = filled(128, 32, 300, dtype="bf16"), kernels().isas[-1]
    found: dict[tuple[int, bool], tuple[torch.Tensor, torch.Tensor]] = {}
    for pairs, lib, name in ((False, kernels(), plain), (True, emulated, emulated.isas[0])):
        monkeypatch.setattr("kvfold.kernels.cpu.backend.library", lambda lib=lib: lib)
        before = lib.asked
        lib.use(name)
        for heads in (7, 16, 17):
            q = noise(1, heads, 1, 160, dtype=torch.bfloat16)
            out, lse = cache.attend(q, scale=SCALE, return_lse=True)
            found[heads, pairs] = out[:, :7], lse[:, :7]
        lib.use(before)
    assert 0 < distance(found[7, True][1], found[7, False][1]) < 1e-4
    outputs, rounded = found[7, False][0], found[7, True][0]
    # Half a unit in the last place of weights, and of what either writes: 3 * 2**-9 of the values.
    bound = 3 * 2**-9 * float(held(cache)[1].abs().max())
    assert 0 < distance(rounded, outputs) < bound
    assert torch.equal(outputs, found[17, False][0])
    assert torch.equal(rounded, found[16, True][0])
    assert torch.equal(found[16, True][1], found[17, True][1])
    assert distance(found[16, True][0], found[17, True][0]) <= bound


def test_copies_that_differ_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over one buffer of rows, as the call has them."""
    asked: list[tuple[bool, int]] = []

    def timer(_: bytes, call: Any) -> float:
        part = call.contents.parts[0]
        asked.append((part.k.data == part.v.data, part.v.dim))
        return 1.0

    lib, kept = kernels(), TIMER(timer)
    before = lib.asked
    lib.use("auto")
    lib.set_timer(kept)
    try:
        filled(72, 24, 100, dtype="fp32").attend(noise(1, 9, 1, 96), scale=SCALE)
    finally:
        lib.set_timer()
        lib.use(before)
    assert set(asked) <= {(True, 72)}
    assert bool(asked) == (sum(isa.startswith("avx") for isa in ISAS) > 1)
