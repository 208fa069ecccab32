"""Copies of caches are copies: equal to the byte, and independent; and any mode may fill them."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

import kvfold.transformers as drop_in
from kvfold.cache.fixed import FixedKVCache
from kvfold.cache.kv import KVCache
from kvfold.nn import Rotary
from kvfold.ops.formats import FORMATS
from tests.toolbox.attention_cases import filled, noise, stores
from tests.toolbox.nn_cases import layer
from tests.toolbox.nn_cases import tokens as inputs
from tests.toolbox.sliding import sliding
from tests.toolbox.tiny import make, tokens

COPY = pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])


def copied(x: Any, way: str) -> Any:
    """A copy; the original is dropped from the memory that the copy may know."""
    if way == "deepcopy":
        return copy.deepcopy(x)
    if way == "pickle":
        return pickle.loads(pickle.dumps(x))
    file = io.BytesIO()
    torch.save(x, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


def everything(cache: Any) -> list[bytes]:
    """All that a cache holds: pages, scales and tables."""
    held = [x for store in stores(cache) for x in (*store, store.table)]
    return [x.contiguous().view(torch.uint8).numpy().tobytes() for x in held]


@COPY
@pytest.mark.parametrize("dtype", [*FORMATS, ("int8", "int4")], ids=str)
@pytest.mark.parametrize("kind", ["contiguous", "paged", "sliding"])
def test_copies_of_caches(kind: str, dtype: Any, way: str) -> None:
    window = 24 if kind == "sliding" else None
    cache = KVCache(2, 20, v_head_dim=13, batch=2, dtype=dtype, kind=kind, window=window)
    filled(cache, 130)
    cache.attend(noise(2, 6, 1, 20))  # makes what attention keeps for the next call
    other, before = copied(cache, way), everything(cache)
    assert everything(other) == before
    check_attends_alike(cache, other)
    memory = {x.data_ptr() for store in stores(cache) for x in store if x.numel()}
    assert memory.isdisjoint(x.data_ptr() for store in stores(other) for x in store)
    filled(other, 70, seed=5)
    assert everything(cache) == before
    assert (cache.lengths, other.lengths) == ([130, 130], [200, 200])
    filled(cache, 70, seed=5)
    check_attends_alike(cache, other)


def check_attends_alike(one: KVCache, other: KVCache) -> None:
    q = noise(2, 6, 1, 20)
    for x, y in zip(one.attend(q, return_lse=True), other.attend(q, return_lse=True), strict=True):
        assert torch.equal(x, y)


@COPY
def test_copies_of_fixed_caches(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVFOLD_BACKEND", "triton")
    cache = FixedKVCache(2, 16, max_length=40, dtype="int8", device="cpu")
    q, k, v = noise(1, 4, 1, 16), noise(1, 2, 9, 16), noise(1, 2, 9, 16, seed=1)
    cache.append(k, v, rotary=Rotary(16))
    other = copied(cache, way)
    other.append(k, v, rotary=Rotary(16))
    assert (cache.lengths.tolist(), other.lengths.tolist()) == ([9], [18])
    cache.append(k, v, rotary=Rotary(16))
    assert torch.equal(other.attend(q), cache.attend(q))
    for x, y in zip(other.read(), cache.read(), strict=True):
        assert torch.equal(x, y)


@COPY
@torch.inference_mode()
def test_copies_of_layers_that_hold_a_cache(way: str) -> None:
    single = layer(24, 4, 2, dtype=torch.float32, rotary=Rotary(6))
    single.cache = single.new_cache(2, dtype="int4")
    x = inputs(2, 30, 24, dtype=torch.float32)
    single(x, cache=single.cache)
    other = copied(single, way)
    for step in range(3):
        new = inputs(2, 1, 24, seed=step, dtype=torch.float32)
        assert torch.equal(other(new, cache=other.cache), single(new, cache=single.cache))
    assert other.cache.lengths == single.cache.lengths == [33, 33]


@COPY
@pytest.mark.parametrize("case", ["llama", "gemma3"])
@pytest.mark.parametrize("dtype", [None, "int8", "int4"])
def test_a_prompt_is_read_once(case: str, dtype: Any, way: str) -> None:
    """The pattern of transformers' documentation: fill a cache, copy it for every request."""
    model = make("llama") if case == "llama" else sliding(case)
    model.set_attn_implementation("kvfold")
    prompt = tokens(1, 40)
    cache = drop_in.KVCache(model.config, dtype=dtype)
    with torch.no_grad():
        cache = model(prompt, past_key_values=cache).past_key_values
    for request in range(3):
        ids = torch.cat([prompt, tokens(1, 5, seed=request)], 1)
        options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
        options["attention_mask"] = torch.ones_like(ids)
        found = model.generate(ids, past_key_values=copied(cache, way), **options)
        again = drop_in.KVCache(model.config, dtype=dtype)
        with torch.no_grad():
            model(prompt, past_key_values=again)
        assert torch.equal(found, model.generate(ids, past_key_values=again, **options))
        if dtype is None:
            assert torch.equal(found, model.generate(ids, **options))
        assert cache.get_seq_length() == 40


