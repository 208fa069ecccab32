"""The Triton kernels: under the interpreter on a CPU, or on the GPU if there is one."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kvfold
from kvfold import KVCache
from kvfold.cache.fixed import FixedKVCache
from kvfold.errors import InputError
from kvfold.kernels.backend import backend_of
from kvfold.kernels.checks import check_options
from kvfold.kernels.triton.splits import LEAST_KEYS, MOST_SPLITS, Gpu, choose_splits
from kvfold.ops.quantize import FORMATS, decode, encode, rotate, rotation_size
from kvfold.ops.rope import Rotary
from tests.toolbox.attention_cases import contents, naive, noise

pytest.importorskip("triton")
from kvfold.kernels.triton.launch import (
    Angles,
    GpuPart,
    Rows,
    append,
    attend,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PAIRS: list[tuple[str, str]] = [(name, name) for name in FORMATS] + [("int8", "int4")]
# Products of float32 numbers summed in float32, of outputs and scores of size one.
CLOSE = 5e-6
SINK_LOGITS = torch.tensor([0.5, -torch.inf, 3.0, -1.0])


@pytest.fixture(autouse=True)
def triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVFOLD_BACKEND", "triton")


def stored(x: torch.Tensor, name: str, page: int, key: bool) -> tuple[Rows, torch.Tensor]:
    """Pages of ``[B, H, S, D]`` encoded by ``ops.quantize``, and what they decode to.

    Slots beyond S hold NaN or, in codes, the largest numbers.
    """
    fmt, (batch, _, keys, dim) = FORMATS[name], x.shape
    count = -(-keys // page)
    size = rotation_size(fmt, dim) if key else 0
    width = fmt.stored_dim(dim)
    rows = rotate(torch.nn.functional.pad(x, (0, width - dim)), size) if size else x
    data, scales = encode(rows, fmt)
    back = rotate(decode(data, scales, fmt, width if size else dim), size)[..., :dim]
    poison = (0, 0, 0, count * page - keys)
    data = torch.nn.functional.pad(data, poison, value=255)
    scales = torch.nn.functional.pad(scales, poison, value=float("nan"))
    if name == "int8" or fmt.dtype:
        data = data.view(fmt.dtype or torch.int8)

    def paged(rows: torch.Tensor) -> torch.Tensor:
        pages = rows.unflatten(2, (count, page)).transpose(1, 2).flatten(0, 1)
        return pages.contiguous().to(DEVICE)

    assert len(paged(data)) == batch * count
    return Rows(fmt, paged(data), paged(scales), dim), back


def case(
    formats: tuple[str, str] = ("fp32", "fp32"),
    heads: tuple[int, int] = (4, 2),
    tokens: int = 1,
    lengths: tuple[int, ...] = (70, 33),
    dims: tuple[int, int] = (32, 32),
    page: int = 16,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp of the kernel, and of float64 on the decoded cache."""
    batch, keys = len(lengths), max(*lengths, 1)
    q = noise(batch, heads[0], tokens, dims[0], dtype=dtype)
    k, k_back = stored(noise(batch, heads[1], keys, dims[0], seed=1), formats[0], page, key=True)
    v, v_back = stored(noise(batch, heads[1], keys, dims[1], seed=2), formats[1], page, key=False)
    pages = -(-keys // page)
    table = torch.arange(batch * pages, dtype=torch.int32).view(batch, pages).to(DEVICE)
    ends = torch.tensor(lengths, dtype=torch.int32)
    part = GpuPart(k, v, table, page, None, ends.to(DEVICE), keys)
    here: dict[str, Any] = {
        n: o.to(DEVICE) if isinstance(o, torch.Tensor) else o for n, o in options.items()
    }
    splits = here.pop("splits", None)
    asked = check_options((batch, heads[0], tokens, keys), **here)
    out, lse = attend(q.to(DEVICE), [part], ends.to(DEVICE), asked, splits)
    options.pop("splits", None)
    truth, true_lse = naive(q, k_back, v_back, lengths=ends, **options)
    return out.cpu(), lse.cpu(), truth, true_lse


def check(found: tuple[torch.Tensor, ...], close: float = CLOSE) -> None:
    out, lse, truth, true_lse = found
    torch.testing.assert_close(out.double(), truth.double(), rtol=0, atol=close)
    torch.testing.assert_close(lse.double(), true_lse.double(), rtol=0, atol=2 * close)


@pytest.mark.parametrize("formats", PAIRS, ids=str)
@pytest.mark.parametrize("dims", [(32, 32), (13, 13), (59, 80), (128, 64)], ids=str)
def test_formats_and_head_sizes(formats: tuple[str, str], dims: tuple[int, int]) -> None:
    check(case(formats, dims=dims))


@pytest.mark.parametrize("heads", [(1, 1), (3, 1), (10, 2), (9, 1), (7, 7)], ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 16])
def test_groups_and_speculative_tokens(heads: tuple[int, int], tokens: int) -> None:
    check(case(("int8", "int4"), heads=heads, tokens=tokens, lengths=(40,)))


