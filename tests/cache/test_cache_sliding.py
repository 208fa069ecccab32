"""Sliding caches: the full cache with a window, in a bounded number of pages."""

import pytest
import torch

from kvfold.errors import InputError
from tests.toolbox.attention_cases import (
    filled,
    noise,
    stores,
)
from tests.toolbox.cache_cases import PLAIN, check_attends, make, tokens


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
