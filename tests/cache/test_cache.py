"""KV caches: whatever happened to them, they hold and attend to the tokens they were given."""

from typing import Any

import pytest
import torch

from kvfold.cache.kv import KVCache
from kvfold.kernels.dispatch import attention
from tests.toolbox.attention_cases import (
    contents,
    filled,
    needs_kernels,
    noise,
    stores,
)
from tests.toolbox.cache_cases import (
    DTYPES,
    PLAIN,
    as_stored,
    check_attends,
    check_holds,
    make,
    tokens,
)

PAGES = (1, 4, 7, 16, 64, 128)


@pytest.mark.usefixtures("_backend")
@pytest.mark.parametrize("length", [0, 1, 63, 111, 257])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["contiguous", "paged", "sliding"])
def test_attention_at_every_length(kind: str, dtype: Any, length: int) -> None:
    cache = filled(make(dtype, kind, batch=2), length)
    check_attends(cache)
    check_attends(cache, tokens=min(3, max(length, 1)), softcap=3.0)
    assert cache.lengths == [length, length]


@pytest.mark.usefixtures("_backend")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("page_size", PAGES)
def test_pages(page_size: int, dtype: Any) -> None:
    """Any page size reads back the format's definition, and attends to it."""
    k, v = tokens(131)
    cache = make(dtype, page_size=page_size, **PLAIN)
    cache.append(k, v)
    check_holds(cache, k[0], v[0])
    check_attends(cache, window=100, sinks=3, start=torch.tensor([2]))


@pytest.mark.usefixtures("_backend")
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8", "int4"])
@pytest.mark.parametrize(
    "options",
    [
        {"window": (20, 1), "causal": False},
        {"window": (20, None), "causal": False, "sinks": 2},
        {"window": (20, 0), "sinks": 3},
        {"sink_logits": noise(6, seed=8)},
        {"sink_logits": noise(6, seed=8), "window": 20, "start": torch.tensor([3, 100])},
    ],
    ids=str,
)
def test_windows_to_both_sides_and_sink_logits(dtype: str, options: dict[str, Any]) -> None:
    cache = filled(make(dtype, batch=2), 100)
    for count in (1, 4):
        check_attends(cache, tokens=count, **options)


@needs_kernels
@pytest.mark.parametrize("dtype", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("kind", ["contiguous", "paged"])
def test_20000_tokens(kind: str, dtype: str) -> None:
    check_attends(filled(KVCache(1, 64, dtype=dtype, kind=kind), 20_000))


@pytest.mark.usefixtures("_backend")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("kind", "page_size"), [("contiguous", 64), ("paged", 7), ("paged", 16)])
def test_appending_in_pieces_is_appending_at_once(kind: str, page_size: int, dtype: Any) -> None:
    k, v = tokens(300, batch=2)
    whole = make(dtype, kind, 2, page_size=page_size, **PLAIN)
    whole.append(k, v)
    pieces = make(dtype, kind, 2, page_size=page_size, **PLAIN)
    at = 0
    for size in (1, 1, 15, 16, 0, 17, 64, 3, 100, 83):
        pieces.append(k[:, :, at : at + size], v[:, :, at : at + size])
        at += size
    assert at == 300
    for x, y in zip(contents(pieces), contents(whole), strict=True):
        assert torch.equal(x, y)


@pytest.mark.usefixtures("_backend")
@pytest.mark.parametrize(("first", "recent"), [(16, 64), (0, 40), (32, 0), (16, 7)])
@pytest.mark.parametrize("sizes", [[1] * 250, [250], [7] * 35 + [5], [90, 1, 100, 59]], ids=len)
def test_both_ends_are_exact(sizes: list[int], first: int, recent: int) -> None:
    """INT4 keeps the first and last tokens in bfloat16, and 31 more at most; the rest is INT4.

    What is quantized late goes through bfloat16 first.
    """
    k, v = tokens(sum(sizes))
    cache = make("int4", exact_first=first, exact_recent=recent)
    at = 0
    for size in sizes:
        cache.append(k[:, :, at : at + size], v[:, :, at : at + size])
        at += size
    half = k[0].bfloat16().float()
    got, _ = cache.read()
    exact = (got == half).all(-1).all(0)
    assert bool(exact[:first].all())
    assert bool(exact[at - recent :].all())
    assert int(exact.sum()) <= first + recent + 31
    once, twice = (as_stored(x, "int4", True) for x in (k[0], half))
    middle = torch.minimum((got - once).abs(), (got - twice).abs()).amax((0, 2))[~exact]
    assert float(middle.max()) < 2**-20
    check_attends(cache)


def test_what_is_exact_still_is_one_view() -> None:
    cache = make("int4")
    k, v = tokens(200)
    views = []
    for length in (1, 16, 80, 200):
        there = cache.lengths[0]
        cache.append(k[:, :, there:length], v[:, :, there:length])
        views.append(len(cache._storage.views([0], [length])))
    assert views == [1, 1, 1, 3]


@pytest.mark.parametrize("first", [5, 20])
def test_any_number_of_first_tokens_is_exact(first: int) -> None:
    k, v = tokens(200)
    cache = make("int4", exact_first=first)
    for t in range(200):
        cache.append(k[:, :, t : t + 1], v[:, :, t : t + 1])
    assert torch.equal(cache.read()[0][:, :first], k[0, :, :first].bfloat16().float())


@pytest.mark.usefixtures("_backend")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_growing_keeps_what_was_there(dtype: Any) -> None:
    """One page per sequence that is made longer, and a table made wider."""
    k, v = tokens(1200, batch=2)
    for options in ({"kind": "contiguous"}, {"kind": "paged", "page_size": 4}):
        cache = make(dtype, batch=2, **options, **PLAIN)
        for low, high in ((0, 250), (250, 300), (300, 1200)):
            cache.append(k[:, :, low:high], v[:, :, low:high])
        for b in range(2):
            check_holds(cache, k[b], v[b], b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nbytes(dtype: Any) -> None:
    """Every tensor counted; full pages cost what the formats say, and tables hardly anything."""
    cache = KVCache(2, 64, v_head_dim=96, batch=2, dtype=dtype, max_length=1024, **PLAIN)
    filled(cache, 1024)
    parts = [x.nbytes for store in stores(cache) for x in store]
    assert cache.nbytes == pytest.approx(sum(parts), rel=0.01)
    row = sum(
        fmt.row_bytes(dim) + 2 * fmt.groups(dim)
        for fmt, dim in zip(cache.formats, (64, 96), strict=True)
    )
    assert cache.nbytes == pytest.approx(2 * 2 * 1024 * row, rel=0.01)
    assert cache.bytes_per_token == pytest.approx(2 * row, rel=0.01)


def test_gradients_reach_sink_logits() -> None:
    cache, q = filled(make("fp32", batch=2), 30), noise(2, 6, 2, 20)
    logits = noise(6, seed=8).requires_grad_()
    torch.as_tensor(cache.attend(q, sink_logits=logits)).square().sum().backward()
    again = logits.detach().double().requires_grad_()
    k, v = (x.double() for x in contents(cache))
    out = torch.as_tensor(attention(q.double(), k, v, sink_logits=again))
    out.square().sum().backward()
    assert logits.grad is not None
    assert again.grad is not None
    torch.testing.assert_close(logits.grad.double(), again.grad, rtol=1e-4, atol=1e-5)
