"""KV caches: whatever happened to them, they hold and attend to the tokens they were given."""

from typing import Any

import pytest
import torch

from kvfold.cache.kv import KVCache
from kvfold.errors import InputError
from kvfold.kernels.dispatch import attention
from kvfold.ops.quantize import FORMATS, decode, encode, rotate, rotation_size
from tests.toolbox.attention_cases import (
    check_as_good_as_pytorch,
    contents,
    filled,
    needs_kernels,
    noise,
    one_byte_weights,
    skip_without_kernels,
    stores,
    without_kernels,
)

DTYPES: list[Any] = [*FORMATS, ("int8", "int4"), ("fp8", "bf16"), torch.float16]
PAGES = (1, 4, 7, 16, 64, 128)
PLAIN: dict[str, Any] = {"exact_first": 0, "exact_recent": 0}  # no tokens kept in bfloat16


@pytest.fixture(params=["kernels", "plain PyTorch"])
def _backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "kernels":
        skip_without_kernels()
    else:
        without_kernels(monkeypatch)


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
    size = rotation_size(fmt, dim) if key else 0
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


@pytest.mark.parametrize("first", [5, 20])
def test_any_number_of_first_tokens_is_exact(first: int) -> None:
    k, v = tokens(200)
    cache = make("int4", exact_first=first)
    for t in range(200):
        cache.append(k[:, :, t : t + 1], v[:, :, t : t + 1])
    assert torch.equal(cache.read()[0][:, :first], k[0, :, :first].bfloat16().float())