@pytest.mark.parametrize("lengths", [(0, 1), (63, 64), (257, 5), (1, 0, 3)], ids=str)
@pytest.mark.parametrize("page", [1, 4, 64, 512])
def test_lengths_and_pages(lengths: tuple[int, ...], page: int) -> None:
    check(case(("int4", "fp8"), lengths=lengths, page=page))


@pytest.mark.parametrize(
    "options",
    [
        {"causal": False, "tokens": 3},
        {"window": 20},
        {"window": 20, "sinks": 3, "tokens": 4},
        {"window": 500, "sinks": 3},
        {"softcap": 2.0},
        {"scale": 3.0, "softcap": 30.0},
        {"start": torch.tensor([7, 30], dtype=torch.int32)},
        {"start": torch.tensor([7, 30], dtype=torch.int32), "window": 8, "sinks": 2},
        {"alibi_slopes": torch.tensor([0.5, 0.25, 0.1, 0.0]), "tokens": 2},
        {"window": (9, 1), "causal": False, "tokens": 4},
        {"window": (9, -1), "causal": False, "sinks": 2, "tokens": 4},
        {"window": (-1, 0), "causal": False, "tokens": 4},
        {"window": 1 << 40},
        {"sink_logits": SINK_LOGITS, "tokens": 3},
        {"sink_logits": SINK_LOGITS, "start": torch.tensor([7, 33], dtype=torch.int32)},
        {"sink_logits": SINK_LOGITS, "window": 20, "splits": 3},
    ],
    ids=lambda options: "-".join(options),
)
def test_what_hides_and_bends_scores(options: dict[str, Any]) -> None:
    check(case(("bf16", "bf16"), **options))


@pytest.mark.parametrize("splits", [1, 2, 5, 64])
def test_any_number_of_splits_gives_the_same(splits: int) -> None:
    """Also where most of them are empty."""
    check(case(lengths=(130, 3), splits=splits))


def test_heads_of_256_and_extreme_scores() -> None:
    check(case(("bf16", "bf16"), dims=(256, 256)))
    check(case(scale=100.0), close=1e-3)  # scores of hundreds, of which float32 keeps 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_halves_are_as_good_as_pytorchs(dtype: torch.dtype) -> None:
    """FlashAttention's criterion: at most twice PyTorch's error in the same dtype."""
    name = "bf16" if dtype == torch.bfloat16 else "fp16"
    out, _, truth, _ = case((name, name), dtype=dtype, lengths=(200, 200))
    q, k, v = (
        noise(2, heads, n, 32, dtype=dtype, seed=seed)
        for heads, n, seed in ((4, 1, 0), (2, 200, 1), (2, 200, 2))
    )
    theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    allowed = 2 * float((theirs.double() - truth).abs().max()) + 1e-5
    assert float((out.double() - truth).abs().max()) <= allowed


def test_splits_are_merged_in_the_same_order_each_time() -> None:
    first, second = (case(lengths=(300, 150), splits=4)[0] for _ in range(2))
    assert torch.equal(first, second)


# -- the number of splits -------------------------------------------------------------------


@given(st.integers(1, 4096), st.integers(0, 10**6), st.integers(1, 304), st.integers(1, 8))
def test_splits_are_within_bounds_and_do_not_overfill(
    blocks: int, keys: int, multiprocessors: int, each: int
) -> None:
    gpu = Gpu(multiprocessors, each)
    splits = choose_splits(blocks, keys, gpu)
    assert 1 <= splits <= MOST_SPLITS
    assert splits == 1 or splits * LEAST_KEYS <= keys
    if blocks >= 16 * gpu.slots:
        assert splits == 1


