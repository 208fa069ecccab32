"""The CPU kernels, each instruction set's: exact to their own arithmetic, on every format."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import kvfold
from kvfold.cache.half import Half
from kvfold.cache.kv import KVCache
from kvfold.errors import InputError
from kvfold.kernels.cpu.call import KernelCall
from kvfold.ops.formats import FORMATS, encode
from kvfold.ops.options import Options, Visibility
from kvfold.ops.rotation import rotate
from tests.toolbox.attention_cases import (
    DTYPES,
    ISAS,
    allowed_error,
    check_as_good_as_pytorch,
    contents,
    distance,
    filled,
    kernels,
    naive,
    needs_kernels,
    noise,
    qkv,
    stores,
    using,
)

pytestmark = needs_kernels
MIXED: list[Any] = [*FORMATS, ("int8", "int4"), ("int4", "fp8"), ("fp16", "int8")]
PLAIN: dict[str, Any] = {"exact_first": 0, "exact_recent": 0}


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with using(str(request.param)):
        yield str(request.param)


@pytest.mark.parametrize("group", [1, 2, 3, 5, 6, 7, 8, 9, 16])
@pytest.mark.parametrize("dtype", MIXED, ids=str)
def test_quantized_caches(isa: str, dtype: Any, group: int) -> None:
    """Against float64 over what the cache holds: only the kernels' own rounding is allowed."""
    cache = filled(KVCache(2, 80, v_head_dim=48, batch=2, dtype=dtype, **PLAIN), 257)
    q = noise(2, 2 * group, 2, 80)
    k, v = contents(cache)
    out, lse = cache.attend(q, return_lse=True)
    truth, true_lse = naive(q, k, v)
    allowed = allowed_error(cache, q, k, v)
    assert distance(out, truth) <= allowed
    assert distance(lse, true_lse) <= allowed + 1e-5
    assert allowed < 0.25  # the bound says something: outputs are of size one


@pytest.mark.parametrize("group", [1, 2, 3, 5, 8, 9])
@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_what_no_core_keeps_near(isa: str, dtype: str, group: int) -> None:
    """More than a MiB for each thread is gone through as it lies: other loops do that."""
    cache = filled(KVCache(2, 122, v_head_dim=104, dtype=dtype), 4700)
    assert cache.bytes_per_step > 1 << 20
    q = noise(1, 2 * group, 1, 122, dtype=torch.bfloat16)
    k, v = contents(cache)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        out, lse = cache.attend(q, return_lse=True)
    finally:
        torch.set_num_threads(threads)
    truth, _ = naive(q, k, v)
    rounding = torch.finfo(torch.bfloat16).eps / 2 * float(truth.abs().max())
    assert distance(out, truth) <= allowed_error(cache, q, k, v) + rounding
    assert bool(lse.isfinite().all())


@pytest.mark.parametrize("dims", [(8, 8), (13, 13), (59, 80), (80, 59), (576, 512)], ids=str)
@pytest.mark.parametrize("dtype", MIXED, ids=str)
def test_head_sizes_of_caches(isa: str, dtype: Any, dims: tuple[int, int]) -> None:
    cache = KVCache(1, dims[0], v_head_dim=dims[1], dtype=dtype, kind="paged", page_size=48)
    filled(cache, 150)
    q = noise(1, 5, 1, dims[0])
    k, v = contents(cache)
    error = distance(torch.as_tensor(cache.attend(q)), naive(q, k, v)[0])
    assert error <= allowed_error(cache, q, k, v)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group", [1, 3, 7, 16])
@pytest.mark.parametrize("tokens", [1, 5, 16])
def test_plain_tensors(isa: str, tokens: int, group: int, dtype: torch.dtype) -> None:
    q, k, v = qkv(2, (2 * group, 2), tokens, 111, (59, 80), dtype)
    options: dict[str, Any] = {"window": 40, "sinks": 2, "softcap": 4.0}
    assert kvfold.explain(q, k, v, **options).name == "kernel"
    out, lse = kvfold.attention(q, k, v, **options, return_lse=True)
    check_as_good_as_pytorch(out, q, k, v, lse=lse, **options)


