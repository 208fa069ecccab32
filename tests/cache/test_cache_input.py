"""What a cache refuses, and that it says why before anything changes."""

import math
from typing import Any

import pytest
import torch

from kvfold.cache.kv import KVCache
from kvfold.errors import InputError
from tests.toolbox.attention_cases import filled, noise

K, V, Q = noise(2, 2, 3, 16), noise(2, 2, 3, 24), noise(2, 4, 1, 16)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_kv_heads": 0}, "num_kv_heads=0"),
        ({"head_dim": 0}, "head_dim=0"),
        ({"head_dim": 1025}, "head_dim=1025"),
        ({"v_head_dim": -1}, "v_head_dim=-1"),
        ({"batch": -1}, "batch=-1"),
        ({"page_size": 0}, "page_size=0"),
        ({"dtype": "int3"}, "int3"),
        ({"dtype": torch.int8}, "int8"),
        ({"dtype": ("int8", "q4")}, "q4"),
        ({"kind": "ring"}, "ring"),
        ({"kind": "sliding"}, "window=None"),
        ({"kind": "sliding", "window": 0}, "window=0"),
        ({"kind": "sliding", "window": -4}, "window=-4"),
        ({"kind": "paged", "window": 4}, "window=4"),
        ({"kind": "sliding", "window": 4, "sinks": -1}, "sinks=-1"),
        ({"max_length": 0}, "max_length=0"),
        ({"exact_first": -1}, "exact_first=-1"),
        ({"exact_recent": -1}, "exact_recent=-1"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_construction(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        KVCache(**({"num_kv_heads": 2, "head_dim": 16} | options))


@pytest.fixture
def cache() -> KVCache:
    return filled(KVCache(2, 16, v_head_dim=24, batch=2, dtype="int8", kind="paged"), 20)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"k": K[:1]}, r"k has shape \[1, 2, 3, 16\]"),
        ({"k": K[:, :1]}, r"k has shape \[2, 1, 3, 16\]"),
        ({"k": K[..., :8]}, r"\[2, 2, T, 16\]"),
        ({"v": K}, r"v has shape \[2, 2, 3, 16\]"),
        ({"v": V[0]}, r"v has shape \[2, 3, 24\]"),
        ({"v": V[:, :, :2]}, "k has 3 tokens but v has 2"),
        ({"k": K.double()}, "float64"),
        ({"v": V.long()}, "int64"),
        ({"k": K.to("meta")}, "meta"),
        ({"sequences": [0, 2]}, "sequence 2"),
        ({"sequences": [0, -1]}, "sequence -1"),
        ({"sequences": [0]}, r"k has shape \[2, 2, 3, 16\], expected \[1, 2, T, 16\]"),
        ({"sequences": [1, 1]}, "only once"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_append(cache: KVCache, change: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        cache.append(**({"k": K, "v": V} | change))
    assert cache.lengths == [20, 20]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"q": Q[0]}, r"q has shape \[4, 1, 16\]"),
        ({"q": Q[:1]}, r"q has shape \[1, 4, 1, 16\]"),
        ({"q": noise(2, 3, 1, 16)}, "3 heads"),
        ({"q": noise(2, 4, 1, 24)}, r"\[2, 4, 1, 24\]"),
        ({"q": Q.double()}, "float64"),
        ({"q": Q.to("meta")}, "meta"),
        ({"sequences": [5]}, "sequence 5"),
        ({"window": 0}, "window=0"),
        ({"window": -3}, "window=-3"),
        ({"window": 3, "causal": False}, "causal"),
        ({"window": 3, "sinks": -1}, "sinks=-1"),
        ({"scale": math.nan}, "scale=nan"),
        ({"softcap": -2.0}, "softcap=-2"),
        ({"mask": torch.zeros(3, 21)}, "mask"),
        ({"start": torch.tensor([21, 40])}, "start"),
        ({"start": torch.tensor([0, 0, 0])}, "start"),
        ({"start": torch.tensor([-1, 0])}, "start"),
        ({"alibi_slopes": torch.ones(5)}, "alibi_slopes"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_attend(cache: KVCache, change: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        cache.attend(**({"q": Q} | change))


def test_sequence_operations(cache: KVCache) -> None:
    for call in (
        lambda: cache.read(2),
        lambda: cache.clear([-1]),
        lambda: cache.truncate(3, [7]),
        lambda: cache.fork(0, 2),
        lambda: cache.fork(-1, 0),
        lambda: cache.reorder([0, 2]),
    ):
        with pytest.raises(InputError, match=r"sequence -?\d"):
            call()
    assert cache.lengths == [20, 20]


def test_a_contiguous_cache_cannot_fork() -> None:
    with pytest.raises(InputError, match="cannot fork") as error:
        KVCache(2, 16, batch=2).fork(0, 1)
    assert "paged" in error.value.hint


def test_truncate_to_a_negative_length(cache: KVCache) -> None:
    with pytest.raises(InputError, match="-1"):
        cache.truncate(-1)


def sliding() -> KVCache:
    cache = KVCache(1, 16, kind="sliding", window=4, sinks=2, page_size=1)
    for step in range(30):
        filled(cache, 1, seed=step)
    return cache


def test_a_sliding_cache_has_freed_the_sinks_after_left_padding() -> None:
    with pytest.raises(InputError, match="start"):
        sliding().attend(noise(1, 1, 1, 16), start=torch.tensor([6]))


def test_a_sliding_cache_has_freed_what_earlier_queries_see() -> None:
    with pytest.raises(InputError):
        sliding().attend(noise(1, 1, 3, 16))


def test_max_length_reserves_and_limits() -> None:
    cache = KVCache(2, 16, batch=2, max_length=100)
    size = cache.nbytes
    filled(cache, 99)
    assert cache.nbytes <= size * 1.01
    with pytest.raises(InputError, match=r"101 tokens.*max_length=100"):
        filled(cache, 2)
    assert cache.lengths == [99, 99]
    filled(cache, 1)
