"""Wrong calls of caches and layers: every argument of every method, given everything.

A call does what it says or raises InputError, and what it refuses leaves the cache as it was.
"""

import inspect
import math
from typing import Any

import pytest
import torch

from kvfold import Evict, Select
from kvfold.cache.fixed import FixedKVCache
from kvfold.cache.kv import KVCache
from kvfold.cache.latent import LatentCache
from kvfold.errors import InputError
from kvfold.nn import GroupedQueryAttention, LatentAttention, Rotary
from tests.toolbox.attention_cases import filled, noise
from tests.toolbox.nn_cases import layer
from tests.toolbox.nn_cases import tokens as inputs

WRONG: dict[str, Any] = {
    "None": None,
    "True": True,
    "-1": -1,
    "0": 0,
    "3": 3,
    "10^12": 10**12,
    "0.5": 0.5,
    "nan": math.nan,
    "word": "fast",
    "bytes": b"1",
    "[]": [],
    "[0]": [0],
    "[-1]": [-1],
    "[0.5]": [0.5],
    "[True]": [True],
    "[words]": ["a", "b"],
    "[[0]]": [[0]],
    "{}": {},
    "object": object(),
    "dtype": torch.int64,
    "complex dtype": torch.complex64,
    "device": torch.device("meta"),
    "scalar": torch.tensor(1),
    "vector": torch.zeros(3),
    "empty": torch.zeros(0),
    "whole": torch.zeros(2, dtype=torch.long),
    "wide": torch.zeros(2, 4, 3, 24),
    "four": torch.zeros(2, 2, 3, 16, dtype=torch.long),
    "complex": torch.zeros(2, 2, 3, 16, dtype=torch.complex64),
    "far": torch.zeros(2, 2, 3, 16, device="meta"),
    "five": torch.zeros(1, 2, 2, 3, 16),
    "array": torch.zeros(2, 2, 3, 16).numpy(),
}


def tried(call: Any, given: dict[str, Any], **context: Any) -> list[str]:
    """What a call answers with something else than a result or InputError."""
    found = []
    for argument in given:
        for name, wrong in WRONG.items():
            try:
                call(**(given | {argument: wrong}))
            except InputError:
                continue
            except Exception as error:
                found.append(f"{argument}={name}: {type(error).__name__}: {error} {context}")
    return found


def arguments(function: Any, *, beside: tuple[str, ...] = ("self",)) -> dict[str, Any]:
    """Its arguments at their defaults, so that a new one is tried too."""
    parameters = inspect.signature(function).parameters.items()
    known = {name: p.default for name, p in parameters if name not in beside}
    return {n: d for n, d in known.items() if d is not inspect.Parameter.empty}


def small(kind: str = "paged", dtype: str = "int8") -> KVCache:
    window, select = (24 if kind == "sliding" else None), (Select() if kind == "paged" else None)
    cache = KVCache(2, 16, batch=2, dtype=dtype, kind=kind, window=window, select=select)
    return filled(cache, 20)


@pytest.mark.parametrize("kind", ["contiguous", "paged", "sliding"])
def test_making_caches(kind: str) -> None:
    given = arguments(KVCache.__init__) | {"num_kv_heads": 2, "head_dim": 16, "kind": kind}
    if kind == "sliding":
        given["window"] = 24
    assert not tried(KVCache, given)


@pytest.mark.parametrize("kind", ["contiguous", "paged", "sliding"])
def test_methods_of_caches(kind: str) -> None:
    k = noise(2, 2, 3, 16)
    calls: dict[str, dict[str, Any]] = {
        "append": {"k": k, "v": k},
        "attend": {"q": noise(2, 4, 1, 16)},
        "scores": {"q": noise(2, 4, 1, 16)},
        "read": {},
        "tensors": {"dtype": torch.float32},
        "truncate": {"length": 18},
        "can_truncate": {"length": 18},
        "clear": {},
        "fork": {"source": 0, "target": 1},
        "reorder": {"sequences": [1, 0]},
    }
    public = {n for n in vars(KVCache) if not n.startswith("_") and callable(getattr(KVCache, n))}
    if kind == "paged":
        calls["selected"] = {"q": noise(2, 4, 1, 16)}
        calls["evict"] = {"budget": 0.5, "sinks": 2, "recent": 4, "floor": 0.5}
        calls["evict_as"] = {"how": Evict(sinks=2, recent=4), "q": noise(2, 4, 1, 16)}
    assert public == {*calls, "trim", "selected", "evict", "evict_as"}  # trim takes nothing
    cache = small(kind)
    for name, needed in calls.items():

        def call(name: str = name, **given: Any) -> None:
            vars(cache).update(vars(small(kind)))
            getattr(cache, name)(**given)

        given = arguments(getattr(KVCache, name)) | needed
        wrong = tried(call, given, method=name)
        assert not wrong, "\n".join(wrong)


