"""The kernels for AMX's tiles, with the tiles' operations in plain C++: few machines have them.

Held to float64 as all copies are. The operations themselves follow Intel's description, and abort
where the processor would answer with a fault: shapes that do not fit, tiles without any.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import kvfold
from kvfold.cache.kv import KVCache
from kvfold.kernels.cpu.build import NAME, build, compiler
from kvfold.kernels.cpu.library import TIMER, Library
from tests.toolbox.attention_cases import (
    ISAS,
    allowed_error,
    check_as_good_as_pytorch,
    contents,
    distance,
    filled,
    naive,
    noise,
    qkv,
    using,
)

pytestmark = [
    pytest.mark.skipif(compiler() is None, reason="no C++ compiler"),
    pytest.mark.skipif("avx512_bf16" not in ISAS, reason="the rest of that copy needs AVX512-BF16"),
]
AMX = "avx512_amx"


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Library:
    target = tmp_path_factory.mktemp("amx") / NAME
    build(target, ("-DKVF_EMULATE_AMX", "-O0"), (AMX, "avx512_bf16"))
    return Library(target)


@pytest.fixture(autouse=True)
def amx(emulated: Library, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if AMX not in emulated.isas:
        pytest.skip("the compiler does not know AMX")
    emulated.use(AMX)
    for module in ("backend", "rows", "fixed"):
        monkeypatch.setattr(f"kvfold.kernels.cpu.{module}.library", lambda: emulated, raising=False)
    with using("avx512_bf16"):
        yield


def bf16(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.bfloat16)


def check_cache(cache: KVCache, q: torch.Tensor, **options: Any) -> None:
    k, v = contents(cache)
    out, lse = cache.attend(q, return_lse=True, **options)
    truth, true_lse = naive(q, k, v, **options)
    allowed = allowed_error(cache, q, k, v)
    rounding = torch.finfo(torch.bfloat16).eps / 2 * float(truth.abs().max())
    assert distance(out, truth) <= allowed + rounding
    assert distance(lse, true_lse) <= allowed + 1e-5


@pytest.mark.parametrize("dims", [(8, 8), (13, 13), (59, 80), (80, 59), (64, 128), (576, 512)])
@pytest.mark.parametrize("group", [7, 8, 9, 16, 17, 33])
def test_rows_and_head_sizes(group: int, dims: tuple[int, int]) -> None:
    cache = KVCache(1, dims[0], v_head_dim=dims[1], dtype="bf16", kind="paged", page_size=48)
    check_cache(filled(cache, 150), bf16(noise(1, group, 1, dims[0])))


@pytest.mark.parametrize("keys", [1, 15, 16, 63, 64, 65, 111, 257, 1000])
@pytest.mark.parametrize("page_size", [7, 16, 64])
def test_pages_and_ends(keys: int, page_size: int) -> None:
    cache = KVCache(2, 40, batch=2, dtype="bf16", kind="paged", page_size=page_size)
    check_cache(filled(cache, keys), bf16(noise(2, 20, min(keys, 2), 40)))


@pytest.mark.parametrize(
    "options",
    [
        {"window": 40, "sinks": 2},
        {"softcap": 4.0},
        {"sink_logits": noise(18, seed=5)},
        {"alibi_slopes": noise(18, seed=6).abs() / 50},
        {"mask": noise(2, 1, 3, 111, seed=7)},
        {"mask": noise(2, 1, 3, 111, seed=8) > 0},
    ],
    ids=lambda options: "+".join(options),
)
def test_options(options: dict[str, Any]) -> None:
    q, k, v = qkv(2, (18, 2), 3, 111, (59, 80), torch.bfloat16)
    out, lse = kvfold.attention(q, k, v, **options, return_lse=True)
    check_as_good_as_pytorch(out, q, k, v, lse=lse, **options)


def test_prompts() -> None:
    """Many queries go through the same tiles, some rows of a block at a time."""
    cache = KVCache(2, 72, v_head_dim=40, dtype="bf16", kind="paged", page_size=32)
    check_cache(filled(cache, 150), bf16(noise(1, 6, 70, 72)), window=33)


def test_unused_slots_may_hold_anything() -> None:
    cache = filled(KVCache(1, 32, dtype="bf16", kind="paged", page_size=64), 70)
    for half in (cache._storage.stores[0].keys, cache._storage.stores[0].values):
        unused = half.data.view(torch.bfloat16).isfinite() & (half.data.view(torch.bfloat16) == 0)
        half.data.view(torch.bfloat16)[unused] = torch.nan
        assert unused.any()
    out = cache.attend(bf16(noise(1, 9, 1, 32)))
    assert isinstance(out, torch.Tensor)
    assert bool(out.isfinite().all())


def test_tiles_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """From eight rows on: sums are then in another order than registers of vectors have them."""
    cache = filled(KVCache(1, 128, dtype="bf16"), 300)
    found: dict[int, list[torch.Tensor]] = {7: [], 8: []}
    for group, outs in found.items():
        outs.append(
            torch.as_tensor(cache.attend(bf16(noise(1, group, 1, 128)), return_lse=True)[1])
        )
    monkeypatch.undo()
    for group, outs in found.items():
        outs.append(
            torch.as_tensor(cache.attend(bf16(noise(1, group, 1, 128)), return_lse=True)[1])
        )
    assert distance(*found[7]) <= 2**-21  # the same code, compiled otherwise
    assert 0 < distance(*found[8]) < 1e-3


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
@pytest.mark.parametrize("rows", [7, 8])
def test_it_is_tried_where_it_may_gain(emulated: Library, rows: int, dtype: str) -> None:
    """Not for fewer than eight rows, nor for what it has no kernels for."""
    asked: list[str] = []

    def timer(name: bytes, _: Any) -> float:
        asked.append(name.decode())
        return 1.0 / len(asked)

    kept = TIMER(timer)
    emulated.use("auto")
    emulated.set_timer(kept)
    cache = filled(KVCache(1, 64, dtype=dtype), 50)
    cache.attend(bf16(noise(1, rows, 1, 64)))
    emulated.set_timer()
    tried = rows == 8 and dtype == "bf16"
    assert set(asked) == ({AMX, "avx512_bf16"} if tried else set())