@pytest.mark.usefixtures("_backend")
@pytest.mark.parametrize("dtype", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("kind", ["contiguous", "paged"])
def test_ragged_batches(kind: str, dtype: str) -> None:
    """Sequences of different lengths, appended to one, some and all at a time, are apart."""
    lengths = [0, 1, 40, 131]
    cache = make(dtype, kind, batch=4, page_size=16)
    alone = [make(dtype, kind, page_size=16) for _ in lengths]

    def both(count: int, seed: int, sequences: list[int]) -> None:
        k, v = tokens(count, len(sequences), seed)
        cache.append(k, v, sequences)
        for i, b in enumerate(sequences):
            alone[b].append(k[i : i + 1], v[i : i + 1])

    for b, length in enumerate(lengths):
        both(length, b, [b])
    both(3, 10, [3, 1])
    both(30, 11, [0, 1, 2, 3])
    assert cache.lengths == [30, 34, 70, 164]
    for b in range(4):
        for x, y in zip(cache.read(b), alone[b].read(), strict=True):
            assert torch.equal(x, y)
    check_attends(cache)
    q = noise(2, 6, 1, 20)
    some = torch.as_tensor(cache.attend(q, sequences=[2, 0]))
    for i, b in enumerate((2, 0)):
        one = torch.as_tensor(alone[b].attend(q[i : i + 1]))
        torch.testing.assert_close(some[i : i + 1], one, atol=1e-5, rtol=0)


@pytest.mark.usefixtures("_backend")
@pytest.mark.parametrize("dtype", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("page_size", [4, 16])
def test_forks_share_until_they_change(page_size: int, dtype: str) -> None:
    cache = make(dtype, batch=3, page_size=page_size)
    k, v = tokens(150)
    cache.append(k, v, [0])
    before, used = cache.read(0), [s.pages_in_use for s in stores(cache)]
    cache.fork(0, 1)
    cache.fork(0, 2)
    cache.fork(1, 1)
    assert [s.pages_in_use for s in stores(cache)] == used
    cache.append(*tokens(9, seed=7), [1])
    cache.append(*tokens(2, seed=9), [0])
    assert sum(s.pages_in_use for s in stores(cache)) > sum(used)
    for x, y in zip(cache.read(2), before, strict=True):
        assert torch.equal(x, y)
    for b, (count, seed) in enumerate([(2, 9), (9, 7)]):
        again = make(dtype, page_size=page_size)
        again.append(k, v)
        again.append(*tokens(count, seed=seed))
        for x, y in zip(cache.read(b), again.read(), strict=True):
            assert torch.equal(x, y)
    check_attends(cache)
    for b in (1, 0, 2):
        cache.clear([b])
    assert [s.pages_in_use for s in stores(cache)] == [0] * len(stores(cache))
    assert cache.lengths == [0, 0, 0]


@pytest.mark.usefixtures("_backend")
@pytest.mark.parametrize("dtype", ["bf16", "int4"])
@pytest.mark.parametrize("kind", ["contiguous", "paged", "sliding"])
@pytest.mark.parametrize("order", [[2, 0, 0], [1], [0, 0, 1, 1, 2], []], ids=str)
def test_reorder(order: list[int], kind: str, dtype: str) -> None:
    """Beams swap, multiply and die; those that share pages part when they go on."""
    cache = filled(make(dtype, kind, batch=3), 120)
    old = [cache.read(b) for b in range(3)]
    cache.reorder(order)
    assert cache.batch == len(order)
    for b, source in enumerate(order):
        assert torch.equal(cache.read(b)[0], old[source][0])
    k, v = tokens(1, len(order), seed=5)
    cache.append(k, v)
    for b in range(len(order)):
        got = cache.read(b)[0]
        assert torch.equal(got[:, -1], k[b, :, 0].bfloat16().float())
        alike = got[:, -24:-1] == old[order[b]][0][:, -23:]
        assert bool(alike.all())
    check_attends(cache)


@pytest.mark.usefixtures("_backend")
@pytest.mark.parametrize("dtype", ["fp16", "fp8", "int8"])
@pytest.mark.parametrize(("kind", "page_size"), [("contiguous", 64), ("paged", 7), ("paged", 16)])
def test_truncated_tokens_were_never_there(kind: str, page_size: int, dtype: str) -> None:
    never, cache = (make(dtype, kind, page_size=page_size) for _ in range(2))
    for c in (never, cache):
        c.append(*tokens(45))
    cache.append(*tokens(90, seed=5))
    cache.truncate(45)
    cache.truncate(45)
    cache.truncate(1000)
    for c in (never, cache):
        c.append(*tokens(20, seed=7))
    for x, y in zip(contents(cache), contents(never), strict=True):
        assert torch.equal(x, y)
    assert stores(cache)[0].pages_in_use == stores(never)[0].pages_in_use
    cache.clear()
    cache.append(*tokens(3))
    check_holds(cache, tokens(3)[0][0], tokens(3)[1][0])


@pytest.mark.usefixtures("_backend")
@pytest.mark.parametrize(
    "length",
    [0, 10, 16, 70, 120, 149],
)
def test_truncating_into_what_is_quantized(length: int) -> None:
    """It stays quantized; what follows is kept exactly as ever."""
    cache = make("int4")
    cache.append(*tokens(150))
    before = cache.read()
    cache.truncate(length)
    for x, y in zip(cache.read(), before, strict=True):
        assert torch.equal(x, y[:, :length])
    k, v = tokens(200, seed=5)
    for t in range(200):
        cache.append(k[:, :, t : t + 1], v[:, :, t : t + 1])
    got, _ = cache.read()
    assert torch.equal(got[:, :16][:, :length], before[0][:, :16][:, :length])
    assert torch.equal(got[:, -64:], k[0, :, -64:].bfloat16().float())
    check_attends(cache)


@pytest.mark.parametrize("dtype", ["bf16", "int8", "int4"])
@pytest.mark.parametrize(("window", "sinks", "page_size"), [(24, 0, 16), (50, 4, 16), (9, 3, 4)])
@pytest.mark.usefixtures("_backend")
def test_sliding_is_the_full_cache_with_a_window(
    window: int, sinks: int, page_size: int, dtype: str
) -> None:
    """And holds a bounded number of pages."""
    sliding = make(dtype, "sliding", 2, window=window, sinks=sinks, page_size=page_size, **PLAIN)
    full = make(dtype, "contiguous", 2, **PLAIN)
    most = 2 * sum(-(-(n + page_size + 4) // page_size) for n in (window, sinks))
    for step in range(60):
        k, v = tokens(1 + step % 5, 2, seed=step)
        for cache in (sliding, full):
            cache.append(k, v)
        q = noise(2, 6, 1 + step % 5, 20, seed=step)
        out = torch.as_tensor(sliding.attend(q))
        expected = torch.as_tensor(full.attend(q, window=window, sinks=sinks))
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)
        assert stores(sliding)[0].pages_in_use <= most


@pytest.mark.parametrize("dtype", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("sinks", [0, 3])
@pytest.mark.usefixtures("_backend")
def test_a_sliding_cache_skips_what_no_query_will_see(sinks: int, dtype: str) -> None:
    """Of a long prompt, whose queries attend elsewhere, it stores what the last one sees."""
    some, everything = (
        make(dtype, "sliding", window=20, sinks=sinks, page_size=4) for _ in range(2)
    )
    for seed, (count, queries) in enumerate([(90, 2), (1, 1), (150, 1), (10, 10), (50, 3)]):
        k, v = tokens(count, seed=seed)
        some.append(k, v, queries=queries)
        everything.append(k, v)
        assert stores(some)[0].pages_in_use <= -(-(20 + count + sinks) // 4) + 3
        q = noise(1, 6, queries, 20, seed=seed)
        out, expected = (torch.as_tensor(c.attend(q)) for c in (some, everything))
        # INT4 may have rounded by way of bfloat16 in one and not in the other.
        torch.testing.assert_close(out, expected, atol=0.3 if dtype == "int4" else 1e-5, rtol=0)


@pytest.mark.parametrize("window", [8, 24])
def test_a_sliding_cache_can_forget_its_last_append(window: int) -> None:
    """Speculative decoding: the window of what is left was not freed yet."""
    never, cache = (make("bf16", "sliding", window=window, page_size=4) for _ in range(2))
    for c in (never, cache):
        c.append(*tokens(100))
    k, v = tokens(6, seed=3)
    cache.append(k, v)
    never.append(k[:, :, :2], v[:, :, :2])
    cache.truncate(102)
    q = noise(1, 6, 1, 20)
    assert torch.equal(torch.as_tensor(cache.attend(q)), torch.as_tensor(never.attend(q)))


def test_a_sliding_cache_cannot_go_back_further() -> None:
    cache = make("bf16", "sliding", window=8, page_size=4)
    cache.append(*tokens(100))
    cache.append(*tokens(1))
    with pytest.raises(InputError, match="from 101 to 50"):
        cache.truncate(50)
    assert cache.lengths == [101]
    cache.truncate(0)
    check_attends(filled(cache, 30))


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