def test_a_refused_call_changes_nothing() -> None:
    k = noise(2, 2, 3, 16)
    cache = small()
    before = cache.read(0)[0]
    for name, wrong in WRONG.items():
        for given in ({"k": wrong}, {"v": wrong}, {"sequences": wrong}, {"queries": wrong}):
            try:
                cache.append(**({"k": k, "v": k} | given))
            except InputError:
                assert cache.lengths == [20, 20], name
                assert torch.equal(cache.read(0)[0], before)
            else:
                cache = small()


def test_fixed_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVFOLD_BACKEND", "triton")
    made = {"num_kv_heads": 2, "head_dim": 16, "max_length": 8, "batch": 2, "device": "cpu"}
    given = arguments(FixedKVCache.__init__) | made
    assert not tried(FixedKVCache, given)
    k = noise(2, 2, 1, 16)

    def call(method: str, **given: Any) -> None:
        cache = FixedKVCache(**made)  # type: ignore[arg-type]
        cache.append(k, k)
        getattr(cache, method)(**given)

    for name, needed in {
        "append": {"k": k, "v": k},
        "attend": {"q": noise(2, 4, 1, 16)},
        "read": {},
    }.items():
        given = {"method": name} | arguments(getattr(FixedKVCache, name)) | needed
        given.pop("method")
        assert not tried(lambda name=name, **g: call(name, **g), given, method=name)


def test_making_layers() -> None:
    given = arguments(GroupedQueryAttention.__init__)
    given |= {"hidden_size": 24, "num_heads": 4, "num_kv_heads": 2}
    assert not tried(GroupedQueryAttention, given)
    single = layer(24, 4, 2, window=5)
    assert not tried(single.new_cache, arguments(single.new_cache) | {"kind": "sliding"})


@torch.inference_mode()
def test_calls_of_layers() -> None:
    single = layer(24, 4, 2, dtype=torch.float32, rotary=Rotary(6))
    cross = layer(24, 4, 2, dtype=torch.float32, causal=False)
    x = inputs(2, 5, 24, dtype=torch.float32)
    for one, needed in ((single, {"x": x}), (cross, {"x": x, "context": x})):
        for cached in (False, True):
            cache = one.new_cache(2) if cached else None
            if cached:
                one(**needed, cache=cache)

            def call(one: Any = one, **given: Any) -> None:
                one(**given)

            given = arguments(one.forward) | needed | ({"cache": cache} if cached else {})
            wrong = tried(call, given, cached=cached)
            assert not wrong, "\n".join(wrong)


def test_caches_of_latents() -> None:
    given = arguments(LatentCache.__init__) | {"kv_lora_rank": 16, "qk_rope_head_dim": 4}
    assert not tried(LatentCache, given)
    c, k_rope = noise(2, 3, 16), noise(2, 3, 4)
    calls: dict[str, dict[str, Any]] = {
        "append": {"c": c, "k_rope": k_rope},
        "attend": {"q": noise(2, 4, 1, 20), "scale": 0.1},
        "read": {},
        "tensors": {"dtype": torch.float32},
        "truncate": {"length": 2},
        "clear": {},
        "fork": {"source": 0, "target": 1},
        "reorder": {"sequences": [1, 0]},
    }
    assert set(calls) == {
        n for n in vars(LatentCache) if not n.startswith("_") and callable(getattr(LatentCache, n))
    }

    def call(method: str, **given: Any) -> None:
        cache = LatentCache(16, 4, batch=2, kind="paged")
        cache.append(c, k_rope)
        getattr(cache, method)(**given)

    for name, needed in calls.items():
        given = arguments(getattr(LatentCache, name)) | needed
        assert not tried(lambda name=name, **g: call(name, **g), given, method=name)


def test_making_latent_layers() -> None:
    given = arguments(LatentAttention.__init__) | {"hidden_size": 24, "num_heads": 4}
    given |= {"kv_lora_rank": 16, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4}
    assert not tried(LatentAttention, given)


@torch.inference_mode()
def test_calls_of_latent_layers() -> None:
    single = LatentAttention(24, 4, kv_lora_rank=16, qk_nope_head_dim=6, qk_rope_head_dim=4)
    x = noise(2, 3, 24)
    assert not tried(single, arguments(LatentAttention.forward) | {"x": x})

    def later(**given: Any) -> None:
        cache = single.new_cache(2)
        single(x, cache=cache)
        single(**({"cache": cache} | given))

    given = arguments(LatentAttention.forward) | {"x": x}
    del given["cache"]
    assert not tried(later, given)
