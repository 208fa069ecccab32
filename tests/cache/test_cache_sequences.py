"""The sequences of a cache: ragged, forked, reordered, shortened."""

import pytest
import torch

from tests.toolbox.attention_cases import (
    contents,
    filled,
    noise,
    stores,
)
from tests.toolbox.cache_cases import check_attends, check_holds, make, tokens


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