def test_stored_keys_can_be_copied() -> None:
    cache = drop_in.KVCache(make("llama").config)
    k = noise(1, 2, 9, 8)
    cache.update(k, k, 0)
    cache.update(k, k, 0)
    keys = copy.deepcopy(cache.layers[0].keys)
    assert torch.equal(keys.tensor(), torch.cat([k, k], 2))


CALLS: dict[str, Callable[[KVCache], object]] = {
    "append": lambda cache: filled(cache, 3),
    "append much": lambda cache: filled(cache, 500),
    "truncate": lambda cache: cache.truncate(100),
    "clear": lambda cache: cache.clear([1]),
    "reorder": lambda cache: cache.reorder([1, 1, 0]),
    "fork": lambda cache: cache.fork(0, 1) if cache.kind != "contiguous" else None,
    "trim": lambda cache: cache.trim(),
    "attend": lambda cache: cache.attend(noise(2, 6, 1, 20)),
    "copy": lambda cache: copy.deepcopy(cache),
}


@pytest.mark.parametrize("dtype", [*FORMATS, ("int8", "int4")], ids=str)
@pytest.mark.parametrize("kind", ["contiguous", "paged", "sliding"])
@pytest.mark.parametrize("filled_under", [torch.inference_mode, torch.no_grad])
def test_filled_under_one_mode_and_used_under_another(
    kind: str, dtype: Any, filled_under: Any
) -> None:
    def make_one() -> KVCache:
        window = 24 if kind == "sliding" else None
        cache = KVCache(2, 20, batch=2, dtype=dtype, kind=kind, window=window, slack=40)
        filled(cache, 100)
        if kind != "contiguous":
            cache.fork(0, 1)
        cache.reorder([1, 0])
        filled(cache, 30, seed=1)
        return cache

    for name, call in CALLS.items():
        with filled_under():
            cache = make_one()
        plain = make_one()
        for one in (cache, plain):
            call(one)
            filled(one, 17, seed=2)
        assert everything(cache) == everything(plain), name


@pytest.mark.parametrize("dtype", [None, "int4"])
def test_inference_mode_in_models(dtype: Any) -> None:
    """A prompt under inference_mode, the rest under no_grad, and back."""
    model = sliding("gemma3")
    model.set_attn_implementation("kvfold")
    ids, found = tokens(1, 120), []
    for modes in ([torch.no_grad] * 3, [torch.inference_mode, torch.no_grad, torch.inference_mode]):
        cache = drop_in.KVCache(model.config, dtype=dtype)
        for mode, piece in zip(modes, ids.split(50, 1), strict=True):
            with mode():
                out = model(piece, past_key_values=cache).logits
            cache.crop(-1)
        found.append(out)
    assert torch.equal(*found)