@given(st.integers(1, 200), st.integers(1, 304))
def test_long_contexts_fill_the_gpu(blocks: int, multiprocessors: int) -> None:
    gpu = Gpu(multiprocessors)
    work = blocks * choose_splits(blocks, 10**6, gpu)
    if blocks * MOST_SPLITS >= gpu.slots:
        assert work / (-(-work // gpu.slots) * gpu.slots) >= 0.85


def test_one_more_sequence_never_costs_much_more() -> None:
    """No cliff: what the rule predicts for a batch grows by about one sequence's share."""
    gpu = Gpu(132)

    def waves(batch: int) -> float:
        splits = choose_splits(8 * batch, 32_768, gpu)
        return -(-8 * batch * splits // gpu.slots) / splits

    times = [waves(batch) for batch in range(1, 300)]
    for batch, (before, after) in enumerate(pairwise(times), 1):
        assert after <= before * (1 + 1 / batch) * 1.1


# -- writing --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dim", [13, 32, 80])
@pytest.mark.parametrize("key", [True, False])
def test_append_writes_what_ops_quantize_encodes(name: str, dim: int, key: bool) -> None:
    """Byte for byte, at the right places, and nothing elsewhere."""
    fmt, page, pages = FORMATS[name], 4, 3
    x = 3 * noise(2, 2, 5, dim)
    x[0, 0, 0] = 0  # a scale of zero
    width = fmt.stored_dim(dim)
    size = rotation_size(fmt, dim) if key else 0
    rows = rotate(torch.nn.functional.pad(x, (0, width - dim)), size) if size else x
    wanted, wanted_scales = encode(rows, fmt)
    data = torch.full((2 * pages, 2, page, fmt.row_bytes(dim)), 7, dtype=torch.uint8)
    scales = torch.full((2 * pages, 2, page, fmt.groups(dim)), 7, dtype=torch.bfloat16)
    data, scales = data.to(DEVICE), scales.to(DEVICE)
    view = data.view(fmt.dtype or (torch.int8 if name == "int8" else torch.uint8))
    table = torch.arange(2 * pages, dtype=torch.int32).view(2, pages).flip(1).contiguous()
    table[1, 0] = -1  # a page that has been freed: positions there are skipped
    first = torch.tensor([6, 2], dtype=torch.int32)
    append(
        x.to(DEVICE), Rows(fmt, view, scales, dim), table.to(DEVICE), page, first.to(DEVICE),
        rotated=key,
    )  # fmt: skip
    expected, expected_scales = torch.full_like(data, 7), torch.full_like(scales, 7)
    for b in range(2):
        for t in range(5):
            at, slot = divmod(int(first[b]) + t, page)
            if table[b, at] >= 0:
                expected[table[b, at], :, slot] = wanted[b, :, t].to(DEVICE)
                expected_scales[table[b, at], :, slot] = wanted_scales[b, :, t].to(DEVICE)
    assert torch.equal(data, expected)
    assert torch.equal(scales, expected_scales)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [8, 32])
def test_append_applies_rotary_embedding(interleaved: bool, rotary_dim: int) -> None:
    x = noise(2, 2, 3, 32)
    rotary = Rotary(rotary_dim, interleaved=interleaved)
    cos, sin = rotary.cos_sin(torch.tensor([[5, 6, 7], [0, 1, 2]]))
    wanted = rotary.apply(x, cos, sin)
    data = torch.zeros(2, 2, 4, 32, dtype=torch.float32, device=DEVICE)
    rows = Rows(FORMATS["fp32"], data, data.new_empty(2, 2, 4, 0, dtype=torch.bfloat16), 32)
    table = torch.arange(2, dtype=torch.int32, device=DEVICE)[:, None]
    first = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    angles = Angles(cos.to(DEVICE), sin.to(DEVICE), interleaved)
    append(x.to(DEVICE), rows, table, 4, first, rotary=angles)
    torch.testing.assert_close(data[:, :, :3].cpu(), wanted, rtol=0, atol=1e-6)


# -- through the library --------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bf16", "int8", "int4", ("int8", "int4"), "fp8"], ids=str)
@pytest.mark.parametrize(
    "kind",
    [{}, {"kind": "paged", "page_size": 5}, {"kind": "sliding", "window": 12, "sinks": 2}],
    ids=["contiguous", "paged", "sliding"],
)
def test_caches(dtype: Any, kind: dict[str, Any]) -> None:
    """Filled, extended by a token, attended: float64 on what the cache holds."""
    ends: dict[str, Any] = {"exact_first": 2, "exact_recent": 4} if "int4" in dtype else {}
    cache = KVCache(2, 32, batch=2, dtype=dtype, device=DEVICE, **kind, **ends)
    for tokens, seed in ((41, 1), (1, 2)):
        k, v = (noise(2, 2, tokens, 32, seed=seed + i).to(DEVICE) for i in (0, 7))
        cache.append(k, v)
    q = noise(2, 6, 1, 32)
    out, lse = cache.attend(q.to(DEVICE), return_lse=True)
    window: dict[str, Any] = {"window": 12, "sinks": 2} if kind.get("kind") == "sliding" else {}
    keys, values = contents(cache)
    truth, true_lse = naive(q, keys.cpu(), values.cpu(), **window)
    check((out.cpu(), lse.cpu(), truth, true_lse))


def test_ragged_forked_and_shortened_sequences() -> None:
    cache = KVCache(1, 16, batch=2, dtype="int8", kind="paged", page_size=4, device=DEVICE)
    for rows, tokens in (([0], 9), ([1], 3)):
        k, v = (noise(1, 1, tokens, 16, seed=tokens + i).to(DEVICE) for i in (0, 1))
        cache.append(k, v, rows)
    cache.fork(0, 1)
    cache.truncate(6, [1])
    q = noise(2, 3, 1, 16)
    out = cache.attend(q.to(DEVICE))
    keys, values = (x.cpu() for x in cache.tensors(torch.float32))
    lengths = torch.tensor(cache.lengths)
    assert cache.lengths == [9, 6]
    truth, _ = naive(q, keys, values, lengths=lengths)
    assert isinstance(out, torch.Tensor)
    torch.testing.assert_close(out.cpu().double(), truth.double(), rtol=0, atol=CLOSE)


def test_plain_tensors_go_through_the_kernel_and_explain_says_so() -> None:
    q, k, v = (noise(2, h, n, 24, seed=h).to(DEVICE) for h, n in ((6, 2), (3, 40), (3, 40)))
    assert backend_of(DEVICE) == "triton"
    assert "Triton" in str(kvfold.explain(q, k, v))
    out, lse = kvfold.attention(q, k.mT.contiguous().mT, v, window=9, return_lse=True)
    check((out.cpu(), lse.cpu(), *naive(q.cpu(), k.cpu(), v.cpu(), window=9)))
    # What the kernel does not do goes another way.
    wide = noise(1, 1, 1, 512).to(DEVICE)
    assert "Triton" not in str(kvfold.explain(wide, *[noise(1, 1, 9, 512).to(DEVICE)] * 2))


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("shape", [(10,), (2, 1, 1, 10), (1, 4, 2, 10), (2, 4, 2, 1)], ids=str)
def test_masks(additive: bool, shape: tuple[int, ...]) -> None:
    cache = KVCache(2, 16, batch=2, dtype="int8", device=DEVICE)
    cache.append(noise(2, 2, 10, 16, seed=1).to(DEVICE), noise(2, 2, 10, 16, seed=2).to(DEVICE))
    mask = noise(*shape, seed=3) if additive else noise(*shape, seed=3) > -0.5
    q = noise(2, 4, 2, 16)
    out, lse = cache.attend(q.to(DEVICE), mask=mask.to(DEVICE), return_lse=True)
    keys, values = contents(cache)
    check((out.cpu(), lse.cpu(), *naive(q, keys.cpu(), values.cpu(), mask=mask)))


def test_another_device_is_refused() -> None:
    cache = KVCache(1, 16, device=DEVICE, kind="paged")
    with pytest.raises(InputError, match="but this cache is on"):
        cache.append(noise(1, 1, 1, 16).to("meta"), noise(1, 1, 1, 16).to("meta"))


# -- fixed caches ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bf16", "int4"])
def test_a_fixed_cache_is_a_cache(dtype: str) -> None:
    """Rotary on the way in, lengths on the device; the truth is a cache of turned keys."""
    cache = FixedKVCache(2, 32, max_length=24, batch=2, dtype=dtype, device=DEVICE)
    plain = KVCache(2, 32, batch=2, dtype=dtype, device=DEVICE, exact_first=0, exact_recent=0)
    rotary = Rotary(16)
    for start, tokens in ((0, 9), (9, 1), (10, 2)):
        k, v = (noise(2, 2, tokens, 32, seed=start + i) for i in (0, 50))
        cache.append(k.to(DEVICE), v.to(DEVICE), rotary=rotary)
        turned = rotary.apply(k, *rotary.cos_sin(torch.arange(start, start + tokens)))
        plain.append(turned.to(DEVICE), v.to(DEVICE))
    q = noise(2, 6, 2, 32).to(DEVICE)
    wanted = plain.attend(q)
    assert isinstance(wanted, torch.Tensor)
    # Rotary in another order of operations moves a code by one here and there.
    torch.testing.assert_close(cache.attend(q), wanted, rtol=0, atol=0.02)
    assert cache.lengths.tolist() == [12, 12]


def test_a_full_fixed_cache_drops_tokens_and_says_so() -> None:
    cache = FixedKVCache(1, 16, max_length=4, dtype="fp32", device=DEVICE)
    k, v = noise(1, 1, 6, 16), noise(1, 1, 6, 16, seed=1)
    cache.append(k[:, :, :3].to(DEVICE), v[:, :, :3].to(DEVICE))
    assert not cache.overfull()
    cache.append(k[:, :, 3:].to(DEVICE), v[:, :, 3:].to(DEVICE))
    assert cache.overfull()
    assert cache.lengths.tolist() == [4]
    q, sink_logits = noise(1, 2, 1, 16), noise(2, seed=5)
    out = cache.attend(q.to(DEVICE), sink_logits=sink_logits.to(DEVICE)).cpu()
    truth, _ = naive(q, k[:, :, :4], v[:, :, :4], sink_logits=sink_logits)
    torch.testing.assert_close(out.double(), truth.double(), rtol=0, atol=CLOSE)
    cache.reset()
    assert cache.lengths.tolist() == [0]


def test_a_step_compiles_as_one_graph() -> None:
    """``torch.compile`` sees operators and nothing that breaks the graph."""
    cache = FixedKVCache(2, 32, max_length=16, batch=2, dtype="int8", device=DEVICE)
    plain = FixedKVCache(2, 32, max_length=16, batch=2, dtype="int8", device=DEVICE)
    rotary = Rotary(32)
    k, v = noise(2, 2, 1, 32).to(DEVICE), noise(2, 2, 1, 32, seed=1).to(DEVICE)
    plain.append(k, v, rotary=rotary)  # makes the table of turns, as a first step does
    cache.append(k, v, rotary=rotary)

    def step(k: torch.Tensor, v: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        cache.append(k, v, rotary=rotary)
        out: torch.Tensor = cache.attend(q)
        return out

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for i in range(3):
        q, k, v = (noise(2, heads, 1, 32, seed=9 * i + heads).to(DEVICE) for heads in (4, 2, 2))
        plain.append(k, v, rotary=rotary)
        torch.testing.assert_close(compiled(k, v, q), plain.attend(q))
    assert cache.lengths.tolist() == [4, 4]


@pytest.mark.gpu
def test_a_step_is_captured_and_replayed_as_the_cache_grows() -> None:
    cache = FixedKVCache(2, 64, max_length=64, batch=2, dtype="int8", device="cuda")
    plain = KVCache(2, 64, batch=2, dtype="int8", device="cuda")
    q, k, v = (noise(2, heads, 1, 64).cuda().bfloat16() for heads in (8, 2, 2))

    def step() -> torch.Tensor:
        cache.append(k, v)
        out: torch.Tensor = cache.attend(q)
        return out

    step()  # compiles
    cache.reset()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    cache.reset()
    for i in range(20):
        for x, heads, seed in ((q, 8, 100 + i), (k, 2, 200 + i), (v, 2, 300 + i)):
            x.copy_(noise(2, heads, 1, 64, seed=seed))
        graph.replay()
        plain.append(k, v)
        wanted = plain.attend(q)
        assert isinstance(wanted, torch.Tensor)
        torch.testing.assert_close(out, wanted, rtol=0.02, atol=0.01)