def raw_rows(half: Half, pages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Encoded rows and scales ``[H, tokens, bytes or groups]`` of pages."""
    data, scales = half.layout.rows(half.data[pages]), half.layout.scales(half.scales[pages])
    return data.transpose(0, 1).flatten(1, 2), scales.transpose(0, 1).flatten(1, 2)


@pytest.mark.parametrize("source", DTYPES, ids=str)
@pytest.mark.parametrize("page_size", [1, 7, 16, 64])
@pytest.mark.parametrize("name", list(FORMATS))
def test_append_is_the_format_bit_for_bit(
    isa: str, name: str, page_size: int, source: torch.dtype
) -> None:
    """Rows and scales in the pages, packed or not, are what ``ops.formats`` gives."""
    fmt = FORMATS[name]
    for dim, v_dim in ((1, 13), (32, 8), (59, 80), (128, 33)):
        k, v = noise(1, 2, 37, dim, dtype=source), noise(1, 2, 37, v_dim, dtype=source, seed=1)
        k[:, :, 3] = 0
        v[:, :, 5] *= 1e-3
        v[:, :, 6, 0] = -1e4
        options: dict[str, Any] = {"kind": "paged", "page_size": page_size, **PLAIN}
        cache = KVCache(2, dim, v_head_dim=v_dim, dtype=name, **options)
        cache.append(k, v)
        main = stores(cache)[0]
        assert main.keys.layout.packed == (page_size % 16 == 0)
        for half, x, size in ((main.keys, k, fmt.rotation(dim)), (main.values, v, 0)):
            padded = torch.nn.functional.pad(x[0].float(), (0, -x.shape[-1] % (size or 1)))
            data, scales = encode(rotate(padded, size), fmt)
            got, got_scales = raw_rows(half, main.table[0][main.table[0] >= 0].long())
            assert torch.equal(got[:, :37], data)
            assert torch.equal(got_scales[:, :37].view(torch.int16), scales.view(torch.int16))


@pytest.mark.parametrize("name", list(FORMATS))
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_append_of_what_is_not_finite_is_the_format_too(isa: str, name: str, value: float) -> None:
    x = noise(1, 1, 20, 64)
    x[0, 0, 4, 40] = value
    cache = KVCache(1, 64, dtype=name, **PLAIN)
    cache.append(noise(1, 1, 20, 64, seed=1), x)
    rows, scales = raw_rows(stores(cache)[0].values, torch.tensor([0]))
    data, expected = encode(x[0], FORMATS[name])
    others = torch.arange(20) != 4
    assert torch.equal(rows[:, :20][:, others], data[:, others])
    torch.testing.assert_close(scales[:, :20], expected, atol=0, rtol=0, equal_nan=True)
    assert not bool(cache.read()[1][0, 4, 40].isfinite())


@pytest.mark.parametrize("page_size", [1, 7, 16, 64])
@pytest.mark.parametrize("dtype", MIXED, ids=str)
def test_unused_slots_may_hold_anything(isa: str, dtype: Any, page_size: int) -> None:
    """Whatever was forgotten or never written, NaN at worst, no result can tell."""

    def fresh() -> KVCache:
        options: dict[str, Any] = {"kind": "paged", "page_size": page_size}
        return KVCache(2, 40, v_head_dim=24, batch=2, dtype=dtype, **options, **PLAIN)

    def use(cache: KVCache) -> list[torch.Tensor]:
        outs = []
        for step, count in enumerate((21, 1, 44)):
            filled(cache, count, seed=step)
            q = noise(2, 6, 2, 40, seed=step)
            given: list[dict[str, Any]] = [{}, {"window": 5, "sinks": 2}]
            given.append({"start": torch.tensor([0, cache.lengths[0] - 3])})
            outs += [torch.as_tensor(cache.attend(q, **options)) for options in given]
        return outs

    poisoned = fresh()
    for value in (math.nan, math.inf):
        x = torch.full((2, 2, 70, 40), value, dtype=torch.float32)
        poisoned.append(x, x[..., :24])
        poisoned.truncate(0)
    for half in (stores(poisoned)[0].keys, stores(poisoned)[0].values):
        half.scales.fill_(torch.nan)
        if not half.layout.packed:  # packed blocks need their padding to be zero
            half.data.fill_(0xFF)
    expected = use(fresh())
    for got, wanted in zip(use(poisoned), expected, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("dtype", [*DTYPES, "int8", "int4"], ids=str)
def test_extreme_logits(isa: str, dtype: Any) -> None:
    """Scores of ±1e4, in one key or in all: finite, and the largest takes the weight."""
    cache = KVCache(1, 64, dtype=dtype, **PLAIN)
    k, v = noise(1, 1, 300, 64), noise(1, 1, 300, 64, seed=1)
    k[:, :, 170] = 1250 / 64
    cache.append(k, v)
    q = torch.tensor([64.0, -64.0], dtype=torch.float32).view(1, 2, 1, 1).repeat(1, 1, 1, 64)
    out, lse = cache.attend(q, return_lse=True)
    truth, true_lse = naive(q, *contents(cache))
    assert float(true_lse.max()) > 9e3
    assert distance(out[:, :1], truth[:, :1]) < 1e-4 * float(v.abs().max())
    assert bool(out.isfinite().all())
    assert distance(lse, true_lse) < 1e4 * 2**-14  # queries of 16 bits


@pytest.mark.parametrize("dtype", ["bf16", "int8", "int4"])
def test_masked_rows_are_zero(isa: str, dtype: str) -> None:
    cache = filled(KVCache(2, 32, batch=2, dtype=dtype), 300)
    q = noise(2, 4, 3, 32)
    mask = torch.ones(2, 1, 3, 300, dtype=torch.bool)
    mask[0, :, 1] = False
    for given in (mask, torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)):
        out, lse = cache.attend(q, mask=given, return_lse=True)
        assert torch.equal(out[0, :, 1], torch.zeros(4, 32))
        assert bool(lse[0, :, 1].isneginf().all())
        assert bool((out[0, :, 0] != 0).any())
        assert int(lse.isneginf().sum()) == 4
    out, lse = cache.attend(q, start=torch.tensor([300, 299]), return_lse=True)
    assert torch.equal(out[0], torch.zeros(4, 3, 32))
    assert bool(lse[0].isneginf().all())
    assert int(lse[1].isfinite().sum()) == 4


@pytest.mark.parametrize("dtype", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("chunk", [64, 128, 1000, 10_000])
def test_chunks_and_threads_change_nothing(isa: str, dtype: str, chunk: int) -> None:
    """How keys are split changes the order of float32 sums, by which 1e-5 is not reached.

    With integer weights and bfloat16 ones it does not change what they are rounded relative to:
    tiles stay tiles; but bfloat16's weights are relative to the largest so far: 2^-8 of a value.
    INT4's tiles get weights of one byte while all such rounding so far allows it, and "so far"
    begins anew with each unit. A weight is off by 1 / 255 / sqrt(12) of its tile's largest (root
    mean square), which is a fourth of the tile's sum; 24 tiles of 64 come to sqrt(24 * 64) / (24 *
    4 * 883), 4.6e-4 of a value's size, twice; five times that is allowed.
    For one chunk size, threads only change who computes what: results are the same bits.
    """
    cache = filled(KVCache(2, 64, dtype=dtype, **PLAIN), 1500)
    q = noise(1, 6, 1, 64)
    lengths = [1500]

    def attend(chunk: int) -> torch.Tensor:
        call = KernelCall(q, 2, lengths, Options(Visibility(right=0)), 1500)
        call._call.chunk = chunk
        return call.run(kernels(), cache._storage.views([0], lengths), 64, False)[0]

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one, default = attend(chunk), attend(0)
        torch.set_num_threads(2)
        for _ in range(5):
            assert torch.equal(attend(chunk), one)
    finally:
        torch.set_num_threads(threads)
    allowed = {"bf16": 2**-8, "int8": 1e-5, "int4": 5 * 2**0.5 * 4.6e-4}[dtype]
    torch.testing.assert_close(one, default, atol=allowed, rtol=0)


def test_a_peak_does_not_swallow_the_rest(isa: str) -> None:
    """One byte cannot hold a weight 400 times another; INT4's kernels then use two.

    With one, each of 63 keys would weigh 1 of 255 instead of 0.64, or 22% of the output more.
    """
    cache = KVCache(1, 64, dtype="int4", **PLAIN)
    k, v = torch.zeros(1, 1, 64, 64, dtype=torch.float32), noise(1, 1, 64, 64) * 0.01 + 1
    k[0, 0, 7] = 1
    v[0, 0, 7] = -1
    cache.append(k, v)
    q = torch.full((1, 8, 1, 64), math.log(400) / 8, dtype=torch.float32)
    error = distance(torch.as_tensor(cache.attend(q)), naive(q, *contents(cache))[0])
    assert error < 64 / 130560 + 64 * 2**-20


@pytest.mark.parametrize("group", [1, 8, 9])
def test_many_peaks_do_not_swallow_the_rest(isa: str, group: int) -> None:
    """A tile's peak is small beside many tiles before it, but all peaks together are not.

    What one byte rounds off may come to 16 / 510 of all weights; were each tile held to that alone,
    it would come to twice as much here.
    """
    cache = KVCache(1, 64, dtype="int4", **PLAIN)
    k, v = torch.zeros(1, 1, 1280, 64, dtype=torch.float32), noise(1, 1, 1280, 64) * 0.01 + 1
    k[0, 0, 7::64] = 1
    v[0, 0, 7::64] = -1
    cache.append(k, v)
    q = torch.full((1, group, 1, 64), math.log(400) / 8, dtype=torch.float32)
    call = KernelCall(q, 1, [1280], Options(Visibility(right=0)), 1280)
    call._call.chunk = 10_000
    out = call.run(kernels(), cache._storage.views([0], [1280]), 64, False)[0]
    k, v = contents(cache)
    size = float(v.abs().max())
    assert distance(out, naive(q, k, v)[0]) < (16 / 510 + 64 / 130560 + 64 * 2**-20) * size


@pytest.mark.parametrize("dtype", list(FORMATS))
def test_threads_append_the_same(isa: str, dtype: str) -> None:
    threads = torch.get_num_threads()
    bytes_of = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            cache = filled(KVCache(3, 40, batch=3, dtype=dtype, kind="paged"), 300)
            bytes_of.append([x.view(torch.uint8) for s in stores(cache) for x in s])
    finally:
        torch.set_num_threads(threads)
    for one, two in zip(*bytes_of, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("dtype", ["bf16", "fp8", "int4"])
def test_strided_queries_and_rows(isa: str, dtype: str) -> None:
    k, v, q = noise(2, 50, 2, 40), noise(2, 50, 2, 40, seed=1), noise(2, 1, 6, 40, seed=2)
    views, copies = (KVCache(2, 40, batch=2, dtype=dtype) for _ in range(2))
    views.append(k.transpose(1, 2), v.transpose(1, 2))
    copies.append(k.transpose(1, 2).contiguous(), v.mT.contiguous().mT.transpose(1, 2))
    for x, y in zip(contents(views), contents(copies), strict=True):
        assert torch.equal(x, y)
    out = torch.as_tensor(views.attend(q.transpose(1, 2)))
    assert torch.equal(out, torch.as_tensor(copies.attend(q.transpose(1, 2).contiguous())))


@pytest.mark.parametrize("batch", [0, 1])
def test_nothing_to_do(isa: str, batch: int) -> None:
    cache = KVCache(2, 32, batch=batch, dtype="int8")
    filled(cache, 0)
    out, lse = cache.attend(noise(batch, 4, 1, 32), return_lse=True)
    assert torch.equal(out, torch.zeros(batch, 4, 1, 32))
    assert bool(lse.isneginf().all())
    assert torch.as_tensor(filled(cache, 5).attend(noise(batch, 4, 0, 32))).shape[2] == 0


def test_unknown_instruction_sets_are_refused() -> None:
    before = kernels().isa
    assert before in ISAS
    with pytest.raises(InputError, match="'mmx'") as error:
        kernels().use("mmx")
    assert "baseline" in error.value.hint
    assert kernels().isa == before
